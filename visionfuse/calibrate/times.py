"""The time of one attention call with a candidate: predicted for a GPU that was measured, or measured here."""

from __future__ import annotations

from dataclasses import replace
from math import prod

from ..kernels.order import Order
from ..kernels.plan import TokenLayout, plan_attention
from ..kernels.plan.planner import choose_order
from ..recipe import Variant
from ..simulate import H200, Gpu, Setting, cudnn_ms, predicted_ms

IMPL = "gluon_sm90"
# Rounding queries, keys and values: ms an element of one head on an H200. "int8, smooth K, fp8 V, ordered" in
# assets/bench/engine.csv, 0.1842 ms for 16,896 tokens and 24 heads of 128.
PROLOGUE_MS = 0.1842 / (16_896 * 24 * 128)
# INT4 is multiplied as INT8 where tensor cores have none.
MULTIPLIED_AS = {"int4_fp8": "int8_fp8"}


def setting_of(
    layout: TokenLayout, *, batch: int, heads: int, head_dim: int, gpu: Gpu = H200
) -> Setting:
    """The attention calls of one layer, for the simulator, which knows text and one grid."""
    grids = [s.shape for s in layout.segments if s.kind == "grid"]
    grid = max(grids, key=prod) if grids else (layout.length,)
    return Setting(
        grid=grid, text=layout.length - prod(grid), heads=heads, head_dim=head_dim, batch=batch,
        impl=IMPL, gpu=gpu,
    )  # fmt: skip


def stock_ms(setting: Setting) -> float:
    """PyTorch's dense attention, which is cuDNN's there. Raises ValueError where its speed is not known."""
    found = cudnn_ms(setting)
    if found is None:
        raise ValueError(
            f"The speed of {setting.gpu.name} at head dim {setting.head_dim} is not known."
        )
    return found


def candidate_ms(candidate: Variant, layout: TokenLayout, setting: Setting) -> float:
    """From queries, keys and values to the output, rounding included. Raises ValueError where no kernel for the
    candidate's precision was measured on that GPU."""
    precision = candidate.precision
    name = MULTIPLIED_AS.get(precision.name, precision.name)
    setting = replace(setting, precision=name)
    order, shape = choose_order(layout, candidate.plan, Order(), setting.shapes)
    plan = plan_attention(layout, candidate.plan, order=order, shape=shape)
    ms = predicted_ms(plan.blocks, shape, setting)
    if precision.is_model:
        return ms
    return ms + PROLOGUE_MS * setting.calls * layout.length * setting.head_dim

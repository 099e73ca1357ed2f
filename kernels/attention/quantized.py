"""Rounded attention on kernels that multiply codes: one pass of the prologue, one kernel.

An implementation joins by two functions, `unsupported(operands, plan)` and `forward(operands, plan, scale,
return_lse)`, and by the width of its key slots. Nothing waits for the GPU after the first call for a plan,
so that calls can be captured in CUDA graphs.

A NaN or an infinity makes the scale of all that share it NaN or infinite, hence every product with them NaN:
128 keys, one query or a channel of values, and with smoothing all keys of a head. Finding them would wait for
the GPU in every call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..plan.block_plan import BlockPlan
from . import key_slots as slots
from . import prologue as fused
from .precision import Precision
from .quantize import (
    SCALE_ROWS,
    operand_shapes,
    prologue_spec,
    smoothing_shift,
    unsupported_formats,
)


@dataclass(frozen=True, slots=True)
class Native:
    """Where an implementation's kernel for rounded operands is. width: of its key slots; None: least."""

    module: str
    forward: str
    unsupported: str
    width: int | None = None

    def load(self) -> ModuleType:
        return import_module(f".{self.module}", __package__)


NATIVE = {
    "gluon_sm90": Native("gluon_sm90_8bit", "forward", "unsupported", width=SCALE_ROWS),
    "triton": Native("triton_forward", "forward_quantized", "unsupported_quantized"),
}
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


# Answers of `unsupported`, by the tensor that identifies a plan: asking takes 0.1 ms of the host.
_answers: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def unsupported(
    impl: str, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, precision: Precision
) -> list[str]:
    """Every reason why `forward` cannot run; empty if it can."""
    training = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    question = (impl, precision, q.shape, k.shape, q.dtype, q.device, training)
    lists = plan.full.start, plan.partial.start
    answers: dict = _answers.setdefault(plan.full.offset, {})  # pyright: ignore
    known = answers.get(question)
    if known is None or any(a is not b for a, b in zip(known[0], lists, strict=True)):
        answers[question] = known = lists, _reasons(NATIVE[impl], q, k, v, plan, precision)
    return known[1].copy()


def _reasons(
    native: Native, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, precision: Precision
) -> list[str]:
    try:
        module = native.load()
    except ImportError as error:
        return [f"it does not import here: {error}"]
    reasons = [
        f"{what} is emulated only, by 'blocks', 'flex' and 'reference'"
        for what, asked in {
            "qk='model' with rounded values": precision.qk == "model",
            "smoothing of queries": precision.smooth_q,
            "a scale for blocks of queries": precision.q_scale == "block",
        }.items()
        if asked
    ]
    if not hasattr(module, native.forward):
        reasons.append("it has no forward for rounded operands")
    if q.dtype not in _DTYPES:
        reasons.append(f"dtype must be bfloat16, float16 or float32, got {q.dtype}")
    reasons += unsupported_formats(precision) + slots.unsupported(plan, _width(native, plan))
    if reasons:
        return reasons
    spec = _spec(native, precision)
    reasons += fused.unsupported(q, k, v, spec)
    moved = slots.key_slots(plan, _width(native, plan))
    shapes = operand_shapes(q, k, moved.plan.length_k, spec)
    found = _function(module, native.unsupported)(shapes, moved.plan)
    return list(dict.fromkeys(reasons + found))


def forward(
    impl: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    scale: float,
    return_lse: bool,
    precision: Precision,
) -> tuple[Tensor, Tensor | None]:
    """q (B, S_q, H, D), k and v (B, S_k, H_kv, D) -> out (B, S_q, H, D) in q's dtype, lse (B, H, S_q) fp32."""
    native = NATIVE[impl]
    module = native.load()
    if scale <= 0:  # kernels take the running maximum before scaling, which needs a positive scale
        q, scale = (-q, -scale) if scale else (torch.zeros_like(q), 1.0)
    v_mean = None
    if precision.smooth_v:
        v_mean = v.float().mean(1)  # [B, Hk, D]
        v = (v - v_mean[:, None]).to(v.dtype)
    moved = slots.key_slots(plan, _width(native, plan))
    x = fused.prologue(q, k, v, _spec(native, precision), key_order=moved.order)
    with_lse = return_lse or v_mean is not None
    out, lse = _function(module, native.forward)(x, moved.plan, scale, with_lse)
    if v_mean is not None:
        seen = (lse != -torch.inf).transpose(1, 2)[..., None]  # rows that see no key stay 0
        mean = v_mean.repeat_interleave(q.shape[2] // k.shape[2], 1)[:, None]
        out = out + torch.where(seen, mean, 0.0)
    if return_lse and x.k_mean is not None:
        lse = lse + smoothing_shift(q, x.k_mean, scale)
    return out.to(q.dtype), lse if return_lse else None


def _width(native: Native, plan: BlockPlan) -> int:
    return native.width or slots.slot_width(plan.block_k)


def _spec(native: Native, precision: Precision) -> fused.PrologueSpec:
    """Values in 16 bits stay tokens; in 8 bits they are transposed, as the kernel's registers want them."""
    layout = getattr(native.load(), "QUANTIZED_V_LAYOUT", "channels16")
    if precision.pv == "model":
        layout = "tokens"
    return prologue_spec(precision, v_layout=layout)


def _function(module: ModuleType, name: str) -> Callable:
    return getattr(module, name)

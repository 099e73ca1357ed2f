"""Gradients of q, k and v, dense and of windows: pairs of visited blocks a second, against cuDNN's on dense attention."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels.attention.api import block_sparse_attention, select_implementation
from ..kernels.plan.block_plan import BlockPlan
from ..kernels.plan.layout import TokenLayout
from ..kernels.plan.neighborhood import Dense, Neighborhood
from ..kernels.plan.planner import plan_attention
from .attention import visible_keys
from .cases import BASELINE, Case
from .peers import PEERS
from .table import Row
from .timing import time_in_turns

SAMPLED = 64  # queries, of the first head


def _case(
    name: str, grid: tuple[int, ...], heads: int, head_dim: int, spec: Dense | Neighborhood
) -> Case:
    return Case(name=f"gradients, {name}", layout=TokenLayout.joint(grids=[grid]), spec=spec, heads=heads,
                head_dim=head_dim, impls=())  # fmt: skip


# Dense ones first, with which the windows of the same head dim are compared.
CASES = (
    _case("16,896 tokens, 24 heads of 128, dense", (1, 16896), 24, 128, Dense()),
    _case("16,384 tokens, 32 heads of 64, dense", (1, 16384), 32, 64, Dense()),
    _case("FLUX 4K, window 80, stride 16", (256, 256), 6, 128, Neighborhood(window=80, stride=16)),
    _case("FLUX 4K, window 80", (256, 256), 6, 128, Neighborhood(window=80)),
    _case("Hunyuan, window 18x24x24, stride 16x8x8", (30, 48, 80), 3, 128,
          Neighborhood(window=(18, 24, 24), stride=(16, 8, 8))),
)  # fmt: skip


def gradient_rows(
    device: torch.device, seconds: float, cases: tuple[Case, ...] = CASES
) -> list[Row]:
    """The backward alone. Tokens lie in the order of the plan: as random numbers they have no other."""
    rows, dense = [], {}
    for case in cases:
        g = torch.Generator(device).manual_seed(0)
        shape = (1, case.layout.length, case.heads, case.head_dim)
        q, k, v, grad = (
            torch.randn(shape, device=device, generator=g).bfloat16() for _ in range(4)
        )
        impl = select_implementation(device, q.dtype, case.head_dim)[0]
        plan = plan_attention(
            case.layout, case.spec, head_dim=case.head_dim, device=device, impl=impl
        )
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        ours = _gradients(_attend(plan.blocks, *leaves), leaves, grad)
        error = _error(ours()[0], grad, q, k, v, _seen(case, plan.permutation))
        calls: dict[str, Callable[[], object]] = {"visionfuse": ours}
        if isinstance(case.spec, Dense):
            with torch.enable_grad():
                base = PEERS[BASELINE].make(case, *leaves)()
            calls = {BASELINE: _gradients(base, leaves, grad), **calls}
        times = time_in_turns(calls, device=device, seconds=seconds, turn=0.1)
        pairs = case.heads * case.layout.length**2
        for name, timing in times.items():
            row = Row(suite="neighborhood", case=case.name, impl=name, recipe="bf16", direction="backward",
                      ms=timing.ms, ms_p20=timing.ms_p20, ms_p80=timing.ms_p80, density=plan.density)  # fmt: skip
            share = 1.0 if name == BASELINE else plan.blocks.visited_density
            row.tflops_visited = 1e-9 * 10 * case.head_dim * pairs * share / timing.ms
            if name == BASELINE:
                dense[case.head_dim] = row.tflops_visited
                row.note = PEERS[BASELINE].note(device.type)
            else:
                row.baseline, row.speedup = BASELINE, row.tflops_visited / dense[case.head_dim]
                row.rel_l1 = error
                row.note = (
                    "speed-up: ratio of TFLOP/s to dense gradients; error of the gradient of q"
                )
            rows.append(row)
    return rows


def _attend(blocks: BlockPlan, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.enable_grad():
        out = block_sparse_attention(q, k, v, blocks)
    assert isinstance(out, Tensor)
    return out


def _gradients(out: Tensor, leaves: list[Tensor], grad: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def _seen(case: Case, order: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Positions in the plan's order -> the keys that these queries see, in that order."""
    if order is None:
        return lambda rows: visible_keys(case, rows)
    return lambda rows: visible_keys(case, order[rows])[:, order]


def _error(d_q: Tensor, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, seen: Callable) -> float:
    """Relative L1 error of the gradient of sampled queries, against float64."""
    rows = torch.linspace(0, q.shape[1] - 1, SAMPLED, device=q.device).long()
    exact_q = q[0, rows, 0].double().requires_grad_()
    with torch.enable_grad():
        scores = (exact_q @ k[0, :, 0].double().T) * q.shape[-1] ** -0.5
        out = scores.masked_fill(~seen(rows), -torch.inf).softmax(-1) @ v[0, :, 0].double()
        (exact,) = torch.autograd.grad(out, exact_q, grad[0, rows, 0].double())
    return float((d_q[0, rows, 0].double() - exact).abs().sum() / exact.abs().sum())

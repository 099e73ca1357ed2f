"""Rounded attention in plain torch: what a kernel computes with codes, computed with the numbers they stand for.

Queries, keys and values are rounded by `quantize`, weights here: so the error of a precision can be known
wherever torch runs, and in float64 this is the oracle of the kernels. It costs more than exact attention.
What it leaves out is the precision of sums: tensor cores of Hopper sum FP8 products of a block of keys with
14 bits, which the addition of blocks in fp32 keeps from growing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ..plan.block_plan import BlockPlan
from . import blocks, key_slots, quantize
from .bias import Bias, BlockBias
from .precision import SCALES, TILE, Precision

IMPLEMENTATIONS = ("reference", "blocks")
Weights = Callable[[Tensor], tuple[Tensor, Tensor]]
# log2 of the largest weight of "fp8", just under the 448 of e4m3, as in the kernels.
WEIGHT_LOG2 = 8.807
# Scores formed at once, to bound temporaries: 64 MB in fp32.
SCORES_AT_ONCE = 1 << 24
# Scores or sums of values that may be larger are formed in float64.
MOST_FLOAT32 = 1e37


def unsupported(
    impl: str, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, precision: Precision
) -> list[str]:
    """Every reason why `impl` cannot run this precision by emulation; empty if it can."""
    reasons = []
    if impl not in IMPLEMENTATIONS:
        reasons.append(f"precisions are emulated by {' and '.join(map(repr, IMPLEMENTATIONS))}")
    if q.device.type not in ("cpu", "cuda"):
        reasons.append(f"float8 and float64 have not been tried on {q.device.type!r}")
    if _shares_keys(precision):
        reasons += key_slots.unsupported(plan, key_slots.slot_width(plan.block_k))
    return reasons + blocks.unsupported(q, k, v, plan)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    scale: float,
    return_lse: bool,
    precision: Precision,
    *,
    dtype: torch.dtype = torch.float32,
    bias: Bias | None = None,
    weights: Weights | None = None,
    tiles: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """q (B, S_q, H, D), k and v (B, S_k, H_kv, D) -> out (B, S_q, H, D) in q's dtype, lse (B, H, S_q) fp32 or None.

    dtype: in which rounded numbers are multiplied, float32 or float64. weights: what rounds the weights,
    `weights_of` the precision by default. tiles: compute only these tiles of the plan; other rows are 0, their
    lse -inf.
    Raises ValueError for NaN and infinities, which would spread over everything that shares their scale.
    Finite inputs give finite outputs.
    """
    if not all(bool(x.isfinite().all()) for x in (q, k, v)):
        raise ValueError(
            f"q, k or v holds NaN or infinities, which precision={str(precision)!r} cannot represent. "
            "Use precision='model'."
        )
    if dtype == torch.float32 and _may_overflow(q, k, v, scale):
        dtype = torch.float64
    slots = key_slots.KeySlots(plan, None)
    if _shares_keys(precision):
        slots = key_slots.key_slots(plan, key_slots.slot_width(plan.block_k))
    x = quantize.rounded(q, k, v, plan, precision, slots.order)
    added = [] if bias is None else [slots.bias(bias)]
    if precision.smooth_q:
        keys = quantize.ordered(k.double() - x.k_mean, slots.order)
        added.append(BlockBias(quantize.mean_rows(x.q_mean, keys, scale).to(dtype)))
    operands = (
        x.q.to(dtype),
        x.k.to(dtype),
        (x.v + x.v_mean).to(dtype),
    )  # weights of a row add up to 1
    weights = weights or weights_of(precision, q.dtype)
    attend = partial(_attend, scale=scale, weights=weights)
    out, lse = _by_tile(*operands, slots.plan, added, attend, tiles)
    out = quantize.saturated(out, q.dtype)  # weighted means are no larger, their rounding could be
    if not return_lse:
        return out, None
    if precision.smooth_k:
        lse = lse + quantize.smoothing_shift(q, x.k_mean[:, 0].to(dtype), scale)
    return out, lse.float()


def _shares_keys(precision: Precision) -> bool:
    """Whether keys share scales by their place, which then is that in the entries of the plan."""
    if precision.qk == "model":
        return False
    return precision.k_scale == TILE or SCALES[precision.k_scale][1].tile not in (None, 1)


def _may_overflow(q: Tensor, k: Tensor, v: Tensor, scale: float) -> bool:
    """Nothing is lost where it says so in vain."""
    tops = [float(x.abs().amax()) if x.numel() else 0.0 for x in (q, k, v)]
    # Smoothing may double queries and keys, rounding adds a half at most.
    score = 9 * q.shape[-1] * max(abs(scale), 1.0) * tops[0] * tops[1]
    return max(score, 1000 * k.shape[1] * tops[2], *(9 * top for top in tops)) > MOST_FLOAT32


def exact_weights(p: Tensor) -> tuple[Tensor, Tensor]:
    """Weights up to 1, which may be overwritten -> (as they are multiplied, as they are summed), [..., keys] each."""
    return p, p


def weights_of(precision: Precision, dtype: torch.dtype) -> Weights:
    """How kernels round weights: as `exact_weights`, to the format of values, of which "model" is dtype.

    FP8 weights are summed as they are multiplied, as the Hopper kernel does; 16-bit ones before rounding.
    """
    if precision.pv == "fp8":
        top = 2.0**WEIGHT_LOG2

        def e4m3(p: Tensor) -> tuple[Tensor, Tensor]:
            p = p.copy_(p.mul_(top).to(torch.float8_e4m3fn)).div_(top)
            return p, p

        return e4m3
    half = torch.float16 if precision.pv == "fp16" else dtype
    if half.itemsize > 2:
        return exact_weights
    return lambda p: (p.to(half).to(p.dtype), p)


def _attend(q, k, v, added, *, scale: float, weights: Weights) -> tuple[Tensor, Tensor]:
    """q [B, H, M, D], k and v [B, H, N, D], what is added to scores, broadcast -> out [B, H, M, D], lse [B, H, M]."""
    scores = (q * scale) @ k.mT
    for x in added:
        scores += x
    top = scores.amax(-1, keepdim=True)
    p, counted = weights(scores.sub_(top.masked_fill(top == -torch.inf, 0.0)).exp_())
    total = counted.sum(-1, keepdim=True)
    out = p @ v / total.masked_fill(total == 0, 1.0)  # rows that see no key: 0, and -inf
    return out, (top + total.log())[..., 0]


def _by_tile(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, added: list[Bias], attend: Callable,
    tiles: Sequence[int] | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`attend` on the keys that every tile visits, heads in groups that bound the scores at once."""
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, S, D)
    group = q.shape[1] // k.shape[1]
    for variant, batch, heads in blocks._heads_by_variant(plan, q.shape[1]):
        every = torch.arange(q.shape[1], device=q.device)[heads]
        # Heads are gathered once: again for every tile, that was half of the time of a plan by head.
        own_q, own_k, own_v = q[batch][:, every], k[batch][:, every // group], v[batch][:, every // group]  # fmt: skip
        for tile in blocks._plan_tiles(plan, variant):
            if not tile.slices or (tiles is not None and tile.index not in tiles):
                continue
            keys = tile.keys(q.device)
            b_q, b_k, b_v = own_q[:, :, tile.q], own_k[:, :, keys], own_v[:, :, keys]
            mask = [blocks._mask(tile, plan, b_k.shape[2], q.dtype)] if tile.masked else []
            most = max(1, SCORES_AT_ONCE // (b_q.shape[0] * b_q.shape[2] * b_k.shape[2]))
            for first in range(0, len(every), most):
                part = slice(first, first + most)
                some = every[part]
                biases = [
                    blocks._part(b.block(tile.index, tile.q, keys), batch, some) for b in added
                ]
                o, e = attend(b_q[:, part], b_k[:, part], b_v[:, part], [*biases, *mask])
                out[batch, tile.q, some] = o.transpose(1, 2)
                lse[batch, some, tile.q] = e
    return out, lse

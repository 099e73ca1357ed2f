"""Rounded attention in plain torch: queries, keys and values as an 8-bit kernel reads them, dequantised.

`emulate` rounds the inputs with the prologue's own `reference`, turns the codes back into numbers and gives
them to an implementation that knows nothing of formats. So the quality of a precision can be judged wherever
torch runs, and `reference` with a precision is the oracle of the kernels that multiply codes. It costs more
than exact attention. What it leaves exact are the weights: kernels round those of pv="fp8" to e4m3 too, at
448 times their size and relative to the running maximum of their row, so that tests add half a step of e4m3
(1/16) of every weight to their budget.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ..plan.block_plan import BlockPlan
from . import key_slots as slots
from .precision import Precision
from .prologue import FORMATS, Operands, PrologueSpec, dequantized, reference

SCALE_ROWS = 128  # tokens that share a scale of "block"


def prologue_spec(precision: Precision, *, v_layout: str = "tokens") -> PrologueSpec:
    """What the prologue is asked for; smoothing of queries and values is done around it."""
    rounded = precision.qk != "model"
    return PrologueSpec(
        qk=precision.qk if rounded else "same",
        q_rows=SCALE_ROWS if precision.q_scale == "block" else 1,
        k_rows=SCALE_ROWS if rounded and precision.k_scale == "block" else 1,
        v="same" if precision.pv == "model" else precision.pv,
        v_layout=v_layout,
        smooth_k=bool(precision.smooth_k),
    )


def unsupported_formats(precision: Precision) -> list[str]:
    """Formats that the prologue does not write."""
    return [
        f"the prologue does not write {format!r}"
        for format in {precision.qk, precision.pv}
        if format != "model" and format not in FORMATS
    ]


def unsupported(
    module: ModuleType, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, precision: Precision
) -> list[str]:
    """Every reason why `emulate` cannot run with this implementation; empty if it can."""
    reasons = unsupported_formats(precision)
    if q.device.type not in ("cpu", "cuda"):
        reasons.append(f"float8 has not been tried on {q.device.type!r}")
    if precision.k_scale == "block":
        reasons += slots.unsupported(plan, slots.slot_width(plan.block_k))
    return reasons + module.unsupported(q, k, v, plan)


def emulate(
    module: ModuleType,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    scale: float,
    return_lse: bool,
    precision: Precision,
    *,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor | None]:
    """`module.forward` of the rounded inputs, computed in `dtype`; arguments and results as there.

    Raises ValueError for NaN and infinities, which would spread over everything that shares their scale.
    """
    if not all(bool(x.isfinite().all()) for x in (q, k, v)):
        raise ValueError(
            f"q, k or v holds NaN or infinities, which precision={str(precision)!r} cannot represent. "
            "Use precision='model'."
        )
    moved = slots.KeySlots(plan, None)
    if precision.k_scale == "block":
        moved = slots.key_slots(plan, slots.slot_width(plan.block_k))
    q, k, v, out_dtype = q.to(dtype), k.to(dtype), v.to(dtype), q.dtype
    q_mean = tile_mean(q, plan) if precision.smooth_q else torch.zeros((), dtype=dtype)
    v_mean = v.mean(1, keepdim=True) if precision.smooth_v else torch.zeros((), dtype=dtype)
    spec = prologue_spec(precision)
    # Values lose their mean before the prologue, which reads the model's format.
    smooth_v = (v - v_mean).to(out_dtype).to(dtype)
    x = reference(q - q_mean, k, smooth_v, spec, key_order=moved.order)
    rounded_q, rounded_k, rounded_v = (y.to(dtype) for y in dequantized(x, spec))
    rounded_v = rounded_v + v_mean  # weights of a row add up to 1
    head_dim = q.shape[-1]
    if precision.smooth_q:
        # q k = (q - q_mean) k + q_mean k, the second product of keys that are not rounded: a head of twice
        # the size has both.
        smoothed = reference(q, k, v, PrologueSpec(smooth_k=spec.smooth_k), key_order=moved.order).k
        rounded_q = torch.cat([rounded_q, q_mean], -1)
        rounded_k = torch.cat([rounded_k, smoothed], -1)
        rounded_v = torch.cat([rounded_v, torch.zeros_like(rounded_v)], -1)
    out, lse = module.forward(rounded_q, rounded_k, rounded_v, moved.plan, scale, return_lse)
    if lse is not None and x.k_mean is not None:
        lse = lse + smoothing_shift(q, x.k_mean, scale)
    return out[..., :head_dim].to(out_dtype).contiguous(), lse


def smoothing_shift(q: Tensor, k_mean: Tensor, scale: float) -> Tensor:
    """What the log-sum-exp lacks after keys lost their mean: scale * (q . k_mean), fp32 [B, H, Sq].

    q [B, Sq, H, D], k_mean [B, Hk, D].
    """
    mean = k_mean.repeat_interleave(q.shape[2] // k_mean.shape[1], 1)[..., None]  # [B, H, D, 1]
    return (scale * (q.to(mean.dtype).transpose(1, 2) @ mean))[..., 0].float()


def tile_mean(q: Tensor, plan: BlockPlan) -> Tensor:
    """The mean of the queries of every token's tile, [B, Sq, H, D]; 0 for tokens in no tile."""
    tile = torch.repeat_interleave(
        torch.arange(plan.tiles, device=plan.device), plan.q_count.long()
    )
    first = plan.q_count.long().cumsum(0) - plan.q_count
    token = torch.arange(tile.numel(), device=plan.device) + (plan.q_start - first)[tile]
    total = q.new_zeros(q.shape[0], plan.tiles, *q.shape[2:]).index_add_(1, tile, q[:, token])
    mean = total / plan.q_count.clamp(min=1)[:, None, None]
    return torch.zeros_like(q).index_copy_(1, token, mean[:, tile])


def operand_shapes(q: Tensor, k: Tensor, length_k: int, spec: PrologueSpec) -> Operands:
    """Operands of the right shapes, dtypes and device, each one element long: what can be asked before any
    is made."""
    batch, length_q, heads, dim = q.shape
    kv_heads = k.shape[2]

    def like(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(1, dtype=dtype, device=q.device).expand(shape)

    code = FORMATS[spec.qk][0] if spec.qk in FORMATS else q.dtype
    v = (batch, length_k, kv_heads, dim)
    if spec.v_layout != "tokens":
        v = (batch, kv_heads, dim, -(-length_k // spec.v_padding) * spec.v_padding)
    f32, scaled = torch.float32, spec.qk in FORMATS
    return Operands(
        q=like(code, batch, length_q, heads, dim),
        k=like(code, batch, length_k, kv_heads, dim),
        v=like(FORMATS[spec.v][0] if spec.v in FORMATS else q.dtype, *v),
        q_scale=like(f32, batch, heads, -(-length_q // spec.q_rows)) if scaled else None,
        k_scale=like(f32, batch, kv_heads, -(-length_k // spec.k_rows)) if scaled else None,
        v_scale=like(f32, batch, kv_heads, dim) if spec.v in FORMATS else None,
        k_mean=like(f32, batch, kv_heads, dim) if spec.smooth_k else None,
    )

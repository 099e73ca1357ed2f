"""Block-sparse attention with quantised operands, forward, for Hopper: an entry point of `kernel`.

Operands come from the prologue, as `prologue.EIGHT_BIT` says: "fp8" is e4m3 throughout, "int8_fp8" has
queries and keys in int8 and weights and values in e4m3, as in SageAttention2 (Zhang et al., arXiv
2411.10958). Keys have a scale for every 128 of them, four for these, one for each or one for all of a head. Values may also stay in 16 bits, in rows
of tokens and without scales.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...plan.block_plan import BlockPlan
from ..bias import BlockBias
from ..prologue import K_GROUPS, SWAPPED, Operands
from .host import BLOCK_K, ROW_STEP, Scales, entries_start_at, launch, reasons_against

MAX_8BIT_VALUES_DIM = 128  # at 256 the two accumulators do not fit into registers
SWAPPED_TOKENS = len(SWAPPED)
_HALVES = (torch.bfloat16, torch.float16)


def unsupported(x: Operands, plan: BlockPlan) -> list[str]:
    """Every reason why `forward` cannot run on these operands; empty if it can."""
    q, k, v = x.q, x.k, x.v
    if x.q_scale is None or x.k_scale is None:
        return [
            "queries and keys have no scales; make them with qk='int8' or 'fp8' in the prologue"
        ]
    reasons = reasons_against(q, plan)
    if q.dtype not in (torch.int8, torch.float8_e4m3fn) or k.dtype != q.dtype:
        reasons.append(
            f"queries and keys must both be int8 or both float8_e4m3fn, got {q.dtype} and {k.dtype}"
        )
    if (v.dtype != torch.float8_e4m3fn) if x.v_scale is not None else (v.dtype not in _HALVES):
        reasons.append(
            "values must be float8_e4m3fn with a scale, or bfloat16 or float16 without, got "
            f"{v.dtype} with{'out' * (x.v_scale is None)} a scale"
        )
    if v.element_size() == 1 and q.shape[-1] > MAX_8BIT_VALUES_DIM:
        reasons.append(
            f"the head dim of 8-bit values must be at most {MAX_8BIT_VALUES_DIM}, got {q.shape[-1]}"
        )
    if q.shape[2] % k.shape[2]:
        reasons.append(f"{q.shape[2]} query heads do not divide into {k.shape[2]} key heads")
    reasons += [
        f"{name} must be {shape}, got {tuple(tensor.shape)}"
        for name, tensor, shape in _expected_shapes(x, plan)
        if tuple(tensor.shape) != shape
    ]
    if x.k_scale.shape[2:] in ((plan.length_k,), (1,)):
        step = ROW_STEP if x.v_scale is None else SWAPPED_TOKENS
        if not entries_start_at(plan, step):
            why = (
                "TMA reads no rows of scales" if x.v_scale is None else "values have another order"
            )
            reasons.append(
                f"key blocks of the plan must start at multiples of {step}, inside which {why}"
            )
    elif not entries_start_at(plan, BLOCK_K):
        reasons.append(
            f"key blocks of the plan must start at multiples of {BLOCK_K}, where blocks of key scales do"
        )
    return reasons


def forward(
    x: Operands, plan: BlockPlan, scale: float, return_lse: bool, bias: BlockBias | None = None,
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """softmax(scale * q k^T + bias, over the pairs that the plan makes visible) v, of quantised q, k, v.

    Returns out [B, Sq, H, D], in the dtype of 16-bit values and bf16 with 8-bit ones, and, if asked
    for, the natural log-sum-exp, fp32 [B, H, Sq]. The scale must be positive. order: int64 [Sq], the row of
    both of every query, its own if None.
    """
    if not scale > 0:
        raise ValueError(f"The scale must be positive, got {scale}; negate the queries instead.")
    batch, length, heads, head_dim = x.q.shape
    dtype = x.v.dtype if x.v.dtype in _HALVES else torch.bfloat16
    out = x.q.new_empty(batch, length, heads, head_dim, dtype=dtype)
    lse = x.q.new_empty(batch, heads, length, dtype=torch.float32) if return_lse else None
    if out.numel():
        scales = (
            s if s is None else s.contiguous() for s in (x.q_scale, x.k_scale, x.v_scale, x.v_mean)
        )
        rows = None if bias is None else bias.rows
        launch(x.q, x.k, x.v, Scales(*scales), plan, scale, out, lse, rows, order)
    return out, lse


def _expected_shapes(x: Operands, plan: BlockPlan):
    batch, _, heads, dim = x.q.shape
    kv_heads, blocks = x.k.shape[2], -(-plan.length_k // BLOCK_K)
    of_keys = tuple(x.k_scale.shape[2:])
    if of_keys not in ((plan.length_k,), (blocks, K_GROUPS), (1,)):
        of_keys = (blocks,)
    yield "q", x.q, (batch, plan.length_q, heads, dim)
    yield "k", x.k, (batch, plan.length_k, kv_heads, dim)
    yield "q_scale", x.q_scale, (batch, heads, plan.length_q)
    yield "k_scale", x.k_scale, (batch, kv_heads, *of_keys)
    if x.v_scale is None:
        yield "v", x.v, (batch, plan.length_k, kv_heads, dim)
    else:
        yield "v", x.v, (batch, kv_heads, dim, blocks * BLOCK_K)
        yield "v_scale", x.v_scale, (batch, kv_heads, dim)
        if x.v_mean is not None:
            yield "v_mean", x.v_mean, (batch, kv_heads, dim)

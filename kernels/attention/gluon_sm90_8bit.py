"""Block-sparse attention with 8-bit operands, forward, for Hopper: the host side of `gluon_sm90_8bit_kernel`.

Plans, the dealing of tiles and masks are those of `gluon_sm90`; operands come from the prologue, as
`prologue.EIGHT_BIT` says: "fp8" is e4m3 throughout, "int8_fp8" has queries and keys in int8 and weights and
values in e4m3, as in SageAttention2 (Zhang et al., arXiv 2411.10958).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..plan.block_plan import BitMask, BlockPlan
from .gluon_sm90 import (
    _REGISTERS,
    BLOCK_K,
    MAX_GROUPS,
    ROWS,
    _boxes,
    _column_rows,
    _deal,
    _no_mask,
    _row_boxes,
    _run_bias,
    _token_boxes,
)
from .gluon_sm90_8bit_kernel import forward_kernel
from .prepared import prepare
from .prologue import Operands

# Blocks of keys and values in flight, by head dim: 980 TFLOP/s at 128 with 3, 631 at 64 with 4 (H200).
STAGES = {128: 3, 64: 4}


def unsupported(x: Operands, plan: BlockPlan) -> list[str]:
    """Every reason why `forward` cannot run on these operands; empty if it can."""
    q, k, v = x.q, x.k, x.v
    reasons = []
    if any(scale is None for scale in (x.q_scale, x.k_scale, x.v_scale)):
        return ["the operands have no scales; make them with a spec of prologue.EIGHT_BIT"]
    if q.device.type != "cuda":
        reasons.append(f"it needs a Hopper GPU, the tensors are on {q.device}")
    elif torch.version.hip or torch.cuda.get_device_capability(q.device)[0] != 9:
        reasons.append(f"it needs a Hopper GPU, this is a {torch.cuda.get_device_name(q.device)}")
    if (
        q.dtype not in (torch.int8, torch.float8_e4m3fn)
        or k.dtype != q.dtype
        or v.dtype != torch.float8_e4m3fn
    ):
        reasons.append(
            "queries and keys must both be int8 or both float8_e4m3fn and values float8_e4m3fn, got "
            f"{q.dtype}, {k.dtype}, {v.dtype}"
        )
    if q.shape[-1] not in (64, 128):
        reasons.append(f"the head dim must be 64 or 128, got {q.shape[-1]}")
    if q.shape[2] % k.shape[2]:
        reasons.append(f"{q.shape[2]} query heads do not divide into {k.shape[2]} key heads")
    reasons += [
        f"{name} must be {shape}, got {tuple(tensor.shape)}"
        for name, tensor, shape in _expected_shapes(x, plan)
        if tuple(tensor.shape) != shape
    ]
    if plan.block_q > MAX_GROUPS * ROWS or plan.block_k > BLOCK_K:
        reasons.append(
            f"plan blocks may have at most {MAX_GROUPS * ROWS} queries and {BLOCK_K} keys, got "
            f"{plan.block_q} x {plan.block_k}"
        )
    if isinstance(plan.mask, BitMask):
        reasons.append("masks of single bits are not implemented, only intervals")
    if not _aligned(plan):
        reasons.append(
            f"key blocks of the plan must start at multiples of {BLOCK_K}, where blocks of key scales do"
        )
    return reasons


def forward(
    x: Operands, plan: BlockPlan, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """softmax(scale * q k^T, over the pairs that the plan makes visible) v, of quantised q, k, v.

    Returns out, bf16 [B, Sq, H, D], and, if asked for, the natural log-sum-exp, fp32 [B, H, Sq].
    The scale must be positive.
    """
    if not scale > 0:
        raise ValueError(f"The scale must be positive, got {scale}; negate the queries instead.")
    batch, length, heads, head_dim = x.q.shape
    out = x.q.new_empty(batch, length, heads, head_dim, dtype=torch.bfloat16)
    lse = x.q.new_empty(batch, heads, length, dtype=torch.float32) if return_lse else None
    if not out.numel():
        return out, lse
    ready = prepare(plan, width=BLOCK_K)
    programs = torch.cuda.get_device_properties(x.q.device).multi_processor_count
    work_offset, work = _deal(plan, batch, heads, programs)
    mask = ready.mask or _no_mask(plan)
    coordinates, row = _column_rows(plan, mask)
    whole_end = ready.whole_end if ready.whole_end is not None else plan.full.offset
    groups = 3 if plan.block_q > 2 * ROWS else 2
    entry, consumer, producer = _REGISTERS[groups]
    with torch.cuda.device_of(x.q):
        forward_kernel[(programs,)](
            _token_boxes(x.q, ROWS), _token_boxes(x.k, BLOCK_K),
            _boxes(x.v.contiguous(), (1, 1, head_dim, BLOCK_K)),
            _row_boxes(coordinates), _row_boxes(_run_bias(x.q.device)),
            x.q_scale.contiguous(), x.k_scale.contiguous(), x.v_scale.contiguous(),
            out, x.q_scale if lse is None else lse, work_offset, work, plan.q_start, plan.q_count,
            plan.full.offset, whole_end, ready.full_start, ready.full_count,
            plan.partial.offset, plan.partial.start, row,
            mask.lo, mask.hi, mask.guard, row if mask.table is None else mask.table,
            length, heads, heads // x.k.shape[2], plan.tiles, plan.variants, x.k_scale.shape[2],
            scale / math.log(2.0),
            D=head_dim, BM=ROWS, BN=BLOCK_K, GROUPS=groups, STAGES=STAGES[head_dim],
            WORDS=ready.words, TABLES=mask.table is not None,
            RAGGED=ready.whole_end is not None, LSE=return_lse,
            REGISTERS=consumer, PRODUCER_REGISTERS=producer, num_warps=4, maxnreg=entry,
        )  # fmt: skip
    return out, lse


def _expected_shapes(x: Operands, plan: BlockPlan):
    batch, _, heads, dim = x.q.shape
    kv_heads, blocks = x.k.shape[2], -(-plan.length_k // BLOCK_K)
    yield "q", x.q, (batch, plan.length_q, heads, dim)
    yield "k", x.k, (batch, plan.length_k, kv_heads, dim)
    yield "v", x.v, (batch, kv_heads, dim, blocks * BLOCK_K)
    yield "q_scale", x.q_scale, (batch, heads, plan.length_q)
    yield "k_scale", x.k_scale, (batch, kv_heads, blocks)
    yield "v_scale", x.v_scale, (batch, kv_heads, dim)


# Whether entries start where blocks of key scales do, by the tensor that identifies a plan.
_starts: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _aligned(plan: BlockPlan) -> bool:
    """The first call for a plan waits for the device, once."""
    if plan.full.offset not in _starts:
        starts = torch.cat([plan.full.start, plan.partial.start])
        _starts[plan.full.offset] = not bool((starts % BLOCK_K).any())
    return _starts[plan.full.offset]

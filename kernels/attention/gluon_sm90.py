"""Block-sparse attention, forward, for Hopper (sm_90a): the host side of `gluon_sm90_kernel`.

It lists what the kernel cannot do, prepares a plan once (column rows for masked entries, the dealing of
tiles to programs), describes the tensors to the tensor memory accelerator (TMA) and launches.
"""

from __future__ import annotations

import heapq
import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..plan.block_plan import BitMask, BlockPlan
from .gluon_sm90_kernel import forward_kernel
from .prepared import PackedIntervals, prepare

ROWS = 64  # queries of a warpgroup, the M of wgmma
BLOCK_K = 128
MAX_GROUPS = 3  # consumer warpgroups
_TYPES = {
    torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.int32: gl.int32,
    torch.float8_e4m3fn: gl.float8e4nv, torch.int8: gl.int8,
}  # fmt: skip
# By number of consumer warpgroups: registers of every thread at entry, and of consumers and producers
# after setmaxnreg has moved them: 3 * 160 + 24 <= 4 * 128, 2 * 240 + 24 <= 3 * 168.
_REGISTERS = {2: (168, 240, 24), 3: (128, 160, 24)}
# What a block may use, less 256 bytes for barriers.
_SHARED_BYTES = 227 * 1024 - 256
# A tile's query load and epilogue take about as long as this many key blocks.
_TILE_OVERHEAD = 2


def unsupported(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> list[str]:
    """Every reason why `forward` cannot run on these inputs; empty if it can."""
    reasons = []
    if q.device.type != "cuda":
        reasons.append(f"it needs a Hopper GPU, the tensors are on {q.device}")
    elif torch.version.hip or torch.cuda.get_device_capability(q.device)[0] != 9:
        reasons.append(f"it needs a Hopper GPU, this is a {torch.cuda.get_device_name(q.device)}")
    if q.dtype not in (torch.bfloat16, torch.float16):
        reasons.append(f"dtype must be bfloat16 or float16, got {q.dtype}")
    if q.shape[-1] not in (64, 128):
        reasons.append(f"the head dim must be 64 or 128, got {q.shape[-1]}")
    if plan.block_q > MAX_GROUPS * ROWS or plan.block_k > BLOCK_K:
        reasons.append(
            f"plan blocks may have at most {MAX_GROUPS * ROWS} queries and {BLOCK_K} keys, got "
            f"{plan.block_q} x {plan.block_k}"
        )
    if isinstance(plan.mask, BitMask):
        reasons.append("masks of single bits are not implemented, only intervals")
    return reasons


def forward(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """softmax(scale * q k^T, over the pairs that the plan makes visible) v.

    q: [B, Sq, H, D]; k, v: [B, Sk, Hk, D] with Hk a divisor of H; fp16 or bf16, D 64 or 128.
    Strides of 16 bytes and contiguous rows are read in place, others are copied. Returns out
    [B, Sq, H, D] and, if asked for, the natural log-sum-exp, fp32 [B, H, Sq].
    """
    batch, length, heads, head_dim = q.shape
    if scale <= 0:  # the running maximum is taken before scaling, which needs a positive scale
        q, scale = (-q, -scale) if scale else (torch.zeros_like(q), 1.0)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(batch, heads, length, dtype=torch.float32) if return_lse else None
    if not out.numel():
        return out, lse
    ready = prepare(plan, width=BLOCK_K)
    programs = torch.cuda.get_device_properties(q.device).multi_processor_count
    work_offset, work = _deal(plan, batch, heads, programs)
    mask = ready.mask or _no_mask(plan)
    coordinates, row = _column_rows(plan, mask)
    whole_end = ready.whole_end if ready.whole_end is not None else plan.full.offset
    groups = 3 if plan.block_q > 2 * ROWS else 2
    entry, consumer, producer = _REGISTERS[groups]
    with torch.cuda.device_of(q):
        forward_kernel[(programs,)](
            _token_boxes(q, ROWS), _token_boxes(k, BLOCK_K), _token_boxes(v, BLOCK_K),
            _row_boxes(coordinates), _row_boxes(_run_bias(q.device)),
            out, out if lse is None else lse, work_offset, work, plan.q_start, plan.q_count,
            plan.full.offset, whole_end, ready.full_start, ready.full_count,
            plan.partial.offset, plan.partial.start, row,
            mask.lo, mask.hi, mask.guard, row if mask.table is None else mask.table,
            length, heads, heads // k.shape[2], plan.tiles, plan.variants, scale / math.log(2.0),
            D=head_dim, BM=ROWS, BN=BLOCK_K, GROUPS=groups, STAGES=stages(head_dim, groups, ready.words),
            WORDS=ready.words, TABLES=mask.table is not None,
            RAGGED=ready.whole_end is not None, LSE=return_lse,
            REGISTERS=consumer, PRODUCER_REGISTERS=producer, num_warps=4, maxnreg=entry,
        )  # fmt: skip
    return out, lse


def stages(head_dim: int, groups: int, words: int) -> int:
    """Blocks of keys and values in flight: what shared memory holds beside the queries, at most 3."""
    queries = groups * ROWS * head_dim * 2
    block = 2 * BLOCK_K * head_dim * 2 + 4 * BLOCK_K * max(words, 1)
    return min(3, (_SHARED_BYTES - queries) // block)


def _token_boxes(x: Tensor, rows: int) -> TensorDescriptor:
    """TMA view [B, H, S, D] of x [B, S, H, D], in boxes of `rows` tokens of one head."""
    aligned = x.data_ptr() % 16 == 0 and all(s * x.element_size() % 16 == 0 for s in x.stride()[:3])
    view = (x if x.stride(-1) == 1 and aligned else x.contiguous()).transpose(1, 2)
    return _boxes(view, (1, 1, rows, x.shape[-1]))


def _row_boxes(x: Tensor) -> TensorDescriptor:
    """TMA view of int32 rows [n, BLOCK_K]."""
    return _boxes(x, (1, BLOCK_K))


def _boxes(x: Tensor, block: tuple[int, ...]) -> TensorDescriptor:
    return TensorDescriptor(
        x, list(x.shape), list(x.stride()), list(block), _shared_layout(block, x.dtype)
    )


@lru_cache(maxsize=64)
def _shared_layout(block: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(block), _TYPES[dtype])


def _no_mask(plan: BlockPlan) -> PackedIntervals:
    none = plan.full.offset
    return PackedIntervals(none, none, none, None, none, plan.length_q, plan.length_k)


@lru_cache(maxsize=8)
def _run_bias(device: torch.device) -> Tensor:
    """Row n: float32 bits of 0 for the first n columns and of -inf past them, int32 [BLOCK_K + 1, BLOCK_K]."""
    column = torch.arange(BLOCK_K, device=device)
    inside = column < torch.arange(BLOCK_K + 1, device=device)[:, None]
    bias = torch.where(inside, 0.0, -torch.inf)
    return bias.view(torch.int32)


# What is derived from a plan once, by the tensor that identifies it (a compiled call makes new plans).
_rows: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_dealt: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _column_rows(plan: BlockPlan, mask: PackedIntervals) -> tuple[Tensor, Tensor]:
    """Packed coordinates of the columns of partial entries, as rows that TMA can fetch.

    int32 [runs * words, BLOCK_K], columns past a run outside every interval, and the run of every
    partial entry, int32 [n]. Entries of different tiles share the rows of a run.
    """
    if plan.partial.offset not in _rows:
        if not plan.partial.start.numel():
            none = torch.zeros(1, BLOCK_K, dtype=torch.int32, device=plan.device)
            _rows[plan.partial.offset] = none, none[0]
        else:
            both = torch.stack([plan.partial.start, plan.partial.count])
            (start, count), run = torch.unique(both, dim=1, return_inverse=True)
            column = torch.arange(BLOCK_K, device=plan.device)
            key = torch.where(
                column < count[:, None], start[:, None] + column, plan.length_k
            )  # [runs, BN]
            rows = mask.coord[:, key].transpose(0, 1).reshape(-1, BLOCK_K).contiguous()
            _rows[plan.partial.offset] = rows, run.int()
    return _rows[plan.partial.offset]


def _deal(plan: BlockPlan, batch: int, heads: int, programs: int) -> tuple[Tensor, Tensor]:
    """Deal (batch, head, tile) to programs: int32 offsets [programs + 1] and items [n].

    Long tiles first, the rest in order (neighbours share keys in the L2 cache), each to the program
    with the least work so far. Static, hence deterministic and safe in CUDA graphs. An item is
    ((b * heads + h) * variants + variant) * tiles + tile.
    """
    dealt = _dealt.setdefault(plan.q_start, {})
    key = (batch, heads, programs)
    if key not in dealt:
        entries = plan.full.offset.diff() + plan.partial.offset.diff()
        cost = (entries + _TILE_OVERHEAD).tolist()
        table = [[0]] if plan.variant is None else plan.variant.tolist()
        items = []
        for bh in range(batch * heads):
            row = table[bh // heads % len(table)]
            variant = row[bh % heads % len(row)]
            base = variant * plan.tiles
            items += [(cost[base + t], (bh * plan.variants * plan.tiles) + base + t)
                      for t in range(plan.tiles)]  # fmt: skip
        mean = sum(c for c, _ in items) / len(items)
        items.sort(key=lambda item: -item[0] if item[0] > 2 * mean else 0)
        piles: list[list[int]] = [[] for _ in range(programs)]
        heap = [(0, p) for p in range(programs)]
        for c, item in items:
            load, p = heap[0]
            piles[p].append(item)
            heapq.heapreplace(heap, (load + c, p))
        offset = [0]
        for pile in piles:
            offset.append(offset[-1] + len(pile))
        flat = [item for pile in piles for item in pile]
        dealt[key] = tuple(
            torch.tensor(x, dtype=torch.int32, device=plan.device) for x in (offset, flat)
        )
    return dealt[key]

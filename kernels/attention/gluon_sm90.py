"""Block-sparse attention, forward, for Hopper (sm_90a): warp-specialised Gluon.

One persistent program a multiprocessor: a producer warp brings queries, keys and values through the
tensor memory accelerator (TMA) into a ring of shared buffers, two or three consumer warpgroups of 64
queries each multiply them (wgmma) and run the online softmax of FlashAttention (Dao, arXiv 2307.08691) while
their neighbours keep the tensor cores busy, as FlashAttention-3 does (Shah et al., arXiv 2407.08608).

A tile walks its masked entries first, so the loop over whole blocks has no mask at all. Entries start
at any token: a TMA box may, and columns past an entry's count are masked. Work is dealt to programs
longest first when the plan is prepared, because text queries see everything and image queries do not.
"""

from __future__ import annotations

import heapq
import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..plan.block_plan import BitMask, BlockPlan
from .prepared import PackedIntervals, prepare

ROWS = 64  # queries of a warpgroup, the M of wgmma
BLOCK_K = 128
MAX_GROUPS = 3  # consumer warpgroups
_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.int32: gl.int32}
# By number of consumer warpgroups: registers of every thread at entry, and of consumers and producers
# after setmaxnreg has moved them: 3 * 160 + 24 <= 4 * 128, 2 * 240 + 24 <= 3 * 168.
_REGISTERS = {2: (168, 240, 24), 3: (128, 160, 24)}
# What a block may use, less 256 bytes for barriers.
_SHARED_BYTES = 227 * 1024 - 256
# A tile's query load and epilogue take about as long as this many key blocks.
_TILE_OVERHEAD = 2
_LN2: gl.constexpr = gl.constexpr(math.log(2.0))


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
        _kernel[(programs,)](
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
    return gl.NVMMASharedLayout.get_default_for(list(block), _DTYPES[dtype])


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


@gluon.jit
def _locate(item, heads, tiles, variants):
    """Batch, head, list row and tile of a work item."""
    bh = item // (tiles * variants)
    row = item % (tiles * variants)
    return bh // heads, bh % heads, row, row % tiles


@gluon.jit
def _fetch(start, b, h, it, k_desc, v_desc, c_desc, c_row, ring, STAGES: gl.constexpr,
           ROWS: gl.constexpr):  # fmt: skip
    """Bring one block of keys and values, and ROWS rows about its columns, into the ring."""
    k_buffer, v_buffer, c_buffer, k_full, k_empty, v_full, v_empty = ring
    stage = it % STAGES
    phase = ((it // STAGES) & 1) ^ 1
    mbarrier.wait(k_empty.index(stage), phase)
    mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes + ROWS * c_desc.block_type.nbytes)
    for w in gl.static_range(ROWS):
        tma.async_copy_global_to_shared(
            c_desc, [c_row + w, 0], k_full.index(stage), c_buffer.index(w * STAGES + stage)
        )
    tma.async_copy_global_to_shared(
        k_desc, [b, h, start, 0], k_full.index(stage), k_buffer.index(stage)
    )
    mbarrier.wait(v_empty.index(stage), phase)
    mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(
        v_desc, [b, h, start, 0], v_full.index(stage), v_buffer.index(stage)
    )


@gluon.jit
def _producer(
    shared, D: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, GROUPS: gl.constexpr,
    STAGES: gl.constexpr, WORDS: gl.constexpr, TABLES: gl.constexpr, RAGGED: gl.constexpr,
    LSE: gl.constexpr,
):  # fmt: skip
    descriptors, queries, ring, lists, mask, sizes, outputs = shared
    q_desc, k_desc, v_desc, coord_desc, run_desc = descriptors
    q_buffer, q_full, q_empty = queries
    p_work_offset, p_work, p_q_start, p_q_count, p_full, p_whole_end, p_full_start, p_full_count, \
        p_partial, p_partial_start, p_partial_row = lists  # fmt: skip
    length_q, heads, group, tiles, variants, scale_log2 = sizes
    it = 0
    turn = 0
    pid = gl.program_id(0)
    for w in range(gl.load(p_work_offset + pid), gl.load(p_work_offset + pid + 1)):
        b, h, row, tile = _locate(gl.load(p_work + w), heads, tiles, variants)
        q_start = gl.load(p_q_start + tile)
        for g in gl.static_range(GROUPS):
            mbarrier.wait(q_empty.index(g), (turn & 1) ^ 1)
            mbarrier.expect(q_full.index(g), q_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(
                q_desc, [b, h, q_start + g * BM, 0], q_full.index(g), q_buffer.index(g)
            )
        turn += 1
        hk = h // group
        if WORDS > 0:
            for e in range(gl.load(p_partial + row), gl.load(p_partial + row + 1)):
                _fetch(gl.load(p_partial_start + e), b, hk, it, k_desc, v_desc, coord_desc,
                       gl.load(p_partial_row + e) * WORDS, ring, STAGES, WORDS)  # fmt: skip
                it += 1
        first = gl.load(p_full + row)
        last = gl.load(p_full + row + 1)
        if RAGGED:
            whole_end = gl.load(p_whole_end + row)
            for e in range(whole_end, last):
                _fetch(gl.load(p_full_start + e), b, hk, it, k_desc, v_desc, run_desc,
                       gl.load(p_full_count + e), ring, STAGES, 1)  # fmt: skip
                it += 1
            last = whole_end
        for e in range(first, last):
            _fetch(gl.load(p_full_start + e), b, hk, it, k_desc, v_desc, run_desc, 0, ring,
                   STAGES, 0)  # fmt: skip
            it += 1


# Mask policies: what hides scores s [BM, BN] of an entry, given rows about its columns in shared memory.


@gluon.jit
def _hide_run(s, rows, stage, bounds, mask, e, o_q, length_q, STAGES: gl.constexpr,
              WORDS: gl.constexpr, TABLES: gl.constexpr, LS: gl.constexpr,
              BN: gl.constexpr):  # fmt: skip
    """Ragged full entries: the row holds 0 for columns of the run and -inf past it."""
    b_bias = rows.index(stage).reshape([BN]).load(gl.SliceLayout(0, LS))
    return s + b_bias.to(gl.float32, bitcast=True)[None, :]


@gluon.jit
def _bounds(mask, table, word, o_q, length_q, WORDS: gl.constexpr):
    """Packed lo and hi of the queries, [BM] each, and the guard bits, as `prepared.py` explains."""
    p_lo, p_hi, p_guard, p_table = mask
    o = (table * WORDS + word) * length_q + o_q
    return gl.load(p_lo + o), gl.load(p_hi + o), gl.load(p_guard + word)


@gluon.jit
def _hide_interval(s, rows, stage, bounds, mask, e, o_q, length_q, STAGES: gl.constexpr,
                   WORDS: gl.constexpr, TABLES: gl.constexpr, LS: gl.constexpr,
                   BN: gl.constexpr):  # fmt: skip
    """lo <= coord < hi on all axes of all words."""
    p_lo, p_hi, p_guard, p_table = mask
    table = 0
    if TABLES:
        table = gl.load(p_table + e)
    for w in gl.static_range(WORDS):
        if TABLES or w > 0:
            b_lo, b_hi, guard = _bounds(mask, table, w, o_q, length_q, WORDS)
        else:
            b_lo, b_hi, guard = bounds
        b_coord = rows.index(w * STAGES + stage).reshape([BN]).load(gl.SliceLayout(0, LS))
        # seen iff (coord - lo) & (hi - coord) & guard == guard. Written out, because LLVM packs the
        # 64 predicates of a thread into words and takes twice the instructions.
        s = gl.inline_asm_elementwise(
            "{ .reg .b32 a, b; .reg .pred p; sub.s32 a, $2, $3; sub.s32 b, $4, $2; and.b32 a, a, b;"
            " and.b32 a, a, $5; setp.eq.s32 p, a, $5; selp.f32 $0, $1, 0fFF800000, p; }",
            "=f,f,r,r,r,r", [s, b_coord[None, :], b_lo[:, None], b_hi[:, None], guard],
            dtype=gl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    return s


@gluon.jit
def _walk(
    acc, l, m, it, q, ring, first, last, bounds, mask, o_q, length_q, scale_log2, D: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, WORDS: gl.constexpr,
    TABLES: gl.constexpr, LS: gl.constexpr, LO: gl.constexpr, HIDE: gl.constexpr,
):  # fmt: skip
    """Entries first .. last of one list, the online softmax over them; HIDE None: no mask."""
    k_buffer, v_buffer, c_buffer, k_full, k_empty, v_full, v_empty = ring
    LP: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=LO, k_width=2)
    for e in range(first, last):
        stage = it % STAGES
        phase = (it // STAGES) & 1
        mbarrier.wait(k_full.index(stage), phase)
        keys = k_buffer.index(stage).reshape([BN, D]).permute((1, 0))
        zero = gl.zeros([BM, BN], gl.float32, layout=LS)
        s = warpgroup_mma(q, keys, zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=(s,))
        if HIDE is not None:
            s = HIDE(s, c_buffer, stage, bounds, mask, e, o_q, length_q, STAGES, WORDS, TABLES,
                     LS, BN)  # fmt: skip
        mbarrier.arrive(k_empty.index(stage), count=1)
        m_new = gl.maximum(m, gl.max(s, axis=1) * scale_log2)
        offset = m_new
        if HIDE is not None:  # a row that has seen nothing yet: exp2(-inf - 0), not -inf - -inf
            offset = gl.where(m_new == float("-inf"), 0.0, m_new)
        p = gl.exp2(s * scale_log2 - offset[:, None])
        rescale = gl.exp2(m - offset)
        l = l * rescale + gl.sum(p, axis=1)
        m = m_new
        acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, LO))[:, None]
        weights = gl.convert_layout(p.to(v_buffer.dtype), LP)
        mbarrier.wait(v_full.index(stage), phase)
        values = v_buffer.index(stage).reshape([BN, D])
        acc = warpgroup_mma(weights, values, acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(v_empty.index(stage), count=1)
        it += 1
    return acc, l, m, it


@gluon.jit
def _consumer(
    shared, D: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, GROUPS: gl.constexpr,
    STAGES: gl.constexpr, WORDS: gl.constexpr, TABLES: gl.constexpr, RAGGED: gl.constexpr,
    LSE: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    descriptors, queries, ring, lists, mask, sizes, outputs = shared
    q_buffer, q_full, q_empty = queries
    p_work_offset, p_work, p_q_start, p_q_count, p_full, p_whole_end, p_full_start, p_full_count, \
        p_partial, p_partial_start, p_partial_row = lists  # fmt: skip
    length_q, heads, group, tiles, variants, scale_log2 = sizes
    p_o, p_lse = outputs
    LS: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16]
    )
    LO: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16]
    )
    ROW: gl.constexpr = gl.SliceLayout(1, LS)
    it = 0
    turn = 0
    pid = gl.program_id(0)
    for w in range(gl.load(p_work_offset + pid), gl.load(p_work_offset + pid + 1)):
        b, h, row, tile = _locate(gl.load(p_work + w), heads, tiles, variants)
        q_start = gl.load(p_q_start + tile)
        q_count = gl.load(p_q_count + tile)
        o_m = GROUP * BM + gl.arange(0, BM, layout=ROW)
        o_q = q_start + gl.minimum(o_m, q_count - 1)
        acc = gl.zeros([BM, D], gl.float32, layout=LO)
        l = gl.zeros([BM], gl.float32, layout=ROW)
        m = gl.full([BM], float("-inf"), gl.float32, layout=ROW)
        mbarrier.wait(q_full.index(GROUP), turn & 1)
        q = q_buffer.index(GROUP).reshape([BM, D])

        bounds = (o_q, o_q, 0)
        if WORDS > 0:
            bounds = _bounds(mask, 0, 0, o_q, length_q, WORDS)
            acc, l, m, it = _walk(
                acc, l, m, it, q, ring, gl.load(p_partial + row), gl.load(p_partial + row + 1),
                bounds, mask, o_q, length_q, scale_log2, D, BM, BN, STAGES, WORDS, TABLES, LS, LO,
                _hide_interval,
            )  # fmt: skip
        first = gl.load(p_full + row)
        last = gl.load(p_full + row + 1)
        if RAGGED:
            whole_end = gl.load(p_whole_end + row)
            acc, l, m, it = _walk(
                acc, l, m, it, q, ring, whole_end, last, bounds, mask, o_q, length_q, scale_log2, D, BM,
                BN, STAGES, WORDS, TABLES, LS, LO, _hide_run,
            )  # fmt: skip
            last = whole_end
        if WORDS > 0:
            # Rows that the masked entries left empty: the loop below has no guard for -inf - -inf.
            # A finite floor far under any score keeps exp2(m - m_new) at zero.
            m = gl.maximum(m, -1.0e30)
        acc, l, m, it = _walk(
            acc, l, m, it, q, ring, first, last, bounds, mask, o_q, length_q, scale_log2, D, BM, BN,
            STAGES, WORDS, TABLES, LS, LO, None,
        )  # fmt: skip
        mbarrier.arrive(q_empty.index(GROUP), count=1)
        turn += 1

        empty = l == 0.0  # a row without keys: 0, and -inf
        l = gl.where(empty, 1.0, l)
        acc = acc / gl.convert_layout(l, gl.SliceLayout(1, LO))[:, None]
        r = GROUP * BM + gl.arange(0, BM, layout=gl.SliceLayout(1, LO))
        c = gl.arange(0, D, layout=gl.SliceLayout(0, LO))
        base = p_o + ((b.to(gl.int64) * length_q + q_start) * heads + h) * D
        gl.store(
            base + r[:, None] * (heads * D) + c[None, :],
            acc.to(p_o.dtype.element_ty),
            mask=(r < q_count)[:, None],
        )
        if LSE:
            value = gl.where(empty, float("-inf"), (m + gl.log2(l)) * _LN2)
            o_lse = (b * heads + h).to(gl.int64) * length_q + q_start
            gl.store(p_lse + o_lse + o_m, value, mask=o_m < q_count)


@gluon.jit
def _kernel(
    q_desc, k_desc, v_desc, coord_desc, run_desc, p_o, p_lse, p_work_offset, p_work, p_q_start, p_q_count,
    p_full, p_whole_end, p_full_start, p_full_count, p_partial, p_partial_start, p_partial_row,
    p_lo, p_hi, p_guard, p_table,
    length_q, heads, group, tiles, variants, scale_log2,
    D: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, GROUPS: gl.constexpr,
    STAGES: gl.constexpr, WORDS: gl.constexpr, TABLES: gl.constexpr, RAGGED: gl.constexpr,
    LSE: gl.constexpr, REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    q_buffer = gl.allocate_shared_memory(
        q_desc.dtype, [GROUPS] + q_desc.block_type.shape, q_desc.layout
    )
    k_buffer = gl.allocate_shared_memory(
        k_desc.dtype, [STAGES] + k_desc.block_type.shape, k_desc.layout
    )
    v_buffer = gl.allocate_shared_memory(
        v_desc.dtype, [STAGES] + v_desc.block_type.shape, v_desc.layout
    )
    c_buffer = gl.allocate_shared_memory(
        gl.int32, [max(WORDS, 1) * STAGES] + coord_desc.block_type.shape, coord_desc.layout
    )
    q_full = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for g in gl.static_range(GROUPS):
        mbarrier.init(q_full.index(g), count=1)
        mbarrier.init(q_empty.index(g), count=1)
    for s in gl.static_range(STAGES):
        mbarrier.init(k_full.index(s), count=1)
        mbarrier.init(k_empty.index(s), count=GROUPS)
        mbarrier.init(v_full.index(s), count=1)
        mbarrier.init(v_empty.index(s), count=GROUPS)
    descriptors = (q_desc, k_desc, v_desc, coord_desc, run_desc)
    queries = (q_buffer, q_full, q_empty)
    ring = (k_buffer, v_buffer, c_buffer, k_full, k_empty, v_full, v_empty)
    lists = (p_work_offset, p_work, p_q_start, p_q_count, p_full, p_whole_end, p_full_start,
             p_full_count, p_partial, p_partial_start, p_partial_row)  # fmt: skip
    mask = (p_lo, p_hi, p_guard, p_table)
    sizes = (length_q, heads, group, tiles, variants, scale_log2)
    outputs = (p_o, p_lse)
    shared = (descriptors, queries, ring, lists, mask, sizes, outputs)
    if GROUPS == 3:
        gl.warp_specialize(
            [
                (_consumer, (shared, D, BM, BN, GROUPS, STAGES, WORDS, TABLES, RAGGED, LSE, 0)),
                (_consumer, (shared, D, BM, BN, GROUPS, STAGES, WORDS, TABLES, RAGGED, LSE, 1)),
                (_consumer, (shared, D, BM, BN, GROUPS, STAGES, WORDS, TABLES, RAGGED, LSE, 2)),
                (_producer, (shared, D, BM, BN, GROUPS, STAGES, WORDS, TABLES, RAGGED, LSE)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, PRODUCER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_consumer, (shared, D, BM, BN, GROUPS, STAGES, WORDS, TABLES, RAGGED, LSE, 0)),
                (_consumer, (shared, D, BM, BN, GROUPS, STAGES, WORDS, TABLES, RAGGED, LSE, 1)),
                (_producer, (shared, D, BM, BN, GROUPS, STAGES, WORDS, TABLES, RAGGED, LSE)),
            ],
            [4, 1],
            [REGISTERS, PRODUCER_REGISTERS],
        )

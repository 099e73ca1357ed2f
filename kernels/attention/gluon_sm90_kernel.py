"""The Hopper kernel: warp-specialised block-sparse attention, forward, in Gluon.

One persistent program a multiprocessor: two producer warps bring queries, and keys with values, through
the tensor memory accelerator (TMA) into shared buffers, two or three consumer warpgroups of 64 queries
each multiply them (wgmma) and run the online softmax of FlashAttention (Dao, arXiv 2307.08691) while
their neighbours keep the tensor cores busy, as FlashAttention-3 does (Shah et al., arXiv 2407.08608).

A tile walks its masked entries first, so the loop over whole blocks has no mask at all. Entries start
at any token: a TMA box may, and columns past an entry's count are masked. Which program computes which
tiles is dealt out by the host, longest first. Producers run ahead of the consumers across tiles: while
one tile ends, the next one's first blocks arrive.

`gluon_sm90_policies` has what depends on formats and masks, `Spec` says what a binary is built for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from .gluon_sm90_policies import attend, ones_like_values

_LN2: gl.constexpr = gl.constexpr(math.log(2.0))
# The largest bound of scores, in bits, with which weights exp2(s - bound) stay far above the least bf16.
_MOST_BOUND: gl.constexpr = gl.constexpr(50.0)
# Tensor cores may round a score up over the product of the norms.
_ROUNDING: gl.constexpr = gl.constexpr(1.001)


@dataclass(frozen=True, eq=False)
class Spec:
    """What a binary of the kernel is built for.

    HEAD_DIM: channels of a head. D: the same, padded to a width that tensor cores take.
    BM, BN: queries of a consumer, keys of a block. GROUPS: consumer warpgroups.
    STAGES: blocks of keys and values in flight.
    PARTIAL: there are entries with a mask. RAGGED: there are full entries of fewer than BN keys.
    SCALED: queries and blocks of keys have scales. BIASED: sums of INT8 products, see policies.
    VALUES_8BIT: e4m3, transposed, a scale a channel. BOUNDED: there are bounds of the scores.
    LS, LO, LL: layouts of scores, output and sums of weights.
    """

    HEAD_DIM: int
    D: int
    BM: int
    BN: int
    GROUPS: int
    STAGES: int
    PARTIAL: bool
    RAGGED: bool
    LSE: bool
    SCALED: bool
    BIASED: bool
    VALUES_8BIT: bool
    BOUNDED: bool
    LS: gl.NVMMADistributedLayout
    LO: gl.NVMMADistributedLayout
    LL: gl.NVMMADistributedLayout
    REGISTERS: int
    PRODUCER_REGISTERS: int

    def __post_init__(self):
        for field in fields(self):  # device code takes constants only as constexpr
            object.__setattr__(self, field.name, gl.constexpr(getattr(self, field.name)))


class Boxes(NamedTuple):
    """TMA descriptors."""

    q: gl.tensor
    k: gl.tensor
    v: gl.tensor


class Queries(NamedTuple):
    buffer: gl.tensor
    full: gl.tensor
    empty: gl.tensor


class Ring(NamedTuple):
    k: gl.tensor
    v: gl.tensor
    k_full: gl.tensor
    k_empty: gl.tensor
    v_full: gl.tensor
    v_empty: gl.tensor
    ones: gl.tensor


class Lists(NamedTuple):
    """Pointers to the work of every program, the tiles, the lists of entries, their masks and the bits."""

    p_work_offset: gl.tensor
    p_work: gl.tensor
    p_q_start: gl.tensor
    p_q_count: gl.tensor
    p_full: gl.tensor
    p_whole_end: gl.tensor
    p_full_start: gl.tensor
    p_full_count: gl.tensor
    p_partial: gl.tensor
    p_partial_start: gl.tensor
    p_mask: gl.tensor
    p_bits: gl.tensor


class Scales(NamedTuple):
    """Of operands; p_most_q, p_most_k: the largest |q|^2 and |k|^2 of every head."""

    p_q: gl.tensor
    p_k: gl.tensor
    p_v: gl.tensor
    p_most_q: gl.tensor
    p_most_k: gl.tensor


class Sizes(NamedTuple):
    """group: query heads that share a key head; blocks: of keys, each with a scale; block_q: rows of bits."""

    length_q: gl.tensor
    heads: gl.tensor
    group: gl.tensor
    tiles: gl.tensor
    variants: gl.tensor
    blocks: gl.tensor
    block_q: gl.tensor


class Outputs(NamedTuple):
    p_o: gl.tensor
    p_lse: gl.tensor


class Shared(NamedTuple):
    """What all partitions of a program get."""

    boxes: Boxes
    queries: Queries
    ring: Ring
    lists: Lists
    scales: Scales
    sizes: Sizes
    outputs: Outputs
    scale_log2: gl.tensor


class Tile(NamedTuple):
    """What the entries of one tile have in common. o_row: [BM] numbers of the queries in the tile."""

    ring: Ring
    p_count: gl.tensor
    p_mask: gl.tensor
    p_bits: gl.tensor
    block_q: gl.tensor
    o_row: gl.tensor
    factor: gl.tensor
    p_k_scale: gl.tensor


@gluon.jit
def _locate(item, sizes):
    """Batch, head, list row and tile of a work item."""
    bh = item // (sizes.tiles * sizes.variants)
    row = item % (sizes.tiles * sizes.variants)
    return bh // sizes.heads, bh % sizes.heads, row, row % sizes.tiles


# Producers -----------------------------------------------------------------------------------------


@gluon.jit
def _bring_queries(x, SPEC: gl.constexpr):
    GROUPS: gl.constexpr = SPEC.GROUPS
    turn = 0
    pid = gl.program_id(0)
    for w in range(gl.load(x.lists.p_work_offset + pid), gl.load(x.lists.p_work_offset + pid + 1)):
        b, h, row, tile = _locate(gl.load(x.lists.p_work + w), x.sizes)
        q_start = gl.load(x.lists.p_q_start + tile)
        for g in gl.static_range(GROUPS):
            full = x.queries.full.index(g)
            mbarrier.wait(x.queries.empty.index(g), (turn & 1) ^ 1)
            mbarrier.expect(full, x.boxes.q.block_type.nbytes)
            tma.async_copy_global_to_shared(
                x.boxes.q, [b, h, q_start + g * SPEC.BM, 0], full, x.queries.buffer.index(g)
            )
        turn += 1


@gluon.jit
def _bring_blocks(x, SPEC: gl.constexpr):
    it = 0
    lists = x.lists
    pid = gl.program_id(0)
    for w in range(gl.load(lists.p_work_offset + pid), gl.load(lists.p_work_offset + pid + 1)):
        b, h, row, tile = _locate(gl.load(lists.p_work + w), x.sizes)
        h = h // x.sizes.group
        if SPEC.PARTIAL:
            for e in range(gl.load(lists.p_partial + row), gl.load(lists.p_partial + row + 1)):
                _fetch(gl.load(lists.p_partial_start + e), b, h, it, x, SPEC)
                it += 1
        first = gl.load(lists.p_full + row)
        last = gl.load(lists.p_full + row + 1)
        if SPEC.RAGGED:
            whole_end = gl.load(lists.p_whole_end + row)
            for e in range(whole_end, last):
                _fetch(gl.load(lists.p_full_start + e), b, h, it, x, SPEC)
                it += 1
            last = whole_end
        for e in range(first, last):
            _fetch(gl.load(lists.p_full_start + e), b, h, it, x, SPEC)
            it += 1


@gluon.jit
def _fetch(start, b, h, it, x, SPEC: gl.constexpr):
    """Bring one block of keys and values into the ring."""
    ring = x.ring
    boxes = x.boxes
    stage = it % SPEC.STAGES
    phase = ((it // SPEC.STAGES) & 1) ^ 1
    k_full = ring.k_full.index(stage)
    mbarrier.wait(ring.k_empty.index(stage), phase)
    mbarrier.expect(k_full, boxes.k.block_type.nbytes)
    tma.async_copy_global_to_shared(boxes.k, [b, h, start, 0], k_full, ring.k.index(stage))
    v_full = ring.v_full.index(stage)
    mbarrier.wait(ring.v_empty.index(stage), phase)
    mbarrier.expect(v_full, boxes.v.block_type.nbytes)
    if SPEC.VALUES_8BIT:
        tma.async_copy_global_to_shared(boxes.v, [b, h, 0, start], v_full, ring.v.index(stage))
    else:
        tma.async_copy_global_to_shared(boxes.v, [b, h, start, 0], v_full, ring.v.index(stage))


# Consumers -----------------------------------------------------------------------------------------


@gluon.jit
def _walk(acc, l, m, it, q, first, last, p_start, x, SPEC: gl.constexpr, MASK: gl.constexpr,
          BOUNDED: gl.constexpr):  # fmt: skip
    """Entries first .. last of one list, which begin at p_start[e]."""
    factor = x.factor
    if SPEC.SCALED:
        # The scale of an entry's keys is fetched an entry ahead and its place two ahead: neither is
        # waited for.
        block = gl.load(p_start + first, mask=first < last, other=0) // SPEC.BN
        k_scale = gl.load(x.p_k_scale + block)
        block = gl.load(p_start + first + 1, mask=first + 1 < last, other=0) // SPEC.BN
    for e in range(first, last):
        if SPEC.SCALED:
            factor = x.factor * k_scale
            k_scale = gl.load(x.p_k_scale + block)
            block = gl.load(p_start + e + 2, mask=e + 2 < last, other=0) // SPEC.BN
        stage = it % SPEC.STAGES
        phase = (it // SPEC.STAGES) & 1
        acc, l, m = attend(acc, l, m, q, e, stage, phase, factor, x, SPEC, MASK, BOUNDED)
        it += 1
    return acc, l, m, it


@gluon.jit
def _visit(acc, l, m, it, q, row, t, lists, SPEC: gl.constexpr, BOUNDED: gl.constexpr):
    """All entries of a tile, those with a mask first."""
    if SPEC.PARTIAL:
        acc, l, m, it = _walk(
            acc, l, m, it, q, gl.load(lists.p_partial + row), gl.load(lists.p_partial + row + 1),
            lists.p_partial_start, t, SPEC, "bits", BOUNDED,
        )  # fmt: skip
    first = gl.load(lists.p_full + row)
    last = gl.load(lists.p_full + row + 1)
    if SPEC.RAGGED:
        whole_end = gl.load(lists.p_whole_end + row)
        acc, l, m, it = _walk(
            acc, l, m, it, q, whole_end, last, lists.p_full_start, t, SPEC, "run", BOUNDED
        )
        last = whole_end
    if SPEC.PARTIAL and not BOUNDED:
        # Rows that the masked entries left empty: the loop below has no guard for -inf - -inf.
        # A finite floor far under any score keeps exp2(m - m_new) at zero.
        m = gl.maximum(m, -1.0e30)
    return _walk(acc, l, m, it, q, first, last, lists.p_full_start, t, SPEC, "none", BOUNDED)


@gluon.jit
def _consume(x, SPEC: gl.constexpr, GROUP: gl.constexpr):
    lists = x.lists
    sizes = x.sizes
    ROW: gl.constexpr = gl.SliceLayout(1, SPEC.LS)
    it = 0
    turn = 0
    pid = gl.program_id(0)
    for w in range(gl.load(lists.p_work_offset + pid), gl.load(lists.p_work_offset + pid + 1)):
        b, h, row, tile = _locate(gl.load(lists.p_work + w), sizes)
        q_start = gl.load(lists.p_q_start + tile)
        q_count = gl.load(lists.p_q_count + tile)
        kv = b * (sizes.heads // sizes.group) + h // sizes.group
        o_m = GROUP * SPEC.BM + gl.arange(0, SPEC.BM, layout=ROW)
        o_row = gl.minimum(o_m, q_count - 1)
        o_head = (b * sizes.heads + h).to(gl.int64) * sizes.length_q
        factor = x.scale_log2
        if SPEC.SCALED:
            factor = gl.load(x.scales.p_q + o_head + q_start + o_row) * x.scale_log2
        t = Tile(
            x.ring, lists.p_full_count, lists.p_mask, lists.p_bits, sizes.block_q, o_row, factor,
            x.scales.p_k + kv * sizes.blocks,
        )  # fmt: skip
        acc = gl.zeros([SPEC.BM, SPEC.D], gl.float32, layout=SPEC.LO)
        if SPEC.VALUES_8BIT:
            l = gl.zeros([SPEC.BM, 8], gl.float32, layout=SPEC.LL)
        else:
            l = gl.zeros([SPEC.BM], gl.float32, layout=ROW)
        m = gl.full([SPEC.BM], float("-inf"), gl.float32, layout=ROW)
        mbarrier.wait(x.queries.full.index(GROUP), turn & 1)
        q = x.queries.buffer.index(GROUP).reshape([SPEC.BM, SPEC.D])

        if SPEC.BOUNDED:
            most = gl.load(x.scales.p_most_q + b * sizes.heads + h)
            most = gl.sqrt_rn(most) * gl.sqrt_rn(gl.load(x.scales.p_most_k + kv))
            bound = most * x.scale_log2 * _ROUNDING
            if bound <= _MOST_BOUND:  # false for NaN
                m = gl.full([SPEC.BM], bound, gl.float32, layout=ROW)
                acc, l, m, it = _visit(acc, l, m, it, q, row, t, lists, SPEC, True)
            else:
                acc, l, m, it = _visit(acc, l, m, it, q, row, t, lists, SPEC, False)
        else:
            acc, l, m, it = _visit(acc, l, m, it, q, row, t, lists, SPEC, False)
        mbarrier.arrive(x.queries.empty.index(GROUP), count=1)
        turn += 1

        if SPEC.VALUES_8BIT:
            l = gl.convert_layout(gl.max(l, axis=1), ROW)
        empty = l == 0.0  # a row without keys: 0, and -inf
        l = gl.where(empty, 1.0, l)
        r = GROUP * SPEC.BM + gl.arange(0, SPEC.BM, layout=gl.SliceLayout(1, SPEC.LO))
        c = gl.arange(0, SPEC.D, layout=gl.SliceLayout(0, SPEC.LO))
        acc = acc * gl.convert_layout(1.0 / l, gl.SliceLayout(1, SPEC.LO))[:, None]
        if SPEC.VALUES_8BIT:
            b_v_scale = gl.load(x.scales.p_v + kv * SPEC.HEAD_DIM + c, mask=c < SPEC.HEAD_DIM)
            acc = acc * b_v_scale[None, :]
        p_o = x.outputs.p_o
        base = p_o + ((b.to(gl.int64) * sizes.length_q + q_start) * sizes.heads + h) * SPEC.HEAD_DIM
        gl.store(
            base + r[:, None] * (sizes.heads * SPEC.HEAD_DIM) + c[None, :],
            acc.to(p_o.dtype.element_ty),
            mask=(r < q_count)[:, None] & (c < SPEC.HEAD_DIM)[None, :],
        )
        if SPEC.LSE:
            value = gl.where(empty, float("-inf"), (m + gl.log2(l)) * _LN2)
            gl.store(x.outputs.p_lse + o_head + q_start + o_m, value, mask=o_m < q_count)


# ---------------------------------------------------------------------------------------------------


@gluon.jit
def _barriers(n: gl.constexpr, count: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [n, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(n):
        mbarrier.init(bars.index(i), count=count)
    return bars


@gluon.jit
def _buffers(box, n: gl.constexpr):
    return gl.allocate_shared_memory(box.dtype, [n] + box.block_type.shape, box.layout)


@gluon.jit
def forward_kernel(
    q_boxes, k_boxes, v_boxes, p_q_scale, p_k_scale, p_v_scale, p_most_q, p_most_k, p_o, p_lse,
    p_work_offset, p_work, p_q_start, p_q_count, p_full, p_whole_end, p_full_start, p_full_count,
    p_partial, p_partial_start, p_mask, p_bits,
    length_q, heads, group, tiles, variants, blocks, block_q, scale_log2, SPEC: gl.constexpr,
):  # fmt: skip
    GROUPS: gl.constexpr = SPEC.GROUPS
    STAGES: gl.constexpr = SPEC.STAGES
    if SPEC.VALUES_8BIT:
        ones = ones_like_values(v_boxes.dtype, SPEC)
    else:
        ones = 0
    x = Shared(
        Boxes(q_boxes, k_boxes, v_boxes),
        Queries(
            _buffers(q_boxes, GROUPS), _barriers(GROUPS, 1), _barriers(GROUPS, 1),
        ),
        Ring(
            _buffers(k_boxes, STAGES), _buffers(v_boxes, STAGES),
            _barriers(STAGES, 1), _barriers(STAGES, GROUPS),
            _barriers(STAGES, 1), _barriers(STAGES, GROUPS), ones,
        ),
        Lists(p_work_offset, p_work, p_q_start, p_q_count, p_full, p_whole_end, p_full_start,
              p_full_count, p_partial, p_partial_start, p_mask, p_bits),
        Scales(p_q_scale, p_k_scale, p_v_scale, p_most_q, p_most_k),
        Sizes(length_q, heads, group, tiles, variants, blocks, block_q),
        Outputs(p_o, p_lse),
        scale_log2,
    )  # fmt: skip
    if GROUPS == 3:
        gl.warp_specialize(
            [
                (_consume, (x, SPEC, 0)),
                (_consume, (x, SPEC, 1)),
                (_consume, (x, SPEC, 2)),
                (_bring_blocks, (x, SPEC)),
                (_bring_queries, (x, SPEC)),
            ],
            [4, 4, 1, 1],
            [SPEC.REGISTERS, SPEC.REGISTERS, SPEC.PRODUCER_REGISTERS, SPEC.PRODUCER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (x, SPEC, 0)),
                (_consume, (x, SPEC, 1)),
                (_bring_blocks, (x, SPEC)),
                (_bring_queries, (x, SPEC)),
            ],
            [4, 1, 1],
            [SPEC.REGISTERS, SPEC.PRODUCER_REGISTERS, SPEC.PRODUCER_REGISTERS],
        )

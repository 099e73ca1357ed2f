"""The Hopper kernel: warp-specialised block-sparse attention, forward, in Gluon.

One persistent program a multiprocessor: two producer warps bring queries, and keys with values, through
the tensor memory accelerator (TMA) into shared buffers, two or three consumer warpgroups of 64 queries
each multiply them (wgmma) and run the online softmax of FlashAttention (Dao, arXiv 2307.08691) while
their neighbours keep the tensor cores busy, as FlashAttention-3 does (Shah et al., arXiv 2407.08608).

A tile walks its masked entries first, so the loop over whole blocks has no mask at all. Entries start
at any token: a TMA box may, and columns past an entry's count are masked. Which program computes which
tiles is dealt out by the host, longest first. Producers run ahead of the consumers across tiles: while
one tile ends, the next one's first blocks arrive, and its queries once the last scores are there.

`policies` has what depends on formats and masks, `types` what a binary is built for and
what its partitions get.
"""

from __future__ import annotations

import math

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.language.extra.cuda import gdc_wait

from .mask import EMPTY, KIND_SHIFT, WHOLE
from .policies import attend, for_threads, let_go, ones_like_values, pass_by, thread_numbers
from .types import Boxes, Lists, Outputs, Queries, Ring, Scales, Shared, Sizes, Tile

_EMPTY: gl.constexpr = gl.constexpr(EMPTY)
_WHOLE: gl.constexpr = gl.constexpr(WHOLE)
_KIND_SHIFT: gl.constexpr = gl.constexpr(KIND_SHIFT)
_LN2: gl.constexpr = gl.constexpr(math.log(2.0))
# The largest bound of scores, in bits, with which weights exp2(s - bound) stay far above the least bf16.
_MOST_BOUND: gl.constexpr = gl.constexpr(50.0)
# Tensor cores may round a score up over the product of the norms.
_ROUNDING: gl.constexpr = gl.constexpr(1.001)


@gluon.jit
def _locate(item, sizes):
    """Batch, head, list row and tile of a work item."""
    bh = item // (sizes.tiles * sizes.variants)
    row = item % (sizes.tiles * sizes.variants)
    return bh // sizes.heads, bh % sizes.heads, row, row % sizes.tiles


@gluon.jit
def _full_entries(row, w, outputs, lists, SPEC: gl.constexpr):
    """first, whole_end, last: the full entries of work item w, whole ones before whole_end."""
    first = gl.load(lists.p_full + row)
    last = gl.load(lists.p_full + row + 1)
    whole_end = last
    if SPEC.RAGGED:
        whole_end = gl.load(lists.p_whole_end + row)
    if SPEC.SPLIT:  # whole entries in equal parts, the ragged ones with the last
        code = gl.load(outputs.p_part + w)
        part = (code >> 8) & 255
        parts = code & 255
        count = whole_end - first
        end = first + count * (part + 1) // parts
        last = gl.where(part + 1 == parts, last, end)
        first += count * part // parts
        whole_end = end
    return first, whole_end, last


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
        if SPEC.PARTIAL:
            for e in range(gl.load(lists.p_partial + row), gl.load(lists.p_partial + row + 1)):
                _fetch(gl.load(lists.p_partial_start + e), b, h, tile, it, x, SPEC)
                it += 1
        first, whole_end, last = _full_entries(row, w, x.outputs, lists, SPEC)
        if SPEC.RAGGED:
            for e in range(whole_end, last):
                _fetch(gl.load(lists.p_full_start + e), b, h, tile, it, x, SPEC)
                it += 1
        for e in range(first, whole_end):
            _fetch(gl.load(lists.p_full_start + e), b, h, tile, it, x, SPEC)
            it += 1


@gluon.jit
def _fetch(start, b, q_head, tile, it, x, SPEC: gl.constexpr):
    """Bring one block of keys and values into the ring."""
    ring = x.ring
    boxes = x.boxes
    h = q_head // x.sizes.group
    stage = it % SPEC.STAGES
    phase = ((it // SPEC.STAGES) & 1) ^ 1
    k_full = ring.k_full.index(stage)
    mbarrier.wait(ring.k_empty.index(stage), phase)
    ROWS: gl.constexpr = SPEC.BN * 4 * (SPEC.K_ROWS + SPEC.BIAS)
    mbarrier.expect(k_full, boxes.k.block_type.nbytes + ROWS)
    tma.async_copy_global_to_shared(boxes.k, [b, h, start, 0], k_full, ring.k.index(stage))
    if SPEC.K_ROWS:
        tma.async_copy_global_to_shared(
            boxes.k_scale, [b, h, 0, start], k_full, ring.k_scale.index(stage)
        )
    if SPEC.BIAS:
        tma.async_copy_global_to_shared(
            boxes.bias, [b, q_head, tile, start], k_full, ring.bias.index(stage)
        )
    v_full = ring.v_full.index(stage)
    mbarrier.wait(ring.v_empty.index(stage), phase)
    mbarrier.expect(v_full, boxes.v.block_type.nbytes)
    if SPEC.VALUES_8BIT:
        tma.async_copy_global_to_shared(boxes.v, [b, h, 0, start], v_full, ring.v.index(stage))
    else:
        tma.async_copy_global_to_shared(boxes.v, [b, h, start, 0], v_full, ring.v.index(stage))


# Consumers -----------------------------------------------------------------------------------------


@gluon.jit
def _rows_of_output(o_m, q_start, q_count, outputs, SPEC: gl.constexpr):
    """Where queries o_m of a tile are written, counted from q_start."""
    if SPEC.ORDERED:
        return (
            gl.load(outputs.p_order + q_start + o_m, mask=o_m < q_count, other=0).to(gl.int64)
            - q_start
        )
    else:
        return o_m


@gluon.jit
def _scales_of(block, x, SPEC: gl.constexpr):
    """The scale of a block of keys, or [1, 4] of every thread of a row."""
    if SPEC.K_GROUPS > 1:
        block = (block * SPEC.K_GROUPS + thread_numbers(SPEC))[None, :]
    return gl.load(x.p_k_scale + block)


@gluon.jit
def _write(acc, base, q_start, q_count, x, SPEC: gl.constexpr, GROUP: gl.constexpr):
    """Rows of the output, the first one of the tile at base."""
    p_o = x.outputs.p_o
    # 0, which no compiler knows: row numbers would be computed before the loop over tiles, and spilled.
    r = gl.inline_asm_elementwise(
        "mov.b32 $0, 0;", "=r,r", [q_count], dtype=gl.int32, is_pure=False, pack=1
    )
    r += GROUP * SPEC.BM + gl.arange(0, SPEC.BM, layout=gl.SliceLayout(1, SPEC.LW))
    c = gl.arange(0, SPEC.D, layout=gl.SliceLayout(0, SPEC.LW))
    o_row = _rows_of_output(r, q_start, q_count, x.outputs, SPEC) * (x.sizes.heads * SPEC.HEAD_DIM)
    out = gl.convert_layout(acc.to(p_o.dtype.element_ty), SPEC.LW)
    inside = (r < q_count)[:, None] & (c < SPEC.HEAD_DIM)[None, :]
    gl.store(p_o + base + o_row[:, None] + c[None, :], out, mask=inside)


@gluon.jit
def _walk(acc, l, m, it, q, first, last, p_start, x, SPEC: gl.constexpr, MASK: gl.constexpr,
          BOUNDED: gl.constexpr):  # fmt: skip
    """Entries first .. last of one list, which begin at p_start[e]."""
    K_BLOCKS: gl.constexpr = SPEC.SCALED and not (SPEC.K_ROWS or SPEC.K_HEAD)
    # The scale of an entry's keys is fetched an entry ahead and its place two ahead: neither is waited for. Beside masks
    # there are no registers for them.
    AHEAD: gl.constexpr = K_BLOCKS and MASK == "none"
    if AHEAD:
        block = gl.load(p_start + first, mask=first < last, other=0) // SPEC.BN
        k_scale = _scales_of(block, x, SPEC)
        block = gl.load(p_start + first + 1, mask=first + 1 < last, other=0) // SPEC.BN
    for e in range(first, last):
        factor = x.factor
        if AHEAD:
            factor = factor * k_scale
            k_scale = _scales_of(block, x, SPEC)
            block = gl.load(p_start + e + 2, mask=e + 2 < last, other=0) // SPEC.BN
        elif K_BLOCKS:
            factor = factor * _scales_of(gl.load(p_start + e) // SPEC.BN, x, SPEC)
        stage = it % SPEC.STAGES
        phase = (it // SPEC.STAGES) & 1
        if SPEC.BY_GROUP and MASK == "bits":
            NEEDED: gl.constexpr = MASK if SPEC.BITS else "none"
            if (gl.load(x.p_mask + e) >> x.o_kind) & 1 == 1:
                acc, l, m = attend(acc, l, m, q, e, stage, phase, factor, x, SPEC, NEEDED, BOUNDED)
            else:
                pass_by(stage, phase, x.ring, SPEC)
        elif MASK == "none":
            done = e + 1 == last  # whole entries end a tile
            acc, l, m = attend(acc, l, m, q, e, stage, phase, factor, x, SPEC, MASK, BOUNDED, done)
        else:
            acc, l, m = attend(acc, l, m, q, e, stage, phase, factor, x, SPEC, MASK, BOUNDED)
        it += 1
    return acc, l, m, it


@gluon.jit
def _visit(acc, l, m, it, q, row, w, t, x, SPEC: gl.constexpr, BOUNDED: gl.constexpr):
    """All entries of a work item, those with a mask first."""
    lists = x.lists
    if SPEC.PARTIAL:
        acc, l, m, it = _walk(
            acc, l, m, it, q, gl.load(lists.p_partial + row), gl.load(lists.p_partial + row + 1),
            lists.p_partial_start, t, SPEC, "bits", BOUNDED,
        )  # fmt: skip
    first, whole_end, last = _full_entries(row, w, x.outputs, lists, SPEC)
    if SPEC.RAGGED:
        acc, l, m, it = _walk(
            acc, l, m, it, q, whole_end, last, lists.p_full_start, t, SPEC, "run", BOUNDED
        )
    if SPEC.PARTIAL and not BOUNDED:
        # Rows that the masked entries left empty: the loop below has no guard for -inf - -inf.
        # A finite floor far under any score keeps exp2(m - m_new) at zero.
        m = gl.maximum(m, -1.0e30)
    # The last whole entry lets the queries go; without one, this.
    let_go(t.q_empty, SPEC, first >= whole_end)
    return _walk(acc, l, m, it, q, first, whole_end, lists.p_full_start, t, SPEC, "none", BOUNDED)


@gluon.jit
def _consume(x, SPEC: gl.constexpr, GROUP: gl.constexpr):
    it = 0
    turn = 0
    pid = gl.program_id(0)
    p_offset = x.lists.p_work_offset + pid
    for w in range(gl.load(p_offset), gl.load(p_offset + 1)):
        b, h, row, tile = _locate(gl.load(x.lists.p_work + w), x.sizes)
        q_count = gl.load(x.lists.p_q_count + tile)
        if q_count > GROUP * SPEC.BM:
            it = _compute(b, h, row, tile, q_count, w, it, turn, x, SPEC, GROUP)
        else:
            it = _pass_tile(row, w, it, turn, x, SPEC, GROUP)
        turn += 1


@gluon.jit
def _pass_tile(row, w, it, turn, x, SPEC: gl.constexpr, GROUP: gl.constexpr):
    """The turn of a tile that is too short to have queries for this consumer."""
    mbarrier.wait(x.queries.full.index(GROUP), turn & 1)
    let_go(x.queries.empty.index(GROUP), SPEC)
    first, _, last = _full_entries(row, w, x.outputs, x.lists, SPEC)
    entries = last - first
    if SPEC.PARTIAL:
        entries += gl.load(x.lists.p_partial + row + 1) - gl.load(x.lists.p_partial + row)
    for _ in range(entries):
        pass_by(it % SPEC.STAGES, (it // SPEC.STAGES) & 1, x.ring, SPEC)
        it += 1
    return it


@gluon.jit
def _compute(b, h, row, tile, q_count, w, it, turn, x, SPEC: gl.constexpr, GROUP: gl.constexpr):
    """The consumer's queries of a work item."""
    lists = x.lists
    sizes = x.sizes
    ROW: gl.constexpr = gl.SliceLayout(1, SPEC.LS)
    q_start = gl.load(lists.p_q_start + tile)
    kv = b * (sizes.heads // sizes.group) + h // sizes.group
    o_m = GROUP * SPEC.BM + gl.arange(0, SPEC.BM, layout=ROW)
    o_row = gl.minimum(o_m, q_count - 1)
    o_head = (b * sizes.heads + h).to(gl.int64) * sizes.length_q
    factor = x.scale_log2
    if SPEC.SCALED:
        factor = gl.load(x.scales.p_q + o_head + q_start + o_row) * x.scale_log2
    if SPEC.K_HEAD:
        factor = factor * gl.load(x.scales.p_k + kv)
    if SPEC.K_GROUPS > 1:
        factor = for_threads(factor, SPEC)
    t = Tile(
        x.ring, x.queries.empty.index(GROUP), lists.p_full_count, lists.p_mask, lists.p_bits, sizes.block_q, o_row,
        _KIND_SHIFT + 2 * GROUP, factor, x.scales.p_k + kv * sizes.scales,
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
            acc, l, m, it = _visit(acc, l, m, it, q, row, w, t, x, SPEC, True)
        else:
            acc, l, m, it = _visit(acc, l, m, it, q, row, w, t, x, SPEC, False)
    else:
        acc, l, m, it = _visit(acc, l, m, it, q, row, w, t, x, SPEC, False)

    if SPEC.VALUES_8BIT:
        l = gl.convert_layout(gl.max(l, axis=1), ROW)
    empty = l == 0.0  # a row without keys: 0, and -inf
    l = gl.where(empty, 1.0, l)
    r = GROUP * SPEC.BM + gl.arange(0, SPEC.BM, layout=gl.SliceLayout(1, SPEC.LO))
    c = gl.arange(0, SPEC.D, layout=gl.SliceLayout(0, SPEC.LO))
    acc = acc * gl.convert_layout(1.0 / l, gl.SliceLayout(1, SPEC.LO))[:, None]
    if SPEC.VALUES_8BIT:
        o_v = kv * SPEC.HEAD_DIM + c
        b_v_scale = gl.load(x.scales.p_v + o_v, mask=c < SPEC.HEAD_DIM)
        acc = acc * b_v_scale[None, :]
        if SPEC.VALUES_MEAN:
            b_v_mean = gl.load(x.scales.p_v_mean + o_v, mask=c < SPEC.HEAD_DIM)
            seen = gl.convert_layout(gl.where(empty, 0.0, 1.0), gl.SliceLayout(1, SPEC.LO))
            acc += seen[:, None] * b_v_mean[None, :]
    outputs = x.outputs
    base = ((b.to(gl.int64) * sizes.length_q + q_start) * sizes.heads + h) * SPEC.HEAD_DIM
    if SPEC.SPLIT:
        code = gl.load(outputs.p_part + w)
        if (code & 255) > 1:  # what this writes to the outputs, `combine` overwrites
            o_part = (code >> 16) * (SPEC.GROUPS * SPEC.BM)
            p_part = outputs.p_part_o + o_part.to(gl.int64) * SPEC.HEAD_DIM
            inside = (r < q_count)[:, None] & (c < SPEC.HEAD_DIM)[None, :]
            gl.store(p_part + r[:, None] * SPEC.HEAD_DIM + c[None, :], acc, mask=inside)
            value = gl.where(empty, float("-inf"), m + gl.log2(l))
            gl.store(outputs.p_part_lse + o_part + o_m, value, mask=o_m < q_count)
    _write(acc, base, q_start, q_count, x, SPEC, GROUP)
    if SPEC.LSE:
        value = gl.where(empty, float("-inf"), (m + gl.log2(l)) * _LN2)
        o_out = _rows_of_output(o_m, q_start, q_count, outputs, SPEC)
        gl.store(outputs.p_lse + o_head + q_start + o_out, value, mask=o_m < q_count)
    return it


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
def _buffers_if(wanted: gl.constexpr, box, n: gl.constexpr):
    if wanted:
        return _buffers(box, n)
    else:
        return 0


@gluon.jit
def forward_kernel(
    q_boxes, k_boxes, v_boxes, k_scale_boxes, bias_boxes, p_q_scale, p_k_scale, p_v_scale, p_v_mean, p_most_q, p_most_k, p_o, p_lse,
    p_order, p_part, p_part_o, p_part_lse,
    p_work_offset, p_work, p_q_start, p_q_count, p_full, p_whole_end, p_full_start, p_full_count,
    p_partial, p_partial_start, p_mask, p_bits,
    length_q, heads, group, tiles, variants, scales, block_q, scale_log2, SPEC: gl.constexpr,
):  # fmt: skip
    GROUPS: gl.constexpr = SPEC.GROUPS
    STAGES: gl.constexpr = SPEC.STAGES
    ARRIVALS: gl.constexpr = 128 if SPEC.PARTIAL else 1  # of a consumer, see `let_go`
    if SPEC.VALUES_8BIT:
        ones = ones_like_values(v_boxes.dtype, SPEC)
    else:
        ones = 0
    x = Shared(
        Boxes(q_boxes, k_boxes, v_boxes, k_scale_boxes, bias_boxes),
        Queries(
            _buffers(q_boxes, GROUPS), _barriers(GROUPS, 1), _barriers(GROUPS, ARRIVALS),
        ),
        Ring(
            _buffers(k_boxes, STAGES), _buffers(v_boxes, STAGES),
            _barriers(STAGES, 1), _barriers(STAGES, GROUPS * ARRIVALS),
            _barriers(STAGES, 1), _barriers(STAGES, GROUPS * ARRIVALS), ones,
            _buffers_if(SPEC.K_ROWS, k_scale_boxes, STAGES),
            _buffers_if(SPEC.BIAS, bias_boxes, STAGES),
        ),
        Lists(p_work_offset, p_work, p_q_start, p_q_count, p_full, p_whole_end, p_full_start,
              p_full_count, p_partial, p_partial_start, p_mask, p_bits),
        Scales(p_q_scale, p_k_scale, p_v_scale, p_v_mean, p_most_q, p_most_k),
        Sizes(length_q, heads, group, tiles, variants, scales, block_q),
        Outputs(p_o, p_lse, p_order, p_part, p_part_o, p_part_lse),
        scale_log2,
    )  # fmt: skip
    gdc_wait()  # up to here this launch may run beside the end of the one in front
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

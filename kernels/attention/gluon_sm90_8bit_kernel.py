"""The 8-bit Hopper kernel: block-sparse attention, forward, with FP8 or INT8 scores and FP8 values.

Built like `gluon_sm90_kernel`, from which come the dealing of tiles and the masks. What 8 bits change:

* wgmma takes 8-bit values only with keys along rows, so they come transposed, tokens of every 16 in
  the order in which the weights lie in the registers of a thread (`prologue.SWAPPED`).
* Scores are scaled by a factor a row and block, q_scale * k_scale, inside the exponent: no instruction
  more than one factor for all.
* Weights are 448 times the usual ones, the range of e4m3, by an offset of the running maximum.
* The tensor cores sum FP8 products with 14 bits, so every block is summed from zero and added in fp32
  (SageAttention2, arXiv 2411.10958, section 3.4). The addition replaces the rescaling: it is free.
"""
# ruff: noqa: RUF005, RUF059, SIM113 - device code, as in gluon_sm90_kernel

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .gluon_sm90_kernel import _LN2, _bounds, _hide_interval, _hide_run, _locate

# log2 of the largest weight, just under the 448 of e4m3.
_WEIGHT_LOG2: gl.constexpr = gl.constexpr(8.807)


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
        v_desc, [b, h, 0, start], v_full.index(stage), v_buffer.index(stage)
    )


@gluon.jit
def _producer(
    shared, D: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, GROUPS: gl.constexpr,
    STAGES: gl.constexpr, WORDS: gl.constexpr, TABLES: gl.constexpr, RAGGED: gl.constexpr,
    LSE: gl.constexpr,
):  # fmt: skip
    descriptors, queries, ring, lists, mask, scales, sizes, outputs = shared
    q_desc, k_desc, v_desc, coord_desc, run_desc = descriptors
    q_buffer, q_full, q_empty = queries
    p_work_offset, p_work, p_q_start, p_q_count, p_full, p_whole_end, p_full_start, p_full_count, \
        p_partial, p_partial_start, p_partial_row = lists  # fmt: skip
    length_q, heads, group, tiles, variants, blocks, scale_log2 = sizes
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


@gluon.jit
def _weights_operand(p, LP: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr):
    """fp32 weights, as scores lie in registers, to the e4m3 operand of wgmma. Columns change their
    names and not their places: those of the stored values are in the same order."""
    p = p.reshape([BM, BN // 16, 2, 4, 2]).permute((0, 1, 3, 2, 4)).reshape([BM, BN])
    p = gl.convert_layout(p, LP, assert_trivial=True)
    return gl.inline_asm_elementwise(
        "{ .reg .b16 lo, hi; cvt.rn.satfinite.e4m3x2.f32 lo, $2, $1;"
        " cvt.rn.satfinite.e4m3x2.f32 hi, $4, $3; mov.b32 $0, {lo, hi}; }",
        "=r,r,r,r,r", [p], dtype=gl.float8e4nv, is_pure=True, pack=4,
    )  # fmt: skip


@gluon.jit
def _walk(
    acc, l, m, it, q, ring, first, last, bounds, mask, o_q, length_q, b_factor, p_start, p_k_scale,
    D: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
    WORDS: gl.constexpr, TABLES: gl.constexpr, LS: gl.constexpr, LO: gl.constexpr,
    HIDE: gl.constexpr,
):  # fmt: skip
    """Entries first .. last of one list, the online softmax over them; HIDE None: no mask."""
    k_buffer, v_buffer, c_buffer, k_full, k_empty, v_full, v_empty = ring
    LP: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=LO, k_width=4)
    SUM: gl.constexpr = gl.int32 if k_buffer.dtype == gl.int8 else gl.float32
    # The scale of an entry's keys is fetched an entry ahead and its place two ahead: neither is waited for.
    block = gl.load(p_start + first, mask=first < last, other=0) // BN
    k_scale = gl.load(p_k_scale + block)
    block = gl.load(p_start + first + 1, mask=first + 1 < last, other=0) // BN
    for e in range(first, last):
        factor = b_factor * k_scale
        k_scale = gl.load(p_k_scale + block)
        block = gl.load(p_start + e + 2, mask=e + 2 < last, other=0) // BN
        stage = it % STAGES
        phase = (it // STAGES) & 1
        mbarrier.wait(k_full.index(stage), phase)
        keys = k_buffer.index(stage).reshape([BN, D]).permute((1, 0))
        zero = gl.zeros([BM, BN], SUM, layout=LS)
        s = warpgroup_mma(q, keys, zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=(s,)).to(gl.float32)
        if HIDE is not None:
            s = HIDE(s, c_buffer, stage, bounds, mask, e, o_q, length_q, STAGES, WORDS, TABLES,
                     LS, BN)  # fmt: skip
            factor = gl.maximum(factor, 1.0e-37)  # -inf * 0 is no number
        mbarrier.arrive(k_empty.index(stage), count=1)
        m_new = gl.maximum(m, gl.max(s, axis=1) * factor - _WEIGHT_LOG2)
        offset = m_new
        if HIDE is not None:  # a row that has seen nothing yet: exp2(-inf - 0), not -inf - -inf
            offset = gl.where(m_new == float("-inf"), 0.0, m_new)
        p = gl.exp2(s * factor[:, None] - offset[:, None])
        rescale = gl.exp2(m - offset)
        l = l * rescale + gl.sum(p, axis=1)
        m = m_new
        weights = _weights_operand(p, LP, BM, BN)
        mbarrier.wait(v_full.index(stage), phase)
        values = v_buffer.index(stage).reshape([D, BN]).permute((1, 0))
        nothing = gl.zeros([BM, D], gl.float32, layout=LO)
        part = warpgroup_mma(weights, values, nothing, use_acc=False, is_async=True)
        part = warpgroup_mma_wait(0, deps=(part,))
        mbarrier.arrive(v_empty.index(stage), count=1)
        acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, LO))[:, None] + part
        it += 1
    return acc, l, m, it


@gluon.jit
def _consumer(
    shared, D: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, GROUPS: gl.constexpr,
    STAGES: gl.constexpr, WORDS: gl.constexpr, TABLES: gl.constexpr, RAGGED: gl.constexpr,
    LSE: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    descriptors, queries, ring, lists, mask, scales, sizes, outputs = shared
    q_buffer, q_full, q_empty = queries
    p_work_offset, p_work, p_q_start, p_q_count, p_full, p_whole_end, p_full_start, p_full_count, \
        p_partial, p_partial_start, p_partial_row = lists  # fmt: skip
    p_q_scale, p_k_scale, p_v_scale = scales
    length_q, heads, group, tiles, variants, blocks, scale_log2 = sizes
    p_o, p_lse = outputs
    LS: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 32]
    )
    LO: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 32]
    )
    ROW: gl.constexpr = gl.SliceLayout(1, LS)
    it = 0
    turn = 0
    pid = gl.program_id(0)
    for w in range(gl.load(p_work_offset + pid), gl.load(p_work_offset + pid + 1)):
        b, h, row, tile = _locate(gl.load(p_work + w), heads, tiles, variants)
        q_start = gl.load(p_q_start + tile)
        q_count = gl.load(p_q_count + tile)
        kv = b * (heads // group) + h // group
        p_scale = p_k_scale + kv * blocks
        o_m = GROUP * BM + gl.arange(0, BM, layout=ROW)
        o_q = q_start + gl.minimum(o_m, q_count - 1)
        o_row = (b * heads + h).to(gl.int64) * length_q
        b_factor = gl.load(p_q_scale + o_row + o_q) * scale_log2
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
                bounds, mask, o_q, length_q, b_factor, p_partial_start, p_scale, D, BM, BN, STAGES,
                WORDS, TABLES, LS, LO, _hide_interval,
            )  # fmt: skip
        first = gl.load(p_full + row)
        last = gl.load(p_full + row + 1)
        if RAGGED:
            whole_end = gl.load(p_whole_end + row)
            acc, l, m, it = _walk(
                acc, l, m, it, q, ring, whole_end, last, bounds, mask, o_q, length_q, b_factor,
                p_full_start, p_scale, D, BM, BN, STAGES, WORDS, TABLES, LS, LO, _hide_run,
            )  # fmt: skip
            last = whole_end
        if WORDS > 0:
            # Rows that the masked entries left empty: the loop below has no guard for -inf - -inf.
            # A finite floor far under any score keeps exp2(m - m_new) at zero.
            m = gl.maximum(m, -1.0e30)
        acc, l, m, it = _walk(
            acc, l, m, it, q, ring, first, last, bounds, mask, o_q, length_q, b_factor,
            p_full_start, p_scale, D, BM, BN, STAGES, WORDS, TABLES, LS, LO, None,
        )  # fmt: skip
        mbarrier.arrive(q_empty.index(GROUP), count=1)
        turn += 1

        empty = l == 0.0  # a row without keys: 0, and -inf
        l = gl.where(empty, 1.0, l)
        r = GROUP * BM + gl.arange(0, BM, layout=gl.SliceLayout(1, LO))
        c = gl.arange(0, D, layout=gl.SliceLayout(0, LO))
        b_v_scale = gl.load(p_v_scale + kv * D + c)
        acc = acc / gl.convert_layout(l, gl.SliceLayout(1, LO))[:, None] * b_v_scale[None, :]
        base = p_o + ((b.to(gl.int64) * length_q + q_start) * heads + h) * D
        gl.store(
            base + r[:, None] * (heads * D) + c[None, :],
            acc.to(p_o.dtype.element_ty),
            mask=(r < q_count)[:, None],
        )
        if LSE:
            value = gl.where(empty, float("-inf"), (m + gl.log2(l)) * _LN2)
            gl.store(p_lse + o_row + q_start + o_m, value, mask=o_m < q_count)


@gluon.jit
def forward_kernel(
    q_desc, k_desc, v_desc, coord_desc, run_desc, p_q_scale, p_k_scale, p_v_scale, p_o, p_lse,
    p_work_offset, p_work, p_q_start, p_q_count,
    p_full, p_whole_end, p_full_start, p_full_count, p_partial, p_partial_start, p_partial_row,
    p_lo, p_hi, p_guard, p_table,
    length_q, heads, group, tiles, variants, blocks, scale_log2,
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
    scales = (p_q_scale, p_k_scale, p_v_scale)
    sizes = (length_q, heads, group, tiles, variants, blocks, scale_log2)
    outputs = (p_o, p_lse)
    shared = (descriptors, queries, ring, lists, mask, scales, sizes, outputs)
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

"""What differs inside the loop of the Hopper kernel: masks, the scaling of scores, 16- and 8-bit values.

What 8 bits change:

* wgmma takes 8-bit values only with keys along rows, so they come transposed, tokens of every 16 in
  the order in which the weights lie in the registers of a thread (`prologue.SWAPPED`).
* Scores are scaled by a factor a row and block, q_scale * k_scale, inside the exponent: no instruction
  more than one factor for all.
* Weights are 448 times the usual ones, the range of e4m3, by an offset of the running maximum.
* Sums of INT8 products begin at 1.5 * 2^23, as whose low bits an fp32 number holds an integer: the
  accumulator is read as fp32 without conversion, and being positive it has its order as an integer,
  of which one instruction takes the maximum of three. That offset goes into the one of the exponent.
* Weights are summed by the tensor cores too, against eight columns of ones: the smallest product
  there is takes less time than 64 additions a thread. (With 16-bit weights it takes more.)
* The tensor cores sum FP8 products with 14 bits, so every block is summed from zero and added in fp32
  (SageAttention2, arXiv 2411.10958, section 3.4). The addition replaces the rescaling: it is free.

Scales of keys may be one a key instead of one a block, and a row of numbers may be added to the scores of a
tile of queries (the mean of queries times the keys, for smoothed queries): these come through shared memory,
since three warpgroups have no registers left to keep them.

In bf16 no maximum is needed where one knows a bound of all scores, |q| |k| (Cauchy-Schwarz): bf16 weights
have the exponents of fp32. `score_bound` has it, and what was measured.
"""

from __future__ import annotations

import math
from itertools import product

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .mask import KIND_SHIFT

_LOG2E: gl.constexpr = gl.constexpr(math.log2(math.e))
# log2 of the largest weight, just under the 448 of e4m3.
_WEIGHT_LOG2: gl.constexpr = gl.constexpr(8.807)
# The number of a mask, below the kinds of an entry (`mask`).
_MASK_NUMBER: gl.constexpr = gl.constexpr((1 << KIND_SHIFT) - 1)
# Where sums of INT8 products begin: as fp32, and its bits.
_OFFSET: gl.constexpr = gl.constexpr(1.5 * 2.0**23)
_OFFSET_BITS: gl.constexpr = gl.constexpr(0x4B400000)


# Masks: scores s [BM, BN] of an entry that are hidden become -inf ----------------------------------
#
# A thread holds columns 2 c, 2 c + 1 of every 8 of two rows, c its number of four, and gets the bits of a row in one
# word, in the order of its registers. Written out, because one instruction moves 7 bits of a byte to predicates, if
# these are tested together: 80 instructions a thread and not 111; LLVM would pack 64 predicates into words.


def _hide_asm(rows: int) -> str:
    """Of the 64 scores of a thread, $64 and on, the hidden ones become -inf; rows: how many words tell, $128 + 2 row."""
    lines = [".reg .b32 bit; .reg .pred p<7>;"]
    for row in range(rows):
        for byte, (first, last) in product(range(0, 32, 8), ((0, 7), (7, 8))):
            tests, choices = [], []
            for p, bit in enumerate(range(byte + first, byte + last)):
                tests += [f"and.b32 bit, ${128 + 2 * row}, {1 << bit}; setp.ne.s32 p{p}, bit, 0;"]
                at = 4 * (bit // 2) + bit % 2  # of row 0
                choices += [
                    f"selp.f32 ${at + 2 * r}, ${64 + at + 2 * r}, 0fFF800000, p{p};"
                    for r in ((row,) if rows == 2 else (0, 1))
                ]
            lines += tests + choices
    return "{ " + " ".join(lines) + " }"


_HIDE_BITS: gl.constexpr = gl.constexpr(_hide_asm(2))
_HIDE_RUN: gl.constexpr = gl.constexpr(_hide_asm(1))
_HIDE_OPERANDS: gl.constexpr = gl.constexpr(",".join(["=f"] * 64 + ["f"] * 64 + ["r"] * 64))


@gluon.jit
def _hide_run(s, count, SPEC: gl.constexpr):
    """All columns from count on are hidden."""
    s = _by_thread(s, SPEC)
    THREAD: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, s.type.layout))
    left = count - 2 * gl.arange(
        0, 4, layout=THREAD
    )  # columns 8 j + i of a thread below that are seen
    seen = 2 * (left >> 3) + gl.minimum(left & 7, 2)
    bits = (gl.full([4], 1, gl.int64, layout=THREAD) << seen) - 1
    return _hidden(s, bits.to(gl.int32)[None, :], _HIDE_RUN, SPEC)


@gluon.jit
def _load_bits(e, x, SPEC: gl.constexpr):
    """The mask of entry e: int32 [BM, 4], a word for every thread and row."""
    scores = gl.zeros([SPEC.BM, SPEC.BN], gl.float32, layout=SPEC.LS)
    BY_THREAD: gl.constexpr = gl.SliceLayout(2, _by_thread(scores, SPEC).type.layout)
    thread = gl.arange(0, 4, layout=gl.SliceLayout(0, BY_THREAD))[None, :]
    row = gl.convert_layout(x.o_row, gl.SliceLayout(1, BY_THREAD))[:, None]
    o_entry = (gl.load(x.p_mask + e) & _MASK_NUMBER) * (x.block_q * 4)
    return gl.load(x.p_bits + (o_entry + (row * 4 + thread)))


@gluon.jit
def _hide_bits(s, bits, SPEC: gl.constexpr):
    """Where bit j of a thread's word is 0, its column j of the row is hidden."""
    return _hidden(_by_thread(s, SPEC), bits, _HIDE_BITS, SPEC)


@gluon.jit
def _hidden(s, bits, ASM: gl.constexpr, SPEC: gl.constexpr):
    s = gl.inline_asm_elementwise(
        ASM, _HIDE_OPERANDS, [s, bits[:, :, None]], dtype=gl.float32, is_pure=True, pack=64
    )
    s = s.reshape([SPEC.BM, 4, SPEC.BN // 8, 2]).permute((0, 2, 1, 3))
    return gl.convert_layout(s.reshape([SPEC.BM, SPEC.BN]), SPEC.LS, assert_trivial=True)


@gluon.jit
def _by_thread(s, SPEC: gl.constexpr):
    """[BM, BN] as [BM, 4, BN / 4]: the columns of each of the four threads of a row."""
    s = s.reshape([SPEC.BM, SPEC.BN // 8, 4, 2]).permute((0, 2, 1, 3))
    return s.reshape([SPEC.BM, 4, SPEC.BN // 4])


# Rows of a number a key --------------------------------------------------------------------------------


@gluon.jit
def _row_of(rows, stage, SPEC: gl.constexpr):
    """What the producer brought along with the keys of a stage: fp32 [BN]."""
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    row = rows.index(stage)._reinterpret(gl.float32, [SPEC.BN], PLAIN)
    return row.load(gl.SliceLayout(0, SPEC.LS))


@gluon.jit
def _per_row(factor, SPEC: gl.constexpr):
    """The factor as it multiplies [BM, BN]: one for all or one a query."""
    if SPEC.SCALED:
        factor = factor[:, None]
    return factor


@gluon.jit
def pass_by(stage, phase, ring):
    """An entry that no query of the consumer sees: its turn in the ring."""
    mbarrier.wait(ring.k_full.index(stage), phase)
    mbarrier.arrive(ring.k_empty.index(stage), count=1)
    mbarrier.wait(ring.v_full.index(stage), phase)
    mbarrier.arrive(ring.v_empty.index(stage), count=1)


# One entry -----------------------------------------------------------------------------------------


@gluon.jit
def attend(acc, l, m, q, e, stage, phase, factor, x, SPEC: gl.constexpr, MASK: gl.constexpr,
           BOUNDED: gl.constexpr):  # fmt: skip
    """One block of keys and values joins the softmax: the body of the hot loop.

    acc [BM, D] and l: weighted values and weights so far, both relative to exp2(m), m [BM]. l is [BM],
    or with 8-bit values [BM, 8] of equal columns. factor: log2(e) * scale of the scores, one for all or
    [BM]. MASK: "none", "run" of so many keys as the entry counts, or "bits".
    BOUNDED: no score is above m, which stays as it is; otherwise m is the running maximum.
    """
    ring = x.ring
    if MASK == "run":
        count = gl.load(x.p_count + e)
    elif MASK == "bits":
        bits = _load_bits(e, x, SPEC)
    mbarrier.wait(ring.k_full.index(stage), phase)
    keys = ring.k.index(stage).reshape([SPEC.BN, SPEC.D]).permute((1, 0))
    if SPEC.OFFSET:
        begin = gl.full([SPEC.BM, SPEC.BN], _OFFSET_BITS, gl.int32, layout=SPEC.LS)
        s = warpgroup_mma(q, keys, begin, is_async=True)
    else:
        nothing = gl.zeros([SPEC.BM, SPEC.BN], gl.float32, layout=SPEC.LS)
        s = warpgroup_mma(q, keys, nothing, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=(s,))
    # Of three at a time, which there is for integers only. Scales and rows added come first.
    INTEGER_MAX: gl.constexpr = SPEC.OFFSET and MASK == "none" and not (SPEC.K_ROWS or SPEC.BIAS)
    if INTEGER_MAX:
        top = gl.max(s, axis=1).to(gl.float32, bitcast=True)
    s = s.to(gl.float32, bitcast=True)
    if SPEC.K_ROWS:
        if SPEC.OFFSET:
            s = s - _OFFSET
        s = s * _row_of(ring.k_scale, stage, SPEC)[None, :]
    OFFSET: gl.constexpr = SPEC.OFFSET and not SPEC.K_ROWS
    if SPEC.BIAS:
        bias = _row_of(ring.bias, stage, SPEC) * _LOG2E
        s = s * _per_row(factor, SPEC) + bias[None, :]
    if MASK == "run":
        s = _hide_run(s, count, SPEC)
    elif MASK == "bits":
        s = _hide_bits(s, bits, SPEC)
    if SPEC.SCALED and MASK != "none":
        factor = gl.maximum(factor, 1.0e-37)  # -inf * 0 is no number
    mbarrier.arrive(ring.k_empty.index(stage), count=1)

    if BOUNDED:
        p = gl.exp2(s * factor - m[:, None])
        rescale = 1.0
    else:
        if not INTEGER_MAX:
            top = gl.max(s, axis=1)
        if SPEC.BIAS:
            if OFFSET:
                top -= _OFFSET * factor
        elif OFFSET:
            top = (top - _OFFSET) * factor
        else:
            top = top * factor
        if SPEC.VALUES_8BIT:
            top -= _WEIGHT_LOG2
        m_new = gl.maximum(m, top)
        offset = m_new
        if MASK != "none":  # a row that has seen nothing yet: exp2(-inf - 0), not -inf - -inf
            offset = gl.where(m_new == float("-inf"), 0.0, m_new)
        rescale = gl.exp2(m - offset)
        m = m_new
        if OFFSET:
            offset += _OFFSET * factor
        if SPEC.BIAS:
            p = gl.exp2(s - offset[:, None])
        else:
            p = gl.exp2(s * _per_row(factor, SPEC) - offset[:, None])
    if SPEC.VALUES_8BIT:
        acc, l = _add_8bit(acc, l, p, rescale, stage, phase, ring, SPEC)
    elif BOUNDED:
        l = l + gl.sum(p, axis=1)
        acc = _add_16bit(acc, p, stage, phase, ring, SPEC)
    else:
        l = l * rescale + gl.sum(p, axis=1)
        acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, SPEC.LO))[:, None]
        acc = _add_16bit(acc, p, stage, phase, ring, SPEC)
    return acc, l, m


@gluon.jit
def _add_16bit(acc, p, stage, phase, ring, SPEC: gl.constexpr):
    """acc + p v, summed by the tensor cores."""
    LP: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=SPEC.LO, k_width=2)
    weights = gl.convert_layout(p.to(ring.v.dtype), LP)
    mbarrier.wait(ring.v_full.index(stage), phase)
    values = ring.v.index(stage).reshape([SPEC.BN, SPEC.D])
    acc = warpgroup_mma(weights, values, acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(ring.v_empty.index(stage), count=1)
    return acc


@gluon.jit
def _add_8bit(acc, l, p, rescale, stage, phase, ring, SPEC: gl.constexpr):
    """acc * rescale + p v and l * rescale + p 1, the products summed from zero."""
    LPL: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=SPEC.LL, k_width=4)
    weights = _e4m3_operand(p, SPEC)
    mbarrier.wait(ring.v_full.index(stage), phase)
    values = ring.v.index(stage).reshape([SPEC.D, SPEC.BN]).permute((1, 0))
    nothing = gl.zeros([SPEC.BM, SPEC.D], gl.float32, layout=SPEC.LO)
    part = warpgroup_mma(weights, values, nothing, use_acc=False, is_async=True)
    weights = gl.convert_layout(weights, LPL, assert_trivial=True)
    nothing = gl.zeros([SPEC.BM, 8], gl.float32, layout=SPEC.LL)
    count = warpgroup_mma(weights, ring.ones.permute((1, 0)), nothing, use_acc=False, is_async=True)
    part, count = warpgroup_mma_wait(0, deps=(part, count))
    mbarrier.arrive(ring.v_empty.index(stage), count=1)
    l = l * gl.convert_layout(rescale, gl.SliceLayout(1, SPEC.LL))[:, None] + count
    return acc * gl.convert_layout(rescale, gl.SliceLayout(1, SPEC.LO))[:, None] + part, l


@gluon.jit
def ones_like_values(v_dtype: gl.constexpr, SPEC: gl.constexpr):
    """Eight columns of e4m3 ones in shared memory, transposed."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
    SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([8, SPEC.BN], v_dtype)
    ones = gl.allocate_shared_memory(v_dtype, [8, SPEC.BN], SHARED)
    # Not from 1.0: ptxas of Triton 3.6 drops the conversion of a constant to e4m3.
    one = gl.full([8, SPEC.BN], 0x38, gl.int8, layout=LAYOUT)
    ones.store(one.to(v_dtype, bitcast=True))
    fence_async_shared()
    return ones


@gluon.jit
def _e4m3_operand(p, SPEC: gl.constexpr):
    """fp32 weights, as scores lie in registers, to the e4m3 operand of wgmma. Columns change their
    names and not their places: those of the stored values are in the same order."""
    BM: gl.constexpr = SPEC.BM
    BN: gl.constexpr = SPEC.BN
    LP: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=SPEC.LO, k_width=4)
    p = p.reshape([BM, BN // 16, 2, 4, 2]).permute((0, 1, 3, 2, 4)).reshape([BM, BN])
    p = gl.convert_layout(p, LP, assert_trivial=True)
    return gl.inline_asm_elementwise(
        "{ .reg .b16 lo, hi; cvt.rn.satfinite.e4m3x2.f32 lo, $2, $1;"
        " cvt.rn.satfinite.e4m3x2.f32 hi, $4, $3; mov.b32 $0, {lo, hi}; }",
        "=r,r,r,r,r", [p], dtype=gl.float8e4nv, is_pure=True, pack=4,
    )  # fmt: skip

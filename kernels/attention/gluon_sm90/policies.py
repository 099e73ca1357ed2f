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

Keys of a block may share a scale with those whose scores the same thread holds, 32 of 128 (SageAttention2,
section 3.3): a thread then has one factor for a row as before, and applies it before the maxima of threads meet.
Scales of keys may also be one a key, and a row of numbers may be added to the scores of a
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
from triton.experimental.gluon.language.nvidia.ampere import async_copy
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
MASK_NUMBER: gl.constexpr = gl.constexpr((1 << KIND_SHIFT) - 1)
# Where sums of INT8 products begin: as fp32, and its bits.
_OFFSET: gl.constexpr = gl.constexpr(1.5 * 2.0**23)
# Bits of a score that a code of INT8 counts, from which sums of these and offsets are too coarse for 16-bit weights.
_MOST_FACTOR: gl.constexpr = gl.constexpr(8.0)
_OFFSET_BITS: gl.constexpr = gl.constexpr(0x4B400000)


# Masks ---------------------------------------------------------------------------------------------
#
# A thread holds columns 2 c, 2 c + 1 of every 8 of two rows, c its number of four, and gets the bits of a row in one
# word, in the order of its registers. Written out, because one instruction moves 7 bits of a byte to predicates, if
# these are tested together: 80 instructions a thread and not 111; LLVM would pack 64 predicates into words.
#
# Hidden scores become -inf. Sums of INT8 products begin anyway, and hidden ones at a number under all others: that
# replaces instructions, and the order as integers stays. 485 instructions a block, 440 without a mask, 570 with -inf.


def _choose(rows: int, words: int, seen: str, hidden: str) -> str:
    """Of the 64 scores of a thread those that are seen, `hidden` for the rest; rows: how many words tell, from operand
    `words` on."""
    lines = [".reg .b32 bit; .reg .pred p<7>;"]
    for row in range(rows):
        for byte, (first, last) in product(range(0, 32, 8), ((0, 7), (7, 8))):
            tests, choices = [], []
            for p, bit in enumerate(range(byte + first, byte + last)):
                word = f"${words + 2 * row}"
                tests += [f"and.b32 bit, {word}, {1 << bit}; setp.ne.s32 p{p}, bit, 0;"]
                at = 4 * (bit // 2) + bit % 2  # of row 0
                choices += [
                    f"selp.b32 ${i}, {seen.format(64 + i)}, {hidden}, p{p};"
                    for i in ((at + 2 * row,) if rows == 2 else (at, at + 2))
                ]
            lines += tests + choices
    return "{ " + " ".join(lines) + " }"


_HIDE_RUN: gl.constexpr = gl.constexpr(_choose(1, 128, "${}", "0xFF800000"))
_HIDE_BITS: gl.constexpr = gl.constexpr(_choose(2, 128, "${}", "0xFF800000"))
_BEGIN_RUN: gl.constexpr = gl.constexpr(_choose(1, 64, "0x4B400000", "0xFF000000"))
_BEGIN_BITS: gl.constexpr = gl.constexpr(_choose(2, 64, "0x4B400000", "0xFF000000"))
_HIDE_OPERANDS: gl.constexpr = gl.constexpr(",".join(["=f"] * 64 + ["f"] * 64 + ["r"] * 64))
_BEGIN_OPERANDS: gl.constexpr = gl.constexpr(",".join(["=r"] * 64 + ["r"] * 64))


@gluon.jit
def _words_of(e, x, SPEC: gl.constexpr, MASK: gl.constexpr):
    """What entry e shows, int32: a word for every thread, [1, 4], or also for every row, [BM, 4]."""
    thread = thread_numbers(SPEC)
    if MASK == "run":
        left = (
            gl.load(x.p_count + e) - 2 * thread
        )  # columns 8 j + i of a thread below that are seen
        seen = 2 * (left >> 3) + gl.minimum(left & 7, 2)
        bits = (gl.full([4], 1, gl.int64, layout=thread.type.layout) << seen) - 1
        words = bits.to(gl.int32)[None, :]
    else:
        row = gl.convert_layout(x.o_row, gl.SliceLayout(1, thread.type.layout.parent))
        o_entry = (gl.load(x.p_mask + e) & MASK_NUMBER) * (x.block_q * 4)
        words = gl.load(x.p_bits + (o_entry + (row[:, None] * 4 + thread[None, :])))
    return words


@gluon.jit
def _hidden(s, words, SPEC: gl.constexpr, MASK: gl.constexpr):
    """Scores [BM, BN], -inf where the words have 0."""
    ASM: gl.constexpr = _HIDE_RUN if MASK == "run" else _HIDE_BITS
    s = gl.inline_asm_elementwise(
        ASM, _HIDE_OPERANDS, [_by_thread(s, SPEC), words[:, :, None]], dtype=gl.float32,
        is_pure=True, pack=64,
    )  # fmt: skip
    return _by_column(s, SPEC)


@gluon.jit
def _beginnings(words, SPEC: gl.constexpr, MASK: gl.constexpr):
    """Where sums of INT8 products begin, int32 [BM, BN]."""
    ASM: gl.constexpr = _BEGIN_RUN if MASK == "run" else _BEGIN_BITS
    words = words[:, :, None].broadcast_to([SPEC.BM, 4, SPEC.BN // 4])
    begin = gl.inline_asm_elementwise(
        ASM, _BEGIN_OPERANDS, [words], dtype=gl.int32, is_pure=True, pack=64
    )
    return _by_column(begin, SPEC)


@gluon.jit
def _by_thread(s, SPEC: gl.constexpr):
    """[BM, BN] as [BM, 4, BN / 4]: the columns of each of the four threads of a row."""
    s = s.reshape([SPEC.BM, SPEC.BN // 8, 4, 2]).permute((0, 2, 1, 3))
    return s.reshape([SPEC.BM, 4, SPEC.BN // 4])


@gluon.jit
def _by_column(s, SPEC: gl.constexpr):
    """The inverse of `_by_thread`."""
    s = s.reshape([SPEC.BM, 4, SPEC.BN // 8, 2]).permute((0, 2, 1, 3))
    return gl.convert_layout(s.reshape([SPEC.BM, SPEC.BN]), SPEC.LS, assert_trivial=True)


# Numbers of a row and thread -------------------------------------------------------------------------------


@gluon.jit
def thread_numbers(SPEC: gl.constexpr):
    """0 .. 3 [4], the threads of a row, where numbers [BM, 4] of rows and threads have their columns."""
    scores = gl.zeros([SPEC.BM, SPEC.BN], gl.float32, layout=SPEC.LS)
    BY_THREAD: gl.constexpr = gl.SliceLayout(2, _by_thread(scores, SPEC).type.layout)
    return gl.arange(0, 4, layout=gl.SliceLayout(0, BY_THREAD))


@gluon.jit
def for_threads(x, SPEC: gl.constexpr):
    """A number a row [BM] as the same for all threads of a row, [BM, 1]."""
    THREADS: gl.constexpr = thread_numbers(SPEC).type.layout.parent
    return gl.convert_layout(x, gl.SliceLayout(1, THREADS), assert_trivial=True)[:, None]


@gluon.jit
def _of_rows(x, SPEC: gl.constexpr):
    """The largest of every row [BM] of numbers [BM, 4] of rows and threads."""
    return gl.convert_layout(gl.max(x, axis=1), gl.SliceLayout(1, SPEC.LS), assert_trivial=True)


# Rows of a number a key --------------------------------------------------------------------------------


@gluon.jit
def _row_of(rows, stage, SPEC: gl.constexpr):
    """What the producer brought along with the keys of a stage: fp32 [BN]."""
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    row = rows.index(stage)._reinterpret(gl.float32, [SPEC.BN], PLAIN)
    return row.load(gl.SliceLayout(0, SPEC.LS))


@gluon.jit
def _per_row(factor, SPEC: gl.constexpr):
    """The factor as it multiplies [BM, BN]: one for all, one a query, or [BM, 4] one a query and thread."""
    if SPEC.K_GROUPS > 1:
        factor, _ = gl.broadcast(
            factor[:, :, None],
            _by_thread(gl.zeros([SPEC.BM, SPEC.BN], gl.float32, layout=SPEC.LS), SPEC),
        )
        factor = _by_column(factor, SPEC)
    elif SPEC.SCALED:
        factor = factor[:, None]
    return factor


@gluon.jit
def _greatest(s, SPEC: gl.constexpr):
    """Of every row [BM], or where threads have factors of their own [BM, 4], of each of these."""
    if SPEC.K_GROUPS > 1:
        top = gl.max(_by_thread(s, SPEC), axis=2)
    else:
        top = gl.max(s, axis=1)
    return top


@gluon.jit
def let_go(empty, SPEC: gl.constexpr, pred=True):
    """The consumer needs a buffer no more. One thread says so for all, or in plans with masks, which take all predicates,
    each for itself: ptxas would read the number of the thread anew every time and let keys go late. Measured on an H200:
    windows with masks 0% to 6% faster, FP8 without masks 4% slower."""
    if SPEC.PARTIAL:
        if pred:
            async_copy.mbarrier_arrive(empty, increment_count=False)
    else:
        mbarrier.arrive(empty, count=1, pred=pred)


@gluon.jit
def pass_by(stage, phase, ring, SPEC: gl.constexpr):
    """An entry that no query of the consumer sees: its turn in the ring."""
    mbarrier.wait(ring.k_full.index(stage), phase)
    let_go(ring.k_empty.index(stage), SPEC)
    mbarrier.wait(ring.v_full.index(stage), phase)
    let_go(ring.v_empty.index(stage), SPEC)


# One entry -----------------------------------------------------------------------------------------


@gluon.jit
def attend(acc, l, m, q, e, stage, phase, factor, x, SPEC: gl.constexpr, MASK: gl.constexpr,
           BOUNDED: gl.constexpr, done=None):  # fmt: skip
    """One block of keys and values joins the softmax: the body of the hot loop.

    acc [BM, D] and l: weighted values and weights so far, both relative to exp2(m), m [BM]. l is [BM],
    or with 8-bit values [BM, 8] of equal columns. factor: log2(e) * scale of the scores, one for all, [BM], or
    [BM, 4] of every thread of a row. MASK: "none", "run" of so many keys as the entry counts, or "bits".
    BOUNDED: no score is above m, which stays as it is; otherwise m is the running maximum. done: whether this is the
    last one that needs q, None if it is not.
    """
    ring = x.ring
    # Sums of INT8 products, to which neither scales nor rows come before their maximum.
    SUMS: gl.constexpr = SPEC.OFFSET and not (SPEC.K_ROWS or SPEC.BIAS)
    if MASK != "none":
        words = _words_of(e, x, SPEC, MASK)
    mbarrier.wait(ring.k_full.index(stage), phase)
    keys = ring.k.index(stage).reshape([SPEC.BN, SPEC.D]).permute((1, 0))
    if SPEC.OFFSET:
        if SUMS and MASK != "none":
            begin = _beginnings(words, SPEC, MASK)
        else:
            begin = gl.full([SPEC.BM, SPEC.BN], _OFFSET_BITS, gl.int32, layout=SPEC.LS)
        s = warpgroup_mma(q, keys, begin, is_async=True)
    else:
        nothing = gl.zeros([SPEC.BM, SPEC.BN], gl.float32, layout=SPEC.LS)
        s = warpgroup_mma(q, keys, nothing, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=(s,))
    if SUMS:  # the maximum of three at a time, which there is for integers only
        top = _greatest(s, SPEC).to(gl.float32, bitcast=True)
        if MASK != "none":
            top = gl.where(top < 0.0, float("-inf"), top)  # nothing seen
    s = s.to(gl.float32, bitcast=True)
    if SPEC.K_ROWS:
        if SPEC.OFFSET:
            s = s - _OFFSET
        s = s * _row_of(ring.k_scale, stage, SPEC)[None, :]
    OFFSET: gl.constexpr = SPEC.OFFSET and not SPEC.K_ROWS
    if SPEC.BIAS:
        bias = _row_of(ring.bias, stage, SPEC) * _LOG2E
        s = s * _per_row(factor, SPEC) + bias[None, :]
    if MASK != "none" and not SUMS:
        s = _hidden(s, words, SPEC, MASK)
    if SPEC.SCALED and MASK != "none":
        factor = gl.maximum(factor, 1.0e-35)  # -inf * 0 is no number, and -2^127 * 0 is not hidden
    let_go(ring.k_empty.index(stage), SPEC)
    if done is not None:
        let_go(x.q_empty, SPEC, done)

    if BOUNDED:
        p = gl.exp2(s * factor - m[:, None])
        rescale = 1.0
    else:
        if not SUMS:
            top = _greatest(s, SPEC)
        if SPEC.BIAS:
            if OFFSET:
                top -= _OFFSET * factor
        elif OFFSET:
            top = (top - _OFFSET) * factor
        else:
            top = top * factor
        if SPEC.K_GROUPS > 1:
            top = _of_rows(top, SPEC)
        if SPEC.VALUES_8BIT:
            top -= _WEIGHT_LOG2
        m_new = gl.maximum(m, top)
        offset = m_new
        if MASK != "none":  # a row that has seen nothing yet: exp2(-inf - 0), not -inf - -inf
            offset = gl.where(m_new == float("-inf"), 0.0, m_new)
        rescale = gl.exp2(m - offset)
        m = m_new
        b_offset = offset[:, None]
        if OFFSET:
            # The sum is off by up to 0.75 factors: of weights in 16 bits none may be infinite.
            start = _OFFSET
            if not SPEC.VALUES_8BIT:
                start = gl.where(factor > _MOST_FACTOR, _OFFSET + 2.0, _OFFSET)
            if SPEC.K_GROUPS > 1:
                offset = for_threads(offset, SPEC)
            b_offset = _per_row(offset + start * factor, SPEC)
        if SPEC.BIAS:
            p = gl.exp2(s - b_offset)
        else:
            p = gl.exp2(s * _per_row(factor, SPEC) - b_offset)
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
    let_go(ring.v_empty.index(stage), SPEC)
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
    let_go(ring.v_empty.index(stage), SPEC)
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

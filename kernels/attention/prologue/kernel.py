"""The kernels of this package, in portable Triton; `launch` cuts and launches them.

`rows_kernel` reads every element of Q and K once: a program takes a block of tokens, keeps its rows of the
rotary table in registers, and walks over several heads. Q and K have tiles of their own: a row with a scale
of its own is best off in small programs, and a scale of 128 rows needs them all in registers, 64 numbers a
thread (head dim 128). `value_kernel` does V, one head a program, so that a tile can be transposed. Only
smoothing and per-channel scales need `before.first_kernel` before them: it leaves a partial result per chunk of
tokens, which the first programs of the launch of Q add up in a fixed order, so that equal inputs give equal
bits.

In 8 bits the time is that of instructions and barriers, not of bytes: an SM of an H200 may spend 22
instructions on an element in the time that memory takes to bring it. So the weights of the norm are
multiplied into the rotary table once for all heads, the norm of a row into its scale, V is transposed inside
threads, and sums over tokens never cross threads.

Launches after the first may be early ones (`EARLY`, `WAIT`): they begin while the one in front still
runs, and wait where they need its results (programmatic dependent launch, Hopper and newer).

Maxima of magnitudes are compared as the bits of fp32, as integers: the order is the same, NaN lies above
infinity and is not lost, and Hopper compares three at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

INTERPRETED = triton.knobs.runtime.interpret
# The least maximum that a scale is made of, 2**-100: all scales are normal fp32 numbers.
_TINY_BITS: tl.constexpr = tl.constexpr((127 - 100) << 23)
_INFINITY_BITS: tl.constexpr = tl.constexpr(0xFF << 23)
_NAN_BITS: tl.constexpr = tl.constexpr(0x7FC << 20)
# Triton 3.6's interpreter loses the carry of a rounding to fp8 (31.9 becomes 16) and is off below 2**-6.
_ROUND_FIRST: tl.constexpr = tl.constexpr(INTERPRETED)
# 1.5 * 2**23: adding it rounds to the nearest even integer, which is then in the low bits.
_MAGIC: tl.constexpr = tl.constexpr(12582912.0)


@triton.jit
def _source(side, o_t):
    """Input rows of the output rows `o_t`, int64, and whether there is one."""
    read = o_t < side.out_length
    o_row = o_t.to(tl.int64)
    if side.order is not None:
        o_row = tl.load(side.order + o_t, mask=read, other=-1).to(tl.int64)
        read = (o_row >= 0) & (o_row < side.length)
    return o_row, read


@triton.jit
def _split(b_x, BM: tl.constexpr, BD: tl.constexpr):
    """Even and odd columns, [BM, BD / 2] each."""
    return tl.split(tl.reshape(b_x, (BM, BD // 2, 2)))


@triton.jit
def _load_rows(p, read, D: tl.constexpr, BD: tl.constexpr):
    """[BM, BD] in fp32; zero where `read` is false and past column D."""
    inside = read[:, None] & (tl.arange(0, BD) < D)[None, :]
    return tl.load(p, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _load_weight(p, D: tl.constexpr, BD: tl.constexpr):
    """Even and odd channels, [1, BD / 2] each."""
    o_d = 2 * tl.arange(0, BD // 2)
    b_even = tl.load(p + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    b_odd = tl.load(p + o_d + 1, mask=o_d < D, other=0.0).to(tl.float32)
    return b_even[None, :], b_odd[None, :]


@triton.jit
def _load_tables(
    rotary, o_row, read, PAIRS: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr
):
    """cos and sin of every pair, [BM, BD / 2] each: of full tables cos at the even and sin at the odd
    columns, as diffusers' Wan reads them. Halves are read in the same layout of registers."""
    o_d = tl.arange(0, BD)
    inside = read[:, None] & (o_d < D)[None, :]
    o_table = (o_d // 2 if PAIRS else o_d)[None, :]
    p_cos = rotary.cos + o_row[:, None] * rotary.cos_s + o_table
    p_sin = rotary.sin + o_row[:, None] * rotary.sin_s + o_table
    b_cos, _ = _split(tl.load(p_cos, mask=inside, other=0.0).to(tl.float32), BM, BD)
    _, b_sin = _split(tl.load(p_sin, mask=inside, other=0.0).to(tl.float32), BM, BD)
    return b_cos, b_sin


@triton.jit
def _load_factors(
    side, rotary, o_row, read, PAIRS: tl.constexpr, FOLD: tl.constexpr, ACROSS: tl.constexpr,
    D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """What does not depend on the head: the weights (w_even, w_odd) of the norm and (c_even, s_odd, c_odd,
    s_even), which make of a pair (a, b) the pair (a c_even - b s_odd, b c_odd + a s_even). With `FOLD` the
    latter include the weights, for twice the registers."""
    nothing = tl.zeros((1, 1), tl.float32)
    weights = (nothing, nothing)
    if side.weight is not None and not ACROSS:
        weights = _load_weight(side.weight, D, BD)
    factors = (nothing, nothing, nothing, nothing)
    if rotary is not None:
        b_cos, b_sin = _load_tables(rotary, o_row, read, PAIRS, D, BM, BD)
        factors = (b_cos, b_sin, b_cos, b_sin)
        if FOLD:
            factors = (
                b_cos * weights[0],
                b_sin * weights[1],
                b_cos * weights[1],
                b_sin * weights[0],
            )
    return weights, factors


@triton.jit
def _pairs_of_head(
    side, rotary, weights, factors, b_x, b_rms, h, eps, FOLD: tl.constexpr, ACROSS: tl.constexpr,
    D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Even and odd columns, weighted and rotated, [BM, BD / 2], and what their rows lack to be normed:
    b_rms, or with a norm of their own theirs."""
    b_a, b_b = _split(b_x, BM, BD)
    if side.weight is not None and not ACROSS:
        b_rms = tl.rsqrt(tl.sum(b_a * b_a + b_b * b_b, 1) / D + eps)
    if side.weight is not None and not FOLD:
        if ACROSS:
            weights = _load_weight(side.weight + h * D, D, BD)
        b_a, b_b = b_a * weights[0], b_b * weights[1]
    if rotary is not None:
        b_a, b_b = b_a * factors[0] - b_b * factors[1], b_b * factors[2] + b_a * factors[3]
    return b_a, b_b, b_rms


@triton.jit
def _maximum(bits):
    """The maximum as a number above zero, NaN if it is not finite."""
    bits = tl.where(bits < _INFINITY_BITS, tl.maximum(bits, _TINY_BITS), _NAN_BITS)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _codes(b_y, element: tl.constexpr):
    """Rounded to the nearest code, ties to even; NaN becomes any code."""
    if element == tl.int8:
        return (b_y + _MAGIC).to(tl.int32, bitcast=True).to(tl.int8)
    else:
        if _ROUND_FIRST:
            bits = b_y.to(tl.int32, bitcast=True)
            bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & ~0xFFFFF
            b_small = (b_y + 24576.0) - 24576.0  # 1.5 * 2**14: to multiples of 2**-9
            b_y = tl.where(tl.abs(b_y) < 2.0**-6, b_small, bits.to(tl.float32, bitcast=True))
        return b_y.to(element)


@triton.jit
def _packed(b_even, b_odd):
    """Numbers up to 7 in magnitude as codes of 4 bits, those of even columns in the low bits: uint8."""
    packed = (_codes(b_even, tl.int8) & 15) | (_codes(b_odd, tl.int8) << 4)
    return packed.to(tl.uint8, bitcast=True)


@triton.jit
def _walk_heads(
    side, rotary, program, per, eps, fold, N: tl.constexpr, G: tl.constexpr, LIMIT: tl.constexpr, PAIRS: tl.constexpr,
    ACROSS: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
    LATE: tl.constexpr,
):  # fmt: skip
    """A block of tokens of `per` heads. Groups of heads lie side by side and share the rotary table in the L2 cache."""
    FOLD: tl.constexpr = (
        rotary is not None and side.weight is not None and not ACROSS and BM * BD <= 2048
    )
    groups, blocks = tl.cdiv(side.heads, per), tl.cdiv(side.out_length, BM)
    first = (program % groups) * per
    block = (program // groups) % blocks
    b = (program // (groups * blocks)).to(tl.int64)
    element: tl.constexpr = side.out.dtype.element_ty
    PER: tl.constexpr = 2 if element == tl.uint8 else 1  # codes a byte
    o_d, o_c = tl.arange(0, BD), tl.arange(0, BD // PER)
    o_t = block * BM + tl.arange(0, BM)
    o_row, read = _source(side, o_t)
    stored = (o_t < side.out_length)[:, None] & (o_c < D // PER)[None, :]
    p_x = side.x + b * side.b + o_row[:, None] * side.s + o_d[None, :]
    p_out = side.out + b * side.out_b + o_t.to(tl.int64)[:, None] * side.out_s + o_c[None, :]
    weights, factors = _load_factors(side, rotary, o_row, read, PAIRS, FOLD, ACROSS, D, BM, BD)
    if LATE:  # the table is no result of a launch before
        gdc_wait()
        gdc_launch_dependents()
    b_rms = tl.full((BM,), 1.0, tl.float32)
    if ACROSS:
        b_rms = tl.load(side.rms + b * side.length + o_row, mask=read, other=0.0)
    for index in tl.range(first, tl.minimum(first + per, side.heads), num_stages=STAGES):
        h = tl.zeros((), tl.int64) + index  # the interpreter counts in Python integers
        b_x = _load_rows(p_x + h * side.h, read, D, BD)
        b_a, b_b, b_row = _pairs_of_head(
            side, rotary, weights, factors, b_x, b_rms, h, eps, FOLD, ACROSS, D, BM, BD
        )
        bh = b * side.heads + h
        if side.mean is not None:
            b_mean = tl.load(side.mean + bh * D + o_d, mask=o_d < D, other=0.0)
            m_a, m_b = tl.split(tl.reshape(b_mean, (BD // 2, 2)))
            b_a = b_a * b_row[:, None] - m_a[None, :]
            b_b = b_b * b_row[:, None] - m_b[None, :]
            # Rows of padding stay zero: a mean there would cost them the best of their scale.
            b_row = tl.where(read, 1.0, 0.0)
        if N == 0:
            b_row *= 1.0 / tl.load(side.scale + bh)
        elif LIMIT > 0:
            b_top = tl.maximum(tl.abs(b_a), tl.abs(b_b), propagate_nan=tl.PropagateNan.ALL)
            bits = tl.max(b_top.to(tl.int32, bitcast=True), 1)  # [BM]
            bits = (bits.to(tl.float32, bitcast=True) * b_row).to(tl.int32, bitcast=True)
            if G == 1:
                top = _maximum(tl.max(tl.reshape(bits, (BM // N, N)), 1))  # [BM / N]
                inverse = tl.broadcast_to((LIMIT / top)[:, None], (BM // N, N))
            else:  # rows of equal n % 8 // (8 / G) share a scale
                SHAPE: tl.constexpr = (BM // N, N // 8, G, 8 // G)
                top = _maximum(tl.max(tl.max(tl.reshape(bits, SHAPE), 3), 1))  # [BM / N, G]
                inverse = tl.broadcast_to((LIMIT / top)[:, None, :, None], SHAPE)
                top = tl.reshape(top, (BM // N * G,))
            scales = tl.cdiv(side.out_length, N) * G
            o_n = block * (BM // N * G) + tl.arange(0, BM // N * G)
            tl.store(side.scale + bh * scales + o_n, top * (fold / LIMIT), mask=o_n < scales)
            b_row *= tl.reshape(inverse, (BM,))
        b_a, b_b = b_a * b_row[:, None], b_b * b_row[:, None]
        b_y = tl.reshape(tl.join(b_a, b_b), (BM, BD))
        if PER == 2:
            tl.store(p_out + h * side.out_h, _packed(b_a, b_b), mask=stored)
        elif LIMIT > 0:
            tl.store(p_out + h * side.out_h, _codes(b_y, element), mask=stored)
        else:
            tl.store(p_out + h * side.out_h, b_y.to(element), mask=stored)


@triton.jit
def _add_up(
    side, bh, blocks, LIMIT: tl.constexpr, TOPS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr
):
    """Mean of K from the partial sums of one head; TOPS: also its scale, of a bound of what the mean leaves."""
    BM: tl.constexpr = 1024 // BD
    WIDE: tl.constexpr = 2 * D if TOPS else D
    o_m, o_d = tl.arange(0, BM), tl.arange(0, BD)
    acc = tl.zeros((BM, BD), tl.float32)
    top = tl.zeros((BM, BD), tl.int32)
    for start in range(0, blocks, BM):
        inside = (start + o_m < blocks)[:, None] & (o_d < D)[None, :]
        p = side.part + (bh * blocks + start + o_m)[:, None] * WIDE + o_d[None, :]
        acc += tl.load(p, mask=inside, other=0.0)
        if TOPS:
            more = tl.load(p + D, mask=inside, other=0.0)
            top = tl.maximum(top, more.to(tl.int32, bitcast=True))
    b_mean = tl.zeros((BD,), tl.float32)
    if side.mean is not None:
        b_mean = tl.sum(acc, 0) / side.length
        tl.store(side.mean + bh * D + o_d, b_mean, mask=o_d < D)
    if TOPS:
        b_top = tl.max(top, 0).to(tl.float32, bitcast=True) + tl.abs(b_mean)
        tl.store(side.scale + bh, _maximum(tl.max(b_top.to(tl.int32, bitcast=True), 0)) / LIMIT)


@triton.jit
def _greatest(side, bh, blocks, D: tl.constexpr, BD: tl.constexpr):
    """Scale of V per channel from the partial maxima of one head."""
    BM: tl.constexpr = 1024 // BD
    o_m, o_d = tl.arange(0, BM), tl.arange(0, BD)
    acc = tl.zeros((BM, BD), tl.int32)
    for start in range(0, blocks, BM):
        inside = (start + o_m < blocks)[:, None] & (o_d < D)[None, :]
        p = side.part + (bh * blocks + start + o_m)[:, None] * D + o_d[None, :]
        acc = tl.maximum(acc, tl.load(p, mask=inside, other=0.0).to(tl.int32, bitcast=True))
    tl.store(side.scale + bh * D + o_d, _maximum(tl.max(acc, 0)) / 448.0, mask=o_d < D)


@triton.jit
def rows_kernel(
    k_total, v_total, q, k, rotary, end_k_total, end_v_total, end_q, k_chunks, v_chunks,
    per_q, per_k, eps, fold, NQ: tl.constexpr, NK: tl.constexpr, GK: tl.constexpr, LIMIT: tl.constexpr,
    PAIRS: tl.constexpr, ACROSS: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
    STAGES: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """WAIT: who waits for the launch in front, "totals" alone, "all", or "" (no early launch). Where all
    do, the next launch begins when everything before this one is done: V then runs beside K."""
    program = tl.program_id(0)
    LATE: tl.constexpr = WAIT == "all"
    if WAIT == "totals":
        gdc_launch_dependents()
    if WAIT != "" and program < end_v_total:
        gdc_wait()
    if k_total.x is not None and program < end_k_total:
        _add_up(k_total, program.to(tl.int64), k_chunks, LIMIT, NK == 0, D, BD)
    if v_total.x is not None and (program >= end_k_total) & (program < end_v_total):
        _greatest(v_total, (program - end_k_total).to(tl.int64), v_chunks, D, BD)
    if q.x is not None and (program >= end_v_total) & (program < end_q):
        _walk_heads(q, rotary, program - end_v_total, per_q, eps, fold, NQ, 1, LIMIT, PAIRS,
                    ACROSS, D, BM, BD, STAGES, LATE)  # fmt: skip
    if k.x is not None and program >= end_q:
        _walk_heads(k, rotary, program - end_q, per_k, eps, 1.0, NK, GK, LIMIT, PAIRS, ACROSS, D,
                    BM, BD, STAGES, LATE)  # fmt: skip


@triton.jit  # `padded` is specialised: a mask that ends anywhere makes stores of single bytes
def value_kernel(
    v, padded, LIMIT: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
    ROWS: tl.constexpr, TRANSPOSED: tl.constexpr, SWAPPED: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """A thread holds every ROWS-th row of the tile. Row m is token (m % ROWS) * BM / ROWS + m / ROWS, so
    that those are neighbours, and transposing moves registers and then whole 16 bytes."""
    program, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    # Heads side by side; a second axis of the launch would end at 65,535 blocks.
    h = (program % v.heads).to(tl.int64)
    element: tl.constexpr = v.out.dtype.element_ty
    o_d, o_m = tl.arange(0, BD), tl.arange(0, BM)
    first = program // v.heads * BM
    o_t = first + o_m % ROWS * (BM // ROWS) + o_m // ROWS
    if SWAPPED:  # column j of 16 holds token (0 1 8 9 2 3 10 11 4 5 12 13 6 7 14 15)[j]
        o_t = (o_t & ~14) | ((o_t & 2) << 2) | ((o_t & 12) >> 1)
    o_row, read = _source(v, o_t)
    p = v.x + b * v.b + h * v.h + o_row[:, None] * v.s + o_d[None, :]
    b_v = _load_rows(p, read, D, BD)
    if WAIT == "first":
        gdc_wait()
    if LIMIT > 0:
        scale = tl.load(v.scale + (b * v.heads + h) * D + o_d, mask=o_d < D, other=1.0)
        b_v *= (1.0 / scale)[None, :]
    p = v.out + b * v.out_b + h * v.out_h
    inside = first + o_m < padded
    if TRANSPOSED:
        b_v = tl.permute(tl.reshape(b_v, (BM // ROWS, ROWS, BD)), (2, 1, 0))
        b_v = tl.reshape(b_v, (BD, BM))
        p = p + o_d.to(tl.int64)[:, None] * v.out_d + (first + o_m)[None, :]
        inside = (o_d < D)[:, None] & inside[None, :]
    else:
        p = p + (first + o_m).to(tl.int64)[:, None] * v.out_s + o_d[None, :]
        inside = inside[:, None] & (o_d < D)[None, :]
    if LIMIT > 0:
        tl.store(p, _codes(b_v, element), mask=inside)
    else:
        tl.store(p, b_v.to(element), mask=inside)
    if WAIT == "last" and program == tl.num_programs(0) - 1:
        gdc_wait()  # one program is enough: what follows this launch must follow the one before, too

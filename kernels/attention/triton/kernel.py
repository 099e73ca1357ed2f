"""The device code of `host`: policies of masks and products, the walk over a list, the kernel.

One program computes one query tile of one head. It walks three lists with the online softmax of
FlashAttention (Dao, arXiv 2307.08691, algorithm 1): partial entries under an interval or a bit mask, ragged
full entries (shorter than the block), and whole full entries with no mask at all. The hot loop comes last,
so that what masks need is no longer in registers there.

With codes of 8 bits (`prologue`), scores are scaled inside the exponent by a factor a row and block,
q_scale * k_scale, and FP8 weights are 448 times the usual ones, the range of e4m3. Tensor cores of sm_89 and
sm_90 sum FP8 products with 14 bits, so every block is summed from zero and added in fp32 (SageAttention2,
arXiv 2411.10958, section 3.4); the addition replaces the rescaling.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

LN2: tl.constexpr = tl.constexpr(math.log(2.0))
# log2 of the largest FP8 weight, just under the 448 of e4m3.
_WEIGHT_LOG2: tl.constexpr = tl.constexpr(8.807)


# Policies of masks: ROWS reads once what all entries of a tile need, VISIBLE decides on an entry or on a
# part of it, which starts at its column `column`.


@triton.jit
def positions(mask, o_q, o_m):
    return o_q


@triton.jit
def rows_of_tile(mask, o_q, o_m):
    return o_m


@triton.jit
def bounds(mask, o_q, o_m):
    return tl.load(mask.lo + o_q), tl.load(mask.hi + o_q)


@triton.jit
def in_run(
    mask, rows, e, column, start, count, WORDS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """Ragged full entries: every column of the run."""
    return tl.broadcast_to((tl.arange(0, BN) < count)[None, :], (BM, BN))


@triton.jit
def in_interval(
    mask, rows, e, column, start, count, WORDS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """lo <= coord < hi on all axes at once, on one packed word, see `prepared.py`."""
    o_n = tl.arange(0, BN)
    b_coord = tl.load(mask.coord + tl.where(o_n < count, start + o_n, mask.length_k))  # [BN]
    guard = tl.load(mask.guard)
    left = b_coord[None, :] - rows[0][:, None]  # [BM, BN]
    right = rows[1][:, None] - b_coord[None, :]
    return (left & right & guard) == guard


@triton.jit
def in_intervals(
    mask, rows, e, column, start, count, WORDS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """The same on several words, with the bound table of the entry."""
    o_n = tl.arange(0, BN)
    o_k = tl.where(o_n < count, start + o_n, mask.length_k)
    o_table = tl.zeros((), tl.int64)  # and 64-bit offsets from here on
    if mask.table is not None:
        o_table = tl.load(mask.table + e).to(tl.int64) * WORDS
    seen = tl.full((BM, BN), True, tl.int1)
    for w in tl.static_range(WORDS):
        o_bound = (o_table + w) * mask.length_q
        b_lo = tl.load(mask.lo + o_bound + rows)  # [BM]
        b_hi = tl.load(mask.hi + o_bound + rows)
        b_coord = tl.load(
            mask.coord + (tl.zeros((), tl.int64) + w) * (mask.length_k + 1) + o_k
        )  # [BN]
        guard = tl.load(mask.guard + w)
        left = b_coord[None, :] - b_lo[:, None]
        right = b_hi[:, None] - b_coord[None, :]
        seen = seen & ((left & right & guard) == guard)
    return seen


@triton.jit
def in_bits(
    mask, rows, e, column, start, count, WORDS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """Bit j % 32 of word j // 32, for the columns of the run. column: of the entry, where the block starts."""
    o_n = tl.arange(0, BN)
    inside = (rows < mask.block_q)[:, None] & ((o_n < count) & (o_n >= -column))[None, :]
    o_n += column
    p_bits = mask.bits + (tl.zeros((), tl.int64) + e) * mask.block_q * WORDS
    b_word = tl.load(p_bits + (rows * WORDS)[:, None] + (o_n // 32)[None, :], mask=inside, other=0)
    return inside & (((b_word >> (o_n % 32)[None, :]) & 1) != 0)


# Policies of biases: OWN finds once what a tile of a head needs, BIAS adds for an entry or a part of it, in
# units of scale * q k.


@triton.jit
def table_of_head(bias, b, h, tile, o_q):
    return bias.table + h * bias.stride_h, tl.load(bias.q_index + o_q)


@triton.jit
def row_of_tile(bias, b, h, tile, o_q):
    p_row = bias.rows + b * bias.stride_b + h * bias.stride_h
    return p_row + tile.to(tl.int64) * bias.stride_t, o_q


@triton.jit
def relative_bias(bias, own, start, count, BN: tl.constexpr):
    """table[k_index - q_index], zero outside the table: [BM, BN]."""
    o_n = tl.arange(0, BN)
    inside = None if count is None else o_n < count
    b_index = tl.load(bias.k_index + start + o_n, mask=inside)[None, :] - own[1][:, None]
    inside = (b_index >= 0) & (b_index < bias.columns)
    return tl.load(own[0] + b_index, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def block_bias(bias, own, start, count, BN: tl.constexpr):
    """The row of the tile: [1, BN]."""
    o_n = tl.arange(0, BN)
    inside = None if count is None else o_n < count
    return tl.load(own[0] + start + o_n, mask=inside)[None, :].to(tl.float32)


@triton.jit
def load_rows(p, o_r, stride, count, D: tl.constexpr, BD: tl.constexpr):
    """Rows `o_r` of a matrix, [ROWS, BD]: zero past row `count` (None: all exist) and column D."""
    o_d = tl.arange(0, BD)
    p = p + o_r[:, None] * stride + o_d[None, :]
    if count is not None:
        inside = (o_r < count)[:, None] & (o_d < D)[None, :]
        block = tl.load(p, mask=inside, other=0.0)
    elif D < BD:
        block = tl.load(p, mask=(o_d < D)[None, :], other=0.0)
    else:
        block = tl.load(p)
    return block


@triton.jit
def products(b_q, b_k, PRECISION: tl.constexpr):
    """q k^T [BM, BN], fp32. Of bytes with two codes of INT4 those in the low bits are multiplied as INT8, then those in
    the high ones: codes go to no other place, since the order of channels is the same in both."""
    if b_q.dtype == tl.uint8:
        b_s = tl.dot(_low(b_q), tl.trans(_low(b_k)))
        b_s = tl.dot(_high(b_q), tl.trans(_high(b_k)), b_s, out_dtype=tl.int32)
    else:
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    return b_s.to(tl.float32)


@triton.jit
def _low(b_x):
    """The code in the low bits, int8: an arithmetic shift keeps the sign."""
    return (b_x << 4).to(tl.int8, bitcast=True) >> 4


@triton.jit
def _high(b_x):
    return b_x.to(tl.int8, bitcast=True) >> 4


# Policies of the product with the values: they add a block to the output.


@triton.jit
def settled(x, WAIT: tl.constexpr):
    """x, with nothing of it still in flight in the tensor cores.

    An empty instruction that reads x: without it Triton leaves a product of sm_90 in flight across the
    edge of the loop, where ptxas finds other writes to its registers and serialises all of them (C7515).
    It also keeps the compiler from summing an FP8 block where the previous ones are summed.
    """
    if WAIT:
        x = tl.inline_asm_elementwise("", "=f,0", [x], dtype=tl.float32, is_pure=False, pack=1)
    return x


@triton.jit
def rows_of_values(
    acc, b_p, rescale, p_v, stride, start, count, D: tl.constexpr, BD: tl.constexpr,
    BN: tl.constexpr, PRECISION: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """Values [tokens, D] in the dtype of the output."""
    b_v = load_rows(p_v + start.to(tl.int64) * stride, tl.arange(0, BN), stride, count, D, BD)
    acc = tl.dot(b_p.to(b_v.dtype), b_v, acc * rescale[:, None], input_precision=PRECISION)
    return settled(acc, WAIT)


@triton.jit
def channels_of_values(
    acc, b_p, rescale, p_v, stride, start, count, D: tl.constexpr, BD: tl.constexpr,
    BN: tl.constexpr, PRECISION: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """e4m3 values [D, tokens], tokens of every 16 in the order `prologue.SWAPPED`: weights put into that
    order stay in the registers where scores lie, and are the operand that 8-bit tensor cores want."""
    o_d, o_n = tl.arange(0, BD), tl.arange(0, BN)
    p_v += o_d[:, None] * stride + start + o_n[None, :]
    if count is not None:  # what the last 16 hold past the run is finite, and its weights are 0
        b_v = tl.load(p_v, mask=(o_n // 16 * 16 < count)[None, :] & (o_d < D)[:, None], other=0.0)
    elif D < BD:
        b_v = tl.load(p_v, mask=(o_d < D)[:, None], other=0.0)
    else:
        b_v = tl.load(p_v)
    BM: tl.constexpr = b_p.shape[0]
    b_p = b_p.reshape(BM, BN // 16, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(BM, BN)
    block = tl.dot(b_p.to(b_v.dtype), tl.trans(b_v))
    return acc * rescale[:, None] + settled(block, WAIT)


@triton.jit
def _walk(
    acc, l, m, b_q, b_scale, p_k, p_v, p_k_scale, stride_ks, stride_vs, p_start, p_count, first, last,
    mask, rows, bias, own, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    VISIBLE: tl.constexpr, BIAS: tl.constexpr, WORDS: tl.constexpr, PARTS: tl.constexpr, VALUES: tl.constexpr,
    K_ROWS: tl.constexpr, TOP: tl.constexpr, PRECISION: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """Entries first .. last of one list, each in PARTS, the online softmax over them; VISIBLE None: no mask."""
    o_n = tl.arange(0, BN)
    ALIGN: tl.constexpr = 16 if TOP > 0 else 1
    PER: tl.constexpr = 2 if p_k.dtype.element_ty == tl.uint8 else 1  # codes a byte
    for at in range(first * PARTS, last * PARTS):
        e, column = at // PARTS, at % PARTS * BN
        start = tl.multiple_of(tl.load(p_start + e), ALIGN) + column
        count = None
        if VISIBLE is not None:
            count = tl.load(p_count + e) - column
        # Masked rows are not loaded: past the end there is no memory, and elsewhere 0 * NaN is NaN.
        p = p_k + start.to(tl.int64) * stride_ks
        b_k = load_rows(p, o_n, stride_ks, count, D // PER, BD // PER)
        b_s = products(b_q, b_k, PRECISION)  # [BM, BN]
        factor = b_scale  # [BM]
        if K_ROWS == 1:
            inside = None if VISIBLE is None else o_n < count
            b_s *= tl.load(p_k_scale + start + o_n, mask=inside)[None, :]
        elif K_ROWS > 1:
            factor = b_scale * tl.load(p_k_scale + start // K_ROWS)
        if BIAS is not None:
            b_s = b_s * factor[:, None] + BIAS(bias, own, start, count, BN) / LN2
            factor = tl.full((BM,), 1.0, tl.float32)
        if VISIBLE is not None:
            seen = VISIBLE(mask, rows, e, column, start, count, WORDS, BM, BN)
            b_s = tl.where(seen, b_s, float("-inf"))
            if K_ROWS > 1:
                factor = tl.maximum(factor, 1.0e-37)  # -inf * 0 is no number
        m_new = tl.maximum(m, tl.max(b_s, 1) * factor - TOP)
        offset = m_new
        if VISIBLE is not None:  # a row that has seen nothing yet: exp2(-inf - 0), not -inf - -inf
            offset = tl.where(m_new == float("-inf"), 0.0, m_new)
        b_p = tl.exp2(b_s * factor[:, None] - offset[:, None])
        rescale = tl.exp2(m - offset)
        l = l * rescale + tl.sum(b_p, 1)
        acc = VALUES(acc, b_p, rescale, p_v, stride_vs, start, count, D, BD, BN, PRECISION, WAIT)
        m = m_new
    return acc, l, m


@triton.jit(do_not_specialize=["length_q", "heads", "group", "tiles", "heavy"])
def forward_kernel(
    p_q, p_k, p_v, p_o, p_lse, scales,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh, stride_ob, stride_os, stride_oh,
    p_q_start, p_q_count, p_order, p_variant, stride_variant_b, stride_variant_h,
    p_full, p_whole_end, p_full_start, p_full_count,
    p_partial, p_partial_start, p_partial_count, mask, bias,
    length_q, heads, group, tiles, heavy, scale_log2,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    ROWS: tl.constexpr, VISIBLE: tl.constexpr, OWN: tl.constexpr, BIAS: tl.constexpr,
    WORDS: tl.constexpr, PARTS: tl.constexpr,
    VALUES: tl.constexpr, K_ROWS: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
    WAIT: tl.constexpr,
):  # fmt: skip
    # Programs: the heavy tiles of all heads, then the light tiles head by head.
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    n_heavy = heavy * (programs // tiles)
    if pid < n_heavy:
        slot, bh = pid % heavy, pid // heavy
    else:
        slot, bh = heavy + (pid - n_heavy) % (tiles - heavy), (pid - n_heavy) // (tiles - heavy)
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    hk = h // group
    row = 0
    if p_variant is not None:
        row = tl.load(p_variant + b * stride_variant_b + h * stride_variant_h) * tiles
    tile = tl.load(p_order + row + slot)
    row += tile
    q_start = tl.load(p_q_start + tile).to(tl.int64)
    q_count = tl.load(p_q_count + tile)

    o_m, o_d = tl.arange(0, BM), tl.arange(0, BD)
    # Rows past the tile repeat its last one: a mask, which the store shares, would stay in registers
    # through all loops and spill.
    o_row = tl.minimum(o_m, q_count - 1)
    p_q += b * stride_qb + h * stride_qh + q_start * stride_qs
    PER: tl.constexpr = 2 if p_q.dtype.element_ty == tl.uint8 else 1  # codes a byte
    b_q = load_rows(p_q, o_row, stride_qs, None, D // PER, BD // PER)  # [BM, BD]
    p_k += b * stride_kb + hk * stride_kh
    p_v += b * stride_vb + hk * stride_vh
    rows = q_start + o_row
    own = rows
    if BIAS is not None:
        own = OWN(bias, b, h, tile, rows)
    acc = tl.zeros((BM, BD), tl.float32)
    l = tl.zeros((BM,), tl.float32)
    m = tl.full((BM,), float("-inf"), tl.float32)

    b_scale = tl.full((BM,), scale_log2, tl.float32)
    p_k_scale = None
    TOP: tl.constexpr = _WEIGHT_LOG2 if p_v.dtype.element_ty == tl.float8e4nv else 0.0
    if K_ROWS:
        b_scale *= tl.load(scales.q + (b * heads + h) * length_q + rows)
        p_k_scale = scales.k + (b * (heads // group) + hk) * scales.blocks

    first, last = tl.load(p_full + row), tl.load(p_full + row + 1)
    whole_end = last
    if p_whole_end is not None:
        whole_end = tl.load(p_whole_end + row)
    if VISIBLE is not None:
        acc, l, m = _walk(acc, l, m, b_q, b_scale, p_k, p_v, p_k_scale, stride_ks, stride_vs,
                          p_partial_start, p_partial_count, tl.load(p_partial + row),
                          tl.load(p_partial + row + 1), mask, ROWS(mask, rows, o_m), bias, own, D, BM, BN, BD,
                          VISIBLE, BIAS, WORDS, PARTS, VALUES, K_ROWS, TOP, PRECISION, WAIT)  # fmt: skip
    if p_whole_end is not None:
        acc, l, m = _walk(acc, l, m, b_q, b_scale, p_k, p_v, p_k_scale, stride_ks, stride_vs,
                          p_full_start, p_full_count, whole_end, last, mask, rows, bias, own, D, BM, BN, BD,
                          in_run, BIAS, WORDS, PARTS, VALUES, K_ROWS, TOP, PRECISION, WAIT)  # fmt: skip
    if WHOLE:
        acc, l, m = _walk(acc, l, m, b_q, b_scale, p_k, p_v, p_k_scale, stride_ks, stride_vs,
                          p_full_start, p_full_count, first, whole_end, mask, rows, bias, own, D, BM, BN, BD,
                          None, BIAS, WORDS, PARTS, VALUES, K_ROWS, TOP, PRECISION, WAIT)  # fmt: skip

    empty = l == 0.0  # a row without keys: 0 / 1, and -inf + log2(1)
    l = tl.where(empty, 1.0, l)
    b_o = acc / l[:, None]
    if TOP > 0:
        o_v = (b * (heads // group) + hk) * D + o_d
        b_o *= tl.load(scales.v + o_v, mask=o_d < D)[None, :]
        if scales.v_mean is not None:
            b_mean = tl.load(scales.v_mean + o_v, mask=o_d < D)[None, :]
            b_o += tl.where(empty[:, None], 0.0, b_mean)
    p_o += b * stride_ob + h * stride_oh + q_start * stride_os
    stored = o_m < q_count
    tl.store(p_o + o_m[:, None] * stride_os + o_d[None, :], b_o.to(p_o.dtype.element_ty),
             mask=stored[:, None] & (o_d < D)[None, :])  # fmt: skip
    if p_lse is not None:
        p_lse += (b * heads + h) * length_q + q_start
        tl.store(p_lse + o_m, (m + tl.log2(l)) * LN2, mask=stored)

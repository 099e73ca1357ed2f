"""The kernels of `prologue.py`, in portable Triton, and how they are launched.

`qk_kernel` reads every element of Q and K once: a program takes a block of tokens, keeps its rows of the
rotary table in registers, and walks over several heads. `value_kernel` does the same for V, one head a
program, so that a tile can be transposed. Only smoothing and per-channel scales need `first_read_kernel`
before them: it leaves one partial result per (batch, head, chunk of tokens), and `reduce_kernel` adds these
up in a fixed order, so that equal inputs give equal bits.

Maxima of magnitudes are taken on the bits of fp32, as integers: the order is the same, NaN lies above
infinity and is not lost, and integers have a warp reduction in hardware.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_INTERPRET = triton.knobs.runtime.interpret
CHUNK = 512  # tokens of a partial result
# The least maximum that a scale is made of, 2**-100: all scales are normal fp32 numbers.
_TINY_BITS: tl.constexpr = tl.constexpr((127 - 100) << 23)
_MAGNITUDE: tl.constexpr = tl.constexpr(0x7FFFFFFF)
# Triton 3.6's interpreter loses the carry of a rounding to fp8 (31.9 becomes 16) and is off below 2**-6.
_ROUND_FIRST: tl.constexpr = tl.constexpr(_INTERPRET)
# 1.5 * 2**23: adding it rounds to the nearest even integer, which is then in the low bits.
_MAGIC: tl.constexpr = tl.constexpr(12582912.0)


class Side(NamedTuple):
    """One of q, k, v [B, S, H, D] and what is to be done with it. None: it is not done.

    out: written with strides out_b, out_s, out_h, out_d. scale: fp32, contiguous; [B, H, ceil(S / N)]
    of Q and K, [B, H, D] of V. weight: [D] of the norm. mean: fp32 [B, H, D], is subtracted.
    """

    x: Tensor
    out: Tensor | None
    scale: Tensor | None
    weight: Tensor | None
    mean: Tensor | None
    b: int
    s: int
    h: int
    out_b: int
    out_s: int
    out_h: int
    out_d: int
    length: int  # tokens of x
    out_length: int  # tokens of out, without padding
    heads: int


class Rotary(NamedTuple):
    """cos, sin: [S, D / 2], or [S, D] with every angle twice."""

    cos: Tensor
    sin: Tensor
    cos_s: int
    sin_s: int


class Launch(NamedTuple):
    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple
    options: dict[str, Any]

    def run(self) -> None:
        self.kernel[self.grid](*self.arguments, **self.options)


def quantizes(p: Tensor) -> bool:
    return p.dtype in (torch.int8, torch.float8_e4m3fn)


def qk_launch(
    q: Side, k: Side, rotary: Rotary | None, order: Tensor | None, *, eps: float, fold: float,
    rows: tuple[int, int],
) -> Launch:  # fmt: skip
    """Q and K in one kernel; `rows`: tokens of a scale of Q and of K."""
    head_dim = q.x.shape[-1]
    BD = triton.next_power_of_2(head_dim)
    # 16 numbers a thread for tiles of one scale a row. A scale of many rows needs them in one program.
    BM = max(2048 // BD, *rows)
    warps = max(4, min(16, BM * BD // 1024))
    heads = 8  # a program: its rows of the rotary table, 1 KiB a token, come once for all of them
    groups_q, groups_k = triton.cdiv(q.heads, heads), triton.cdiv(k.heads, heads)
    tokens = triton.cdiv(max(q.out_length, k.out_length), BM)
    return Launch(
        qk_kernel,
        (groups_q + groups_k, tokens, q.x.shape[0]),
        (q, k, rotary, order, groups_q, eps, fold),
        {"NQ": rows[0], "NK": rows[1], "PAIRS": _pairs(rotary, head_dim), "D": head_dim, "BM": BM,
         "BD": BD, "HEADS": heads} | _warps(warps),
    )  # fmt: skip


def value_launch(v: Side, order: Tensor | None, *, padded: int, layout: str) -> Launch:
    """V in layout "tokens", "channels" or "channels16"; `padded`: tokens of out with padding."""
    head_dim = v.x.shape[-1]
    BD = triton.next_power_of_2(head_dim)
    # 128 tokens are one whole cache line of a transposed row of bytes.
    BM = min(128, max(16, 16384 // BD)) if layout != "tokens" else 4096 // BD
    return Launch(
        value_kernel,
        (v.heads, triton.cdiv(padded, BM), v.x.shape[0]),
        (v, order, padded),
        {"D": head_dim, "BM": BM, "BD": BD, "TRANSPOSED": layout != "tokens",
         "SWAPPED": layout == "channels16"} | _warps(8 if layout != "tokens" else 4),
    )  # fmt: skip


def first_read_launches(
    k: Side,
    v: Side,
    rotary: Rotary | None,
    *,
    eps: float,
    mean: Tensor | None,
    scale: Tensor | None,
) -> list[Launch]:
    """Mean of K over tokens and scale of V per channel, fp32 [B, H, D] both; None: not this one."""
    batch, heads, head_dim = k.x.shape[0], k.heads, k.x.shape[-1]
    BD = triton.next_power_of_2(head_dim)
    chunks = triton.cdiv(k.length, CHUNK)
    shape = (batch, heads, chunks, head_dim)
    part = [None if to is None else torch.empty(shape, dtype=torch.float32, device=k.x.device)
            for to in (mean, scale)]  # fmt: skip
    kinds = sum(to is not None for to in (mean, scale))
    return [
        Launch(
            first_read_kernel,
            (heads, chunks, batch * kinds),
            (k, v, rotary, *part, chunks, batch, eps),
            {"PAIRS": _pairs(rotary, head_dim), "D": head_dim, "BM": 2048 // BD, "BD": BD,
             "CHUNK": CHUNK} | _warps(4),
        ),
        Launch(
            reduce_kernel,
            (batch * heads, kinds),
            (*part, mean, scale, chunks, k.length),
            {"D": head_dim, "BM": 2048 // BD, "BD": BD} | _warps(4),
        ),
    ]  # fmt: skip


def _pairs(rotary: Rotary | None, head_dim: int) -> bool:
    return rotary is not None and rotary.cos.shape[1] < head_dim


def _warps(number: int) -> dict[str, int]:
    return {} if _INTERPRET else {"num_warps": number}


# Device code ---------------------------------------------------------------------------------------


@triton.jit
def _load_rows(side, b, h, o_row, read, D: tl.constexpr, BD: tl.constexpr):
    """Rows of one head in fp32, [BM, BD]; zero where `read` is false and past column D."""
    o_d = tl.arange(0, BD)
    p = side.x + b * side.b + h * side.h
    p = p + o_row[:, None] * side.s + o_d[None, :]
    return tl.load(p, mask=read[:, None] & (o_d < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _load_channels(p, D: tl.constexpr, BD: tl.constexpr):
    o_d = tl.arange(0, BD)
    return tl.load(p + o_d, mask=o_d < D, other=0.0).to(tl.float32)


@triton.jit
def _source(order, o_t, length, out_length):
    """Input rows of the output rows `o_t`, int64, and whether there is one."""
    read = o_t < out_length
    o_row = o_t.to(tl.int64)
    if order is not None:
        o_row = tl.load(order + o_t, mask=read, other=-1).to(tl.int64)
        read = (o_row >= 0) & (o_row < length)
    return o_row, read


@triton.jit
def _split(b_x, BM: tl.constexpr, BD: tl.constexpr):
    """Even and odd columns, [BM, BD / 2] each."""
    return tl.split(tl.reshape(b_x, (BM, BD // 2, 2)))


@triton.jit
def _load_tables(
    rotary, o_row, read, PAIRS: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr
):
    """cos and sin of every pair, [BM, BD / 2] each: of full tables cos at the even and sin at the odd
    columns, as diffusers' Wan reads them. A block of 128 rows with both columns spilled registers."""
    width: tl.constexpr = BD // 2 if PAIRS else BD
    columns: tl.constexpr = D // 2 if PAIRS else D
    o_d = tl.arange(0, width)
    inside = read[:, None] & (o_d < columns)[None, :]
    p_cos = rotary.cos + o_row[:, None] * rotary.cos_s + o_d[None, :]
    p_sin = rotary.sin + o_row[:, None] * rotary.sin_s + o_d[None, :]
    b_cos = tl.load(p_cos, mask=inside, other=0.0).to(tl.float32)
    b_sin = tl.load(p_sin, mask=inside, other=0.0).to(tl.float32)
    if not PAIRS:
        b_cos, _ = _split(b_cos, BM, BD)
        _, b_sin = _split(b_sin, BM, BD)
    return b_cos, b_sin


@triton.jit
def _normalized(b_x, b_weight, eps, D: tl.constexpr):
    """RMSNorm over columns, in fp32; the ones past D are zero."""
    square = tl.sum(b_x * b_x, 1) / D
    return b_x * tl.rsqrt(square + eps)[:, None] * b_weight[None, :]


@triton.jit
def _rotated(b_x, tables, BM: tl.constexpr, BD: tl.constexpr):
    """(a, b) -> (a cos - b sin, b cos + a sin) for every pair of neighbouring columns."""
    b_a, b_b = _split(b_x, BM, BD)
    b_even = b_a * tables[0] - b_b * tables[1]
    b_odd = b_b * tables[0] + b_a * tables[1]
    return tl.reshape(tl.join(b_even, b_odd), (BM, BD))


@triton.jit
def _magnitude_bits(b_x):
    return b_x.to(tl.int32, bitcast=True) & _MAGNITUDE


@triton.jit
def _maximum(bits):
    """The maximum as a number above zero. NaN and infinity stay."""
    return tl.maximum(bits, _TINY_BITS).to(tl.float32, bitcast=True)


@triton.jit
def _codes(b_y, element: tl.constexpr):
    """Rounded to the nearest code, ties to even. Where the scale is NaN or infinite the code is 0."""
    b_y = tl.where(b_y == b_y, b_y, 0.0)
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
def _walk_heads(
    side, rotary, order, b, first, block, eps, fold, N: tl.constexpr, PAIRS: tl.constexpr,
    D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """A block of tokens of heads first .. first + HEADS."""
    element: tl.constexpr = side.out.dtype.element_ty
    o_d = tl.arange(0, BD)
    o_t = block * BM + tl.arange(0, BM)
    o_row, read = _source(order, o_t, side.length, side.out_length)
    stored = (o_t < side.out_length)[:, None] & (o_d < D)[None, :]
    if side.weight is not None:
        b_weight = _load_channels(side.weight, D, BD)
    if rotary is not None:
        tables = _load_tables(rotary, o_row, read, PAIRS, D, BM, BD)
    for index in range(first, tl.minimum(first + HEADS, side.heads)):
        h = tl.zeros((), tl.int64) + index  # the interpreter counts in Python integers
        b_x = _load_rows(side, b, h, o_row, read, D, BD)  # [BM, BD]
        bh = b * side.heads + h
        if side.weight is not None:
            b_x = _normalized(b_x, b_weight, eps, D)
        if rotary is not None:
            b_x = _rotated(b_x, tables, BM, BD)
        if side.mean is not None:
            b_mean = _load_channels(side.mean + bh * D, D, BD)
            # Rows of padding stay zero: a mean there would cost them the best of their scale.
            b_x = tl.where(read[:, None], b_x - b_mean[None, :], 0.0)
        p = side.out + b * side.out_b + h * side.out_h
        p = p + o_t.to(tl.int64)[:, None] * side.out_s + o_d[None, :]
        if side.scale is not None:
            limit: tl.constexpr = 127.0 if element == tl.int8 else 448.0
            bits = tl.max(_magnitude_bits(b_x), 1)  # [BM]
            bits = tl.max(tl.reshape(bits, (BM // N, N)), 1)
            top = _maximum(bits)  # [BM / N]
            scales = (side.out_length + N - 1) // N
            o_n = block * (BM // N) + tl.arange(0, BM // N)
            tl.store(side.scale + bh * scales + o_n, top * (fold / limit), mask=o_n < scales)
            inverse = tl.broadcast_to((limit / top)[:, None], (BM // N, N))
            b_y = b_x * tl.reshape(inverse, (BM,))[:, None]
            tl.store(p, _codes(b_y, element), mask=stored)
        else:
            tl.store(p, b_x.to(element), mask=stored)


@triton.jit(do_not_specialize=["groups_q"])
def qk_kernel(
    q, k, rotary, order, groups_q, eps, fold, NQ: tl.constexpr, NK: tl.constexpr,
    PAIRS: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    # Groups of heads are next to each other in memory and share the rotary table in the L2 cache.
    group, block, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if group < groups_q:
        if block * BM < q.out_length:
            _walk_heads(q, rotary, order, b, group * HEADS, block, eps, fold, NQ, PAIRS, D, BM, BD,
                        HEADS)  # fmt: skip
    else:
        if block * BM < k.out_length:
            _walk_heads(k, rotary, order, b, (group - groups_q) * HEADS, block, eps, 1.0, NK, PAIRS,
                        D, BM, BD, HEADS)  # fmt: skip


@triton.jit  # `padded` is specialised: a mask that ends anywhere makes stores of single bytes
def value_kernel(
    v, order, padded, D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
    TRANSPOSED: tl.constexpr, SWAPPED: tl.constexpr,
):  # fmt: skip
    h, b = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    block = tl.program_id(1)
    element: tl.constexpr = v.out.dtype.element_ty
    o_d = tl.arange(0, BD)
    o_out = block * BM + tl.arange(0, BM)
    o_t = o_out
    if SWAPPED:  # column j of 16 holds token (0 1 8 9 2 3 10 11 4 5 12 13 6 7 14 15)[j]
        o_t = (o_out & ~14) | ((o_out & 2) << 2) | ((o_out & 12) >> 1)
    o_row, read = _source(order, o_t, v.length, v.out_length)
    b_v = _load_rows(v, b, h, o_row, read, D, BD)  # [BM, BD]
    if v.scale is not None:
        bh = b * v.heads + h
        o_s = v.scale + bh * D + o_d
        scale = tl.load(o_s, mask=o_d < D, other=1.0)
        b_v = _codes(b_v * (1.0 / scale)[None, :], element)
    else:
        b_v = b_v.to(element)
    p = v.out + b * v.out_b + h * v.out_h
    if TRANSPOSED:
        p = p + o_d.to(tl.int64)[:, None] * v.out_d + o_out[None, :]
        tl.store(p, tl.trans(b_v), mask=(o_d < D)[:, None] & (o_out < padded)[None, :])
    else:
        p = p + o_out.to(tl.int64)[:, None] * v.out_s + o_d[None, :]
        tl.store(p, b_v, mask=(o_out < padded)[:, None] & (o_d < D)[None, :])


@triton.jit
def _sum_of_chunk(
    side, rotary, b, h, chunk, eps, PAIRS: tl.constexpr, D: tl.constexpr, BM: tl.constexpr,
    BD: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Sum over the tokens of a chunk of normed and rotated rows, [BD]."""
    acc = tl.zeros((BM, BD), tl.float32)
    if side.weight is not None:
        b_weight = _load_channels(side.weight, D, BD)
    for start in range(0, CHUNK, BM):
        o_row = (chunk * CHUNK + start + tl.arange(0, BM)).to(tl.int64)
        read = o_row < side.length
        b_x = _load_rows(side, b, h, o_row, read, D, BD)
        if side.weight is not None:
            b_x = _normalized(b_x, b_weight, eps, D)
        if rotary is not None:
            b_x = _rotated(b_x, _load_tables(rotary, o_row, read, PAIRS, D, BM, BD), BM, BD)
        acc += b_x
    return tl.sum(acc, 0)


@triton.jit
def _bits_of_chunk(
    side, b, h, chunk, D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, CHUNK: tl.constexpr
):
    """Largest magnitude of a chunk per channel, as bits, [BD]."""
    acc = tl.zeros((BM, BD), tl.int32)
    for start in range(0, CHUNK, BM):
        o_row = (chunk * CHUNK + start + tl.arange(0, BM)).to(tl.int64)
        b_x = _load_rows(side, b, h, o_row, o_row < side.length, D, BD)
        acc = tl.maximum(acc, _magnitude_bits(b_x))
    return tl.max(acc, 0)


@triton.jit(do_not_specialize=["chunks", "batch"])
def first_read_kernel(
    k, v, rotary, p_sum, p_top, chunks, batch, eps, PAIRS: tl.constexpr, D: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    h, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    kind = tl.program_id(2) // batch  # 0 is K where K is read at all
    b = (tl.program_id(2) % batch).to(tl.int64)
    o_d = tl.arange(0, BD)
    o_part = ((b * k.heads + h) * chunks + chunk) * D + o_d
    if p_sum is not None and kind == 0:
        b_sum = _sum_of_chunk(k, rotary, b, h, chunk, eps, PAIRS, D, BM, BD, CHUNK)
        tl.store(p_sum + o_part, b_sum, mask=o_d < D)
    if p_top is not None and (p_sum is None or kind == 1):
        bits = _bits_of_chunk(v, b, h, chunk, D, BM, BD, CHUNK)
        tl.store(p_top + o_part, bits.to(tl.float32, bitcast=True), mask=o_d < D)


@triton.jit(do_not_specialize=["chunks", "length"])
def reduce_kernel(
    p_sum, p_top, p_mean, p_scale, chunks, length, D: tl.constexpr, BM: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    bh, kind = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_m, o_d = tl.arange(0, BM), tl.arange(0, BD)
    o_part = (bh * chunks + o_m)[:, None] * D + o_d[None, :]
    if p_sum is not None and kind == 0:
        acc = tl.zeros((BM, BD), tl.float32)
        for start in range(0, chunks, BM):
            inside = (start + o_m < chunks)[:, None] & (o_d < D)[None, :]
            acc += tl.load(p_sum + o_part + start * D, mask=inside, other=0.0)
        tl.store(p_mean + bh * D + o_d, tl.sum(acc, 0) / length, mask=o_d < D)
    if p_top is not None and (p_sum is None or kind == 1):
        bits = tl.zeros((BM, BD), tl.int32)
        for start in range(0, chunks, BM):
            inside = (start + o_m < chunks)[:, None] & (o_d < D)[None, :]
            b_top = tl.load(p_top + o_part + start * D, mask=inside, other=0.0)
            bits = tl.maximum(bits, _magnitude_bits(b_top))
        tl.store(p_scale + bh * D + o_d, _maximum(tl.max(bits, 0)) / 448.0, mask=o_d < D)

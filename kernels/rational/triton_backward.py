"""Gradients of the rational activation in Triton: read x and the gradient of y once, write that of x.

With r = grad / Q, F = P / Q, u = |x| (version A) or x, D the polynomial of Q and s the sign of dQ/dD:

    dx   = r (P' - s D' F)         da_i = sum of r x^i         db_j = - sum of r F s u^j

(version A: s of dx is the sign of x, and db_j takes the sign of b_j instead). The ten or so sums stay in
registers while a program walks over rows; at its end it adds them up over its rows, and over as many columns as
are sure to be of one group. `reduce_kernel` adds up the rest. No atomics: equal inputs, equal bits.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .layout import Runs, dense, runs
from .triton_forward import (
    INTERPRET,
    MAX_BLOCK,
    block_of,
    coefficients_of,
    compute_dtype,
    magnitudes,
    on_cuda,
    reciprocal,
    strides_of_groups,
)

WIDE_ROW = 1024  # vectors; a wider row is folded, so that partial sums stay small
REDUCE_TILE = 8192


class Tuning(NamedTuple):
    """rows: of a thread in a tile. per_sm: programs of a multiprocessor, at least and at most; between these a
    program gets `tiles` tiles: fewer programs leave fewer sums to add up, more of them end more evenly."""

    warps: int = 4
    rows: int = 2
    per_sm: tuple[int, int] = (7, 28)
    tiles: int = 16


def backward(
    grad: Tensor, x: Tensor, numerator: Tensor, denominator: Tensor, version: str, channel_dim: int,
    need_x: bool, need_coefficients: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of x, numerator and denominator; None where not needed.

    That of x is computed even if not needed, which only a first layer does not: another kernel without it may
    round the sums in another way, and these are to have the same bits whoever asks.
    """
    x = dense(x)
    grad = dense(grad, like=x)
    dx = torch.empty_like(x)
    wanted = dx if need_x else None
    coefficients = (numerator, denominator)
    if not x.numel():
        da, db = (torch.zeros_like(c) if need_coefficients else None for c in coefficients)
        return wanted, da, db
    numerator, denominator = numerator.contiguous(), denominator.contiguous()
    grid, arguments, options, partial = launch(
        grad, x, dx, numerator, denominator, version, channel_dim, need_coefficients
    )
    backward_kernel[grid](*arguments, **options)
    if partial is None:
        return wanted, None, None
    da, db = (torch.empty_like(c) for c in (numerator, denominator))
    grid, arguments, options = reduce_launch(partial, denominator, da, db, options["VERSION"])
    reduce_kernel[grid](*arguments, **options)
    return wanted, da, db


def launch(
    grad: Tensor, x: Tensor, dx: Tensor, numerator: Tensor, denominator: Tensor, version: str,
    channel_dim: int, need_coefficients: bool, tuning: Tuning = Tuning(),
) -> tuple[tuple[int, ...], tuple, dict, Partial | None]:  # fmt: skip
    """Grid, arguments and options of `backward_kernel`, and where it leaves its sums. All dense, one order."""
    groups = max(numerator.shape[0], denominator.shape[0])
    view = runs(x, channel_dim, groups, itemsize=max(x.itemsize, grad.itemsize, 2))
    M, N = numerator.shape[1], denominator.shape[1]
    tiles = tiling(view, tuning)
    count = triton.cdiv(tiles.rows, tiles.BR * tuning.rows)
    fewest, most = (max(1, _multiprocessors(x) * n // tiles.blocks) for n in tuning.per_sm)
    of_program = max(triton.cdiv(count, most), min(triton.cdiv(count, fewest), tuning.tiles))
    chunks = triton.cdiv(count, of_program)
    partial = None
    if need_coefficients:
        sums = torch.empty(
            chunks, M + N, tiles.blocks * (tiles.BV // tiles.SPAN), device=x.device,
            dtype=torch.float64 if x.dtype == torch.float64 else torch.float32,
        )  # fmt: skip
        partial = Partial(sums=sums, run=1 if tiles.FOLD > 1 else view.run // tiles.SPAN)
    arguments = (
        grad, x, dx, x if partial is None else partial.sums,
        numerator, denominator, tiles.rows, *strides_of_groups(numerator, denominator),
    )  # fmt: skip
    return (tiles.blocks, chunks), arguments, {
        "M": M, "N": N, "VERSION": version, "NEED_SUMS": need_coefficients,
        "EVEN": tiles.rows % (tiles.BR * tuning.rows) == 0 and tiles.blocks * tiles.stride == view.columns,
        "COLUMNS": view.columns, "RUN": view.run, "STRIDE": tiles.stride, "FOLD": tiles.FOLD,
        "BR": tiles.BR, "BU": tuning.rows, "BV": tiles.BV, "SPAN": tiles.SPAN, "W": view.width,
        "COMPUTE": compute_dtype(x), "RECIPROCAL": reciprocal(x.dtype), "WIDEN": widening(view.width),
        "ADD": adding(x), **overlap(x),
        "num_warps": tuning.warps,
    }, partial  # fmt: skip


class Tiling(NamedTuple):
    """[rows, blocks, BV] vectors that programs of BR rows walk over.

    FOLD: a row that is wider than a tile counts as FOLD rows, all in the same group; else 1. stride:
    vectors from a block to the next. SPAN: neighbouring vectors that are surely in one group.
    """

    rows: int
    blocks: int
    stride: int
    FOLD: int
    BR: int
    BV: int
    SPAN: int


class Partial(NamedTuple):
    """Sums [programs, terms, columns]; `run` of these columns make a group."""

    sums: Tensor
    run: int


def tiling(view: Runs, tuning: Tuning) -> Tiling:
    BV = min(view.run & -view.run, MAX_BLOCK)
    if view.columns > WIDE_ROW and BV >= 8:
        fold, blocks, stride = view.run // BV, view.groups, view.run
    else:
        BV = block_of(view.columns)
        fold, blocks, stride = 1, triton.cdiv(view.columns, BV), BV
    BR = max(1, 32 * tuning.warps // BV)
    return Tiling(
        rows=view.rows * fold, blocks=blocks, stride=stride, FOLD=fold, BR=BR, BV=BV,
        SPAN=math.gcd(BV, view.run),
    )  # fmt: skip


def reduce_launch(
    partial: Partial, denominator: Tensor, da: Tensor, db: Tensor, version: str
) -> tuple[tuple[int, ...], tuple, dict]:
    """Grid, arguments and options of `reduce_kernel`: one program for each coefficient."""
    chunks, _, columns = partial.sums.shape
    groups = max(da.shape[0], db.shape[0])
    of_a, of_b = (partial.run * groups // c.shape[0] for c in (da, db))
    BC = min(triton.next_power_of_2(max(of_a, of_b)), 256)
    arguments = (partial.sums, denominator, da, db, chunks, columns, of_a, of_b, da.numel())
    return (da.numel() + db.numel(),), arguments, {
        "M": da.shape[1], "N": db.shape[1], "SIGN": version == "A",
        "BK": REDUCE_TILE // BC, "BC": BC, "num_warps": 8, **overlap(da),
        **({"launch_pdl": True} if overlap(da)["OVERLAP"] else {}),
    }  # fmt: skip


def overlap(x: Tensor) -> dict[str, bool]:
    """Whether the reduction is launched early, to wait on the GPU instead of in the queue: saves 3 us."""
    return {"OVERLAP": on_cuda() and x.is_cuda and _has_dependent_launch(x.device.index)}


@cache
def _has_dependent_launch(index: int | None) -> bool:
    return torch.cuda.get_device_capability(index) >= (9, 0)


@cache
def _multiprocessors_of(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def _multiprocessors(x: Tensor) -> int:
    return _multiprocessors_of(x.device.index) if x.is_cuda else 1


# Device code ----------------------------------------------------------------------------------------


@triton.jit
def _cast(x, COMPUTE: tl.constexpr):
    return x.to(COMPUTE)


@triton.jit
def _unpack(x, COMPUTE: tl.constexpr):
    """bfloat16 in pairs: two instructions, where the compiler takes three."""
    if x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x], dtype=tl.float32,
            is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return x.to(COMPUTE)


def widening(width: int):
    """The device function from a tensor's dtype to that of the arithmetic."""
    return _unpack if on_cuda() and width > 1 else _cast


@triton.jit
def zeros(COUNT: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr, COMPUTE: tl.constexpr):
    z = ()
    for _ in tl.static_range(COUNT):
        z = z + (tl.zeros([BV, BR], COMPUTE),)
    return z


@triton.jit
def turn(value, by):
    """value, its sign changed where the sign bit of `by` is set: a single instruction."""
    if value.dtype == tl.float64:
        bits = by.to(tl.int64, bitcast=True) & (-(2**63))
        return (value.to(tl.int64, bitcast=True) ^ bits).to(tl.float64, bitcast=True)
    else:
        bits = by.to(tl.int32, bitcast=True) & (-(2**31))
        return (value.to(tl.int32, bitcast=True) ^ bits).to(tl.float32, bitcast=True)


@triton.jit
def with_slope(x, c, COUNT: tl.constexpr):
    """The polynomial and its derivative, both by Horner's rule."""
    value = tl.zeros_like(x) + c[COUNT - 1]
    slope = tl.zeros_like(x)
    for i in tl.static_range(1, COUNT):
        if i == 1:
            slope = value  # 0 * x is not folded, as x may be NaN
        else:
            slope = slope * x + value
        value = value * x + c[COUNT - 1 - i]
    return value, slope


@triton.jit
def denominator_with_slope(x, b, N: tl.constexpr, VERSION: tl.constexpr):
    """Q, its derivative by D's argument, and what its sign is taken of. b: as in `denominator_of`."""
    if VERSION == "A":
        q, slope = with_slope(tl.abs(x), (1.0,) + b, N + 1)
        return q, slope, x
    elif VERSION == "B":
        d, slope = with_slope(x, (0.0,) + b, N + 1)
        return tl.abs(d) + 1.0, slope, d
    else:
        d, slope = with_slope(x, b, N)
        return tl.abs(d) + 0.1, slope, d


@triton.jit
def powers_of(x, COUNT: tl.constexpr):
    """x, x^2, ..., x^COUNT."""
    powers = (x,)
    for i in tl.static_range(1, COUNT):
        powers = powers + (powers[i - 1] * x,)
    return powers


@triton.jit
def sum_of_thread(x, BR: tl.constexpr, BV: tl.constexpr, LENGTH: tl.constexpr):
    """[BV, BR, BU, W] -> [BV, BR]."""
    return tl.sum(tl.reshape(x, [BV, BR, LENGTH]), axis=2)


@triton.jit
def add_by_tiles(
    sums, r, even, odd, x, M: tl.constexpr, N: tl.constexpr, FIRST: tl.constexpr,
    BR: tl.constexpr, BV: tl.constexpr, LENGTH: tl.constexpr,
):  # fmt: skip
    """sums, with r x^i added for i < M, then even or odd x^j for FIRST <= j < FIRST + N; [BV, BR] each.

    Each tile on its own first: sums of random signs are off by 1e-7 of their size.
    """
    powers = powers_of(x, max(M - 1, FIRST + N - 1))
    new = (sums[0] + sum_of_thread(r, BR, BV, LENGTH),)
    for i in tl.static_range(1, M):
        new = new + (sums[i] + sum_of_thread(r * powers[i - 1], BR, BV, LENGTH),)
    for j in tl.static_range(FIRST, FIRST + N):
        if j == 0:
            term = even
        elif j % 2 == 0:
            term = even * powers[j - 1]
        else:
            term = odd * powers[j - 1]
        new = new + (sums[M - FIRST + j] + sum_of_thread(term, BR, BV, LENGTH),)
    return new


@triton.jit
def elements(x, BR: tl.constexpr, BV: tl.constexpr, LENGTH: tl.constexpr):
    """[BV, BR, BU, W] -> LENGTH tensors [BV, BR]: names for registers, no instructions."""
    if LENGTH == 1:
        out = (tl.reshape(x, [BV, BR]),)
    else:
        first, second = tl.split(tl.reshape(x, [BV, BR, LENGTH // 2, 2]))
        out = elements(first, BR, BV, LENGTH // 2) + elements(second, BR, BV, LENGTH // 2)
    return out


@triton.jit
def add_in_a_chain(
    sums, r, even, odd, x, M: tl.constexpr, N: tl.constexpr, FIRST: tl.constexpr,
    BR: tl.constexpr, BV: tl.constexpr, LENGTH: tl.constexpr,
):  # fmt: skip
    """The same by one multiply-add for each term: 3% fewer instructions and 7 registers less, errors of 4e-7."""
    rs, xs = elements(r, BR, BV, LENGTH), elements(x, BR, BV, LENGTH)
    evens, odds = elements(even, BR, BV, LENGTH), elements(odd, BR, BV, LENGTH)
    for k in tl.static_range(LENGTH):
        powers = powers_of(xs[k], max(M - 1, FIRST + N - 1))
        new = (sums[0] + rs[k],)
        for i in tl.static_range(1, M):
            new = new + (sums[i] + rs[k] * powers[i - 1],)
        for j in tl.static_range(FIRST, FIRST + N):
            if j == 0:
                term = evens[k]
            elif j % 2 == 0:
                term = evens[k] * powers[j - 1]
            else:
                term = odds[k] * powers[j - 1]
            new = new + (sums[M - FIRST + j] + term,)
        sums = new
    return sums


def adding(x: Tensor):
    """In a chain where rounding of x itself is worse by far; on AMD the chain moves tiles through shared memory."""
    return add_in_a_chain if x.itemsize < 4 and (on_cuda() or INTERPRET) else add_by_tiles


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(
    p_grad, p_x, p_dx, p_sums, p_a, p_b, rows, stride_a, stride_b,
    M: tl.constexpr, N: tl.constexpr, VERSION: tl.constexpr,
    NEED_SUMS: tl.constexpr, EVEN: tl.constexpr,
    COLUMNS: tl.constexpr, RUN: tl.constexpr, STRIDE: tl.constexpr, FOLD: tl.constexpr,
    BR: tl.constexpr, BU: tl.constexpr, BV: tl.constexpr, SPAN: tl.constexpr, W: tl.constexpr,
    COMPUTE: tl.constexpr, RECIPROCAL: tl.constexpr, WIDEN: tl.constexpr, ADD: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Every programs-th tile of a block of columns, see `Tiling`; leaves sums[program, :, parts].

    A tile is [BV vectors, BR rows, BU rows, W elements]; a thread has the last two dimensions to itself.
    """
    FIRST: tl.constexpr = 0 if VERSION == "C" else 1
    if OVERLAP:
        gdc_launch_dependents()
    block, program, programs = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    o_v = block * STRIDE + tl.arange(0, BV)[:, None, None, None]
    group = tl.minimum(o_v, COLUMNS - 1) // RUN
    a = coefficients_of(p_a, group, stride_a, M, COMPUTE)
    b = coefficients_of(p_b, group, stride_b, N, COMPUTE)
    if VERSION == "A":
        b = magnitudes(b, N)
    sums = zeros(M + N, BR, BV, COMPUTE)
    o_t = tl.arange(0, BR)[None, :, None, None] + BR * tl.arange(0, BU)[None, None, :, None]
    for tile in range(program, tl.cdiv(rows, BR * BU), programs):
        o_r = tile * (BR * BU) + o_t
        if FOLD == 1:
            start = tl.cast(tile, tl.int64) * (BR * BU * COLUMNS * W)
            offsets = (o_t.to(tl.int64) * COLUMNS + o_v) * W + tl.arange(0, W)[None, None, None, :]
        else:
            start = 0
            o_row = (o_r // FOLD).to(tl.int64) * COLUMNS + o_r % FOLD * BV
            offsets = (o_row + o_v) * W + tl.arange(0, W)[None, None, None, :]
        inside = None
        OTHER: tl.constexpr = None if EVEN else 0.0
        if not EVEN:
            inside = (o_r < rows) & (o_v < COLUMNS)
        x = WIDEN(tl.load(p_x + start + offsets, mask=inside, other=OTHER), COMPUTE)
        grad = WIDEN(tl.load(p_grad + start + offsets, mask=inside, other=OTHER), COMPUTE)
        p, p_slope = with_slope(x, a, M)
        q, d_slope, signed = denominator_with_slope(x, b, N, VERSION)
        over = RECIPROCAL(q)
        r = grad * over
        even = r * (p * over)
        odd = turn(even, signed)
        dx = r * p_slope - odd * d_slope
        tl.store(p_dx + start + offsets, dx.to(p_dx.dtype.element_ty), mask=inside)
        if NEED_SUMS:
            if VERSION != "A":  # |x|^j of even j has no sign
                even = odd
            sums = ADD(sums, r, even, odd, x, M, N, FIRST, BR, BV, BU * W)
    if NEED_SUMS:
        PARTS: tl.constexpr = BV // SPAN
        width = tl.num_programs(0) * PARTS
        o_c = block * PARTS + tl.arange(0, PARTS)
        for i in tl.static_range(M + N):
            p = p_sums + (program * (M + N) + i).to(tl.int64) * width
            columns_of_group = tl.reshape(tl.sum(sums[i], axis=1), [PARTS, SPAN])
            tl.store(p + o_c, tl.sum(columns_of_group, axis=1))


@triton.jit(do_not_specialize=["chunks", "columns", "of_a", "of_b", "count_a"])
def reduce_kernel(
    p_sums, p_b, p_da, p_db, chunks, columns, of_a, of_b, count_a,
    M: tl.constexpr, N: tl.constexpr, SIGN: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Adds up sums[chunks, M + N, columns] for one coefficient, of whose group `of_a` or `of_b` columns are."""
    if OVERLAP:
        gdc_wait()
    i = tl.program_id(0)
    j = i - count_a
    if j < 0:
        total = sum_of(p_sums, i % M, i // M * of_a, of_a, chunks, columns, M + N, BK, BC)
        tl.store(p_da + i, total.to(p_da.dtype.element_ty))
    else:
        total = -sum_of(p_sums, M + j % N, j // N * of_b, of_b, chunks, columns, M + N, BK, BC)
        if SIGN:
            total = turn(total, tl.load(p_b + j).to(total.dtype))
        tl.store(p_db + j, total.to(p_db.dtype.element_ty))


@triton.jit
def sum_of(
    p_sums, term, first, count, chunks, columns, TERMS: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """The sum of sums[:, term, first : first + count]."""
    total = tl.zeros([BK, BC], p_sums.dtype.element_ty)
    for k in range(0, chunks, BK):
        o_k = k + tl.arange(0, BK)[:, None]
        p_row = p_sums + (o_k.to(tl.int64) * TERMS + term) * columns + first
        for c in range(0, count, BC):
            o_c = c + tl.arange(0, BC)[None, :]
            total += tl.load(p_row + o_c, mask=(o_k < chunks) & (o_c < count), other=0.0)
    return tl.sum(tl.sum(total, axis=1), axis=0)

"""Several tensors to their orders in one launch, and what else one reading of them gives.

`Tensor.index_select` moves numbers one by one. Here a thread moves 16 bytes, and the largest |x|^2 of every
head, by which the Hopper kernel bounds scores, comes along.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

WARPS = 4
NUMBERS = (
    8192  # of a program, 64 a thread: 4.06 TB/s where a copy has 4.18 and index_select 3.48 (H200)
)


class Side(NamedTuple):
    """One tensor [B, S, H, D] with its strides; None: it is not there.

    order: int [length], the token at every position. out: contiguous [B, length, H, D]. squares: fp32 [B, H] of
    zeros. length: tokens of `order`, or of x.
    """

    x: Tensor | None = None
    order: Tensor | None = None
    out: Tensor | None = None
    squares: Tensor | None = None
    b: int = 0
    s: int = 0
    h: int = 0
    d: int = 0
    length: int = 0
    heads: int = 0


def moved(tensors: list[Tensor], orders: list[Tensor | None]) -> list[Tensor]:
    """x[:, order] of up to three tensors [B, S, H, D] of one batch and head dim; x itself where order is None."""
    sides = [
        _side(x, order, copied=order is not None) for x, order in zip(tensors, orders, strict=True)
    ]
    _launch([side for side in sides if side.out is not None])
    return [x if side.out is None else side.out for x, side in zip(tensors, sides, strict=True)]


def moved_with_squares(
    q: Tensor, k: Tensor, v: Tensor, q_order: Tensor | None, k_order: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """q, k, v in their orders, and the maxima of |q|^2 and |k|^2 over tokens, fp32 [B H] and [B Hk]; NaN where an
    input is."""
    counts = [x.shape[0] * x.shape[2] for x in (q, k)]
    squares = torch.zeros(sum(counts), dtype=torch.float32, device=q.device).split(counts)
    sides = [
        _side(x, order, copied=order is not None, squares=most)
        for x, order, most in zip((q, k, v), (q_order, k_order, k_order), (*squares, None), strict=True)
    ]  # fmt: skip
    _launch(sides if k_order is not None else sides[:2])
    q, k, v = (
        x if side.out is None else side.out for x, side in zip((q, k, v), sides, strict=True)
    )
    return q, k, v, (squares[0], squares[1])


def _side(x: Tensor, order: Tensor | None, *, copied: bool, squares: Tensor | None = None) -> Side:
    batch, length, heads, dim = x.shape
    length = length if order is None else order.numel()
    out = torch.empty(batch, length, heads, dim, dtype=x.dtype, device=x.device) if copied else None
    return Side(x, order, out, squares, *x.stride(), length=length, heads=heads)


def _launch(sides: list[Side]) -> Any:
    """Returns the compiled kernel."""
    sides = [side for side in sides if side.x is not None and side.x.numel() and side.length]
    if not sides:
        return None
    assert sides[0].x is not None
    batch, dim = sides[0].x.shape[0], sides[0].x.shape[-1]
    BD = triton.next_power_of_2(dim)
    # Heads side by side, of all sides alike: 1 KB or more of a row at once.
    group = min(max(1, 1024 // BD), *(side.heads & -side.heads for side in sides))
    rows = max(1, NUMBERS // (group * BD))
    ends, total = [], 0
    for side in sides:
        total += batch * (side.heads // group) * triton.cdiv(side.length, rows)
        ends.append(total)
    sides += [Side()] * (3 - len(sides))
    ends += [total] * (3 - len(ends))
    with torch.cuda.device_of(sides[0].x):  # pyright: ignore[reportArgumentType]
        return move_kernel[(total,)](
            *sides, *ends[:2], D=dim, BD=BD, GROUP=group, ROWS=rows, num_warps=WARPS
        )


@triton.jit
def move_kernel(first, second, third, end_first, end_second, D: tl.constexpr, BD: tl.constexpr,
                GROUP: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    program = tl.program_id(0)
    if program < end_first:
        _move(first, program, D, BD, GROUP, ROWS)
    if second.x is not None and (program >= end_first) & (program < end_second):
        _move(second, program - end_first, D, BD, GROUP, ROWS)
    if third.x is not None and program >= end_second:
        _move(third, program - end_second, D, BD, GROUP, ROWS)


@triton.jit
def _move(
    side, program, D: tl.constexpr, BD: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr
):
    """ROWS tokens of GROUP heads."""
    groups = side.heads // GROUP
    chunks = tl.cdiv(side.length, ROWS)
    head = program % groups * GROUP + tl.arange(0, GROUP)
    chunk = program // groups % chunks
    b = (program // (groups * chunks)).to(tl.int64)
    channel = tl.arange(0, BD)
    token = chunk * ROWS + tl.arange(0, ROWS)
    inside = token < side.length
    row = token.to(tl.int64)
    if side.order is not None:
        row = tl.load(side.order + token, mask=inside, other=0).to(tl.int64)
    inside = inside[:, None, None] & (channel < D)[None, None, :]
    o_x = head.to(tl.int64)[None, :, None] * side.h + channel[None, None, :] * side.d
    x = tl.load(side.x + b * side.b + row[:, None, None] * side.s + o_x, mask=inside, other=0.0)
    if side.out is not None:
        place = (b * side.length + token)[:, None, None] * side.heads + head[None, :, None]
        tl.store(side.out + place * D + channel[None, None, :], x, mask=inside)
    if side.squares is not None:
        y = x.to(tl.float32)
        # The order of non-negative floats is that of their bits, and NaN is above all: the same in any order.
        most = tl.max(tl.sum(y * y, axis=2).to(tl.int32, bitcast=True), axis=0)
        p = side.squares + b * side.heads + head
        tl.atomic_max(p.to(tl.pointer_type(tl.int32)), most)

"""Orders: how a grid of tokens becomes a line, so that neighbours in space are neighbours in memory.

Every order is a sort by a mixed-radix key: residue class (only for dilation), tile, sub-tile or
position on the Hilbert curve, then row-major. A *run* is a stretch of tokens with the same tile
(or sub-tile); attention blocks never cross a run, which is what keeps their bounding boxes small.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import prod
from typing import Literal

import torch
from torch import Tensor

OrderKind = Literal["auto", "row", "tiled", "hilbert"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """A choice of token order.

    kind: "row" (row-major, nothing moves), "tiled" (tiles in row-major order, row-major inside),
        "hilbert" (windows in row-major order, a Hilbert curve inside), or "auto" (the planner picks
        "tiled" with the tile of least counted work).
    tile: tile (tiled) or window (hilbert) in tokens per axis; None lets the planner choose.
    subtile: second level of "tiled": tiles of keys inside tiles of queries; must divide `tile`.
    """

    kind: OrderKind = "auto"
    tile: tuple[int, ...] | None = None
    subtile: tuple[int, ...] | None = None

    def __post_init__(self):
        if self.kind not in ("auto", "row", "tiled", "hilbert"):
            raise ValueError(
                f"Unknown order {self.kind!r}. Choose one of 'auto', 'row', 'tiled', 'hilbert'."
            )
        for name in ("tile", "subtile"):
            value = getattr(self, name)
            if value is not None:
                if any(int(n) < 1 for n in value):
                    raise ValueError(f"Order {name} must be positive on every axis, got {value}.")
                object.__setattr__(self, name, tuple(int(n) for n in value))
        if self.subtile is not None and (
            self.tile is None
            or len(self.tile) != len(self.subtile)
            or any(t % s for t, s in zip(self.tile, self.subtile, strict=True))
        ):
            raise ValueError(
                f"Order subtile must divide tile on every axis, got tile={self.tile}, "
                f"subtile={self.subtile}."
            )


@dataclass(frozen=True, slots=True, eq=False)
class OrderedGrid:
    """A grid in its order: all tensors are indexed by *position on the line*.

    permutation: int64 [S], permutation[position] = row-major index of the token there.
    run_q, run_k: int64 [S], non-decreasing id of the tile (queries) and sub-tile (keys) of a position.
    """

    permutation: Tensor
    run_q: Tensor
    run_k: Tensor


def grid_coordinates(grid: tuple[int, ...], device=None) -> Tensor:
    """Coordinates of the tokens of a row-major grid: int64 [axes, S]."""
    axes = torch.meshgrid(*[torch.arange(n, device=device) for n in grid], indexing="ij")
    return torch.stack([a.reshape(-1) for a in axes])


def order_grid(
    grid: tuple[int, ...],
    order: Order,
    *,
    dilation: tuple[int, ...] | None = None,
    offset: tuple[int, ...] | None = None,
    along: int = -1,
    device=None,
) -> OrderedGrid:
    """Put the tokens of `grid` into `order`.

    With `dilation`, tokens of one residue class (coordinate modulo dilation) come together first,
    because they only ever meet each other; tiles then count in steps of the dilation.
    offset: how much of the first tile lies outside the grid, per axis.
    along: the axis on which the next tile of the line lies, the last one by default.
    """
    coords = grid_coordinates(grid, device)
    dilation = dilation or (1,) * len(grid)
    offset = offset or (0,) * len(grid)
    classes, steps, sizes = [], [], []
    for x, n, d, o in zip(coords, grid, dilation, offset, strict=True):
        if d > 1:
            classes.append((x % d, d))
        steps.append(x // d + o)
        sizes.append(-(-n // d) + o)

    if order.kind == "auto":
        raise ValueError("Order 'auto' has no permutation of its own; ask the planner for a plan.")
    if order.kind == "row":
        tiles, subtiles = [], []
    else:
        if order.tile is None or len(order.tile) != len(grid):
            raise ValueError(
                f"Order {order.kind!r} needs a tile with one size per axis of the grid {grid}, "
                f"got tile={order.tile}."
            )
        tiles = [(x // t, -(-n // t)) for x, n, t in zip(steps, sizes, order.tile, strict=True)]
        tiles.append(tiles.pop(along))
        inside = [x % t for x, t in zip(steps, order.tile, strict=True)]
        if order.kind == "hilbert":
            subtiles = []
            within = [_along_curve(inside, steps, sizes, order.tile)]
        else:
            sub = order.subtile or order.tile
            subtiles = [
                (x // s, -(-t // s)) for x, t, s in zip(inside, order.tile, sub, strict=True)
            ]
            within = [(x % s, s) for x, s in zip(inside, sub, strict=True)]
    if order.kind == "row":
        within = list(zip(steps, sizes, strict=True))

    run_q = _mixed_radix(classes + tiles, like=coords[0])
    run_k = _mixed_radix(classes + tiles + subtiles, like=coords[0])
    key = _mixed_radix(classes + tiles + subtiles + within, like=coords[0])
    permutation = torch.argsort(key, stable=True)
    return OrderedGrid(permutation, run_q[permutation], run_k[permutation])


def _along_curve(
    inside: list[Tensor], steps: list[Tensor], sizes: list[int], tile: tuple[int, ...]
) -> tuple[Tensor, int]:
    """The place of every token on the Hilbert curve of its window, and their number. In two axes windows that
    the border cuts short have a curve of their own; in three the curve of a cube skips what is not there."""
    if len(tile) != 2:
        bits = max(max(tile) - 1, 1).bit_length()
        return hilbert_index(torch.stack(inside), bits), 1 << (bits * len(tile))
    place = torch.empty_like(inside[0])
    # Of every axis, whether a token lies in a whole window or in the last, short one.
    short = [x >= n // t * t for x, n, t in zip(steps, sizes, tile, strict=True)]
    for kind in product((False, True), repeat=2):
        sides = [n % t if s else t for s, n, t in zip(kind, sizes, tile, strict=True)]
        own = (short[0] == kind[0]) & (short[1] == kind[1])
        if min(sides):
            table = hilbert_path(*sides).to(place.device)
            index = torch.empty_like(table)
            index[table] = torch.arange(table.numel(), device=table.device)
            place[own] = index[(inside[0] * sides[1] + inside[1])[own]]
    return place, prod(tile)


def _mixed_radix(digits: list[tuple[Tensor, int]], like: Tensor) -> Tensor:
    number = torch.zeros_like(like)
    for digit, base in digits:
        number = number * base + digit
    return number


def inverse_permutation(permutation: Tensor) -> Tensor:
    """The permutation that undoes `permutation`: x[permutation][inverse] == x."""
    inverse = torch.empty_like(permutation)
    inverse[permutation] = torch.arange(permutation.numel(), device=permutation.device)
    return inverse


@lru_cache(maxsize=64)
def hilbert_path(height: int, width: int) -> Tensor:
    """The cells of a rectangle along a Hilbert curve, for sides of any length: int64 [height * width], row-major.

    Where the sides are the same power of two it is Hilbert's own curve. Steps go to a neighbour; where the longer
    side is odd and the other even one of them is diagonal. After J. Cerveny's generalised curve: a rectangle is a
    long one of two halves, or three parts, of which the first and the last turn.
    """
    cells: list[int] = []

    def fill(y: int, x: int, along: tuple[int, int], across: tuple[int, int]) -> None:
        """From the corner (y, x): `along` and `across` are the sides as vectors, of which one is zero on each axis."""
        length, breadth = abs(sum(along)), abs(sum(across))
        step, turn = (tuple((d > 0) - (d < 0) for d in side) for side in (along, across))
        if breadth == 1 or length == 1:
            unit = step if breadth == 1 else turn
            cells.extend(
                (y + i * unit[0]) * width + x + i * unit[1] for i in range(length * breadth)
            )
            return
        half_l, half_b = length // 2, breadth // 2
        if 2 * length > 3 * breadth:
            half_l += half_l % 2 == 1 and length > 2  # an even half keeps the steps straight
            first = (step[0] * half_l, step[1] * half_l)
            fill(y, x, first, across)
            fill(y + first[0], x + first[1], (along[0] - first[0], along[1] - first[1]), across)
            return
        half_b += half_b % 2 == 1 and breadth > 2
        a, b = (step[0] * half_l, step[1] * half_l), (turn[0] * half_b, turn[1] * half_b)
        rest_a, rest_b = (along[0] - a[0], along[1] - a[1]), (across[0] - b[0], across[1] - b[1])
        fill(y, x, b, a)
        fill(y + b[0], x + b[1], along, rest_b)
        fill(
            y + along[0] - step[0] + b[0] - turn[0],
            x + along[1] - step[1] + b[1] - turn[1],
            (-b[0], -b[1]),
            (-rest_a[0], -rest_a[1]),
        )

    fill(0, 0, *(((0, width), (height, 0)) if width >= height else ((height, 0), (0, width))))
    return torch.tensor(cells)


def hilbert_index(coords: Tensor, bits: int) -> Tensor:
    """Distance along the Hilbert curve of points in a cube of side 2**bits.

    coords: int64 [axes, S], 0 <= coords < 2**bits. Returns int64 [S]; consecutive distances are
    unit steps in space. J. Skilling, "Programming the Hilbert curve", AIP Conf. Proc. 707 (2004).
    """
    x = list(coords.clone())
    axes = len(x)
    if axes == 1:
        return x[0]
    bit = 1 << (bits - 1)
    while bit > 1:  # undo the reflections and exchanges, from the coarsest cell inwards
        low = bit - 1
        for axis in range(axes):
            reflect = (x[axis] & bit).bool()
            exchange = torch.where(reflect, torch.zeros_like(x[0]), (x[0] ^ x[axis]) & low)
            x[0] = torch.where(reflect, x[0] ^ low, x[0] ^ exchange)
            if axis:
                x[axis] = x[axis] ^ exchange
        bit >>= 1
    for axis in range(1, axes):  # Gray decoding
        x[axis] = x[axis] ^ x[axis - 1]
    flip = torch.zeros_like(x[0])
    bit = 1 << (bits - 1)
    while bit > 1:
        flip = torch.where((x[-1] & bit).bool(), flip ^ (bit - 1), flip)
        bit >>= 1
    x = [a ^ flip for a in x]
    distance = torch.zeros_like(x[0])
    for b in reversed(range(bits)):
        for a in x:
            distance = (distance << 1) | ((a >> b) & 1)
    return distance

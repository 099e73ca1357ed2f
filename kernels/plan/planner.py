"""The planner: which tiles, by counted work; and one cached call from a rule to a plan.

Grids that tiles do not divide are the normal case (Wan: 21x45x80, 21x30x52). Entries are runs of any
length, so a tile may be any box of at most block_q tokens: 3x5x8 = 120 tiles 21x45x80 exactly, where
4x4x8 = 128 would leave a fifth of the rows empty. The work of a tile shape is separable, hence
counted exactly axis by axis, and every shape can be tried.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import product
from math import prod

import torch
from torch import Tensor

from ..order.curves import Order, inverse_permutation
from .block_plan import BlockPlan
from .build import plan_blocks
from .layout import TokenLayout
from .neighborhood import Dense, Neighborhood, NeighborhoodOnGrid
from .tiles import BlockShape, block_shapes


@dataclass(frozen=True, slots=True, eq=False)
class AttentionPlan:
    """A plan and the order it belongs to.

    permutation: int64 [S], position -> index in the model's sequence; None if nothing moves.
    inverse: int64 [S], its inverse. order: with the tiles that the planner chose.
    """

    layout: TokenLayout
    order: Order
    permutation: Tensor | None
    inverse: Tensor | None
    blocks: BlockPlan

    @property
    def tile(self) -> tuple[int, ...] | None:
        return self.order.tile

    @property
    def density(self) -> float:
        return self.blocks.density


def plan_attention(
    layout: TokenLayout,
    spec: Dense | Neighborhood,
    *,
    order: Order | None = None,
    impl: str = "blocks",
    head_dim: int = 64,
    precision: str = "model",
    shape: BlockShape | None = None,
    device: torch.device | str = "cpu",
) -> AttentionPlan:
    """The plan of `spec` on `layout` for an implementation, built on `device` and cached.

    precision: the short name of a `Precision`. shape: instead of those that are fast.
    Order "auto" takes the tiles of least counted work. Raises ValueError where the neighborhood
    does not fit a grid of the layout.
    """
    if shape is None:
        shapes = block_shapes(impl, head_dim, precision=precision, device=device)
    else:
        shapes = (shape,)
    return _plan(layout, spec, order or Order(), shapes, torch.device(device))


@lru_cache(maxsize=64)
def _plan(layout, spec, order, shapes, device) -> AttentionPlan:
    order, shape = _resolve_order(layout, spec, order, shapes)
    permutation, blocks = plan_blocks(
        layout, spec, order=order, block_q=shape.block_q, block_k=shape.block_k, device=device
    )
    inverse = None if permutation is None else inverse_permutation(permutation)
    return AttentionPlan(layout, order, permutation, inverse, blocks)


def _resolve_order(
    layout: TokenLayout, spec, order: Order, shapes: tuple[BlockShape, ...]
) -> tuple[Order, BlockShape]:
    """Fill in what `order` leaves to the planner, from the largest grid of the layout."""
    grids = [s.shape for s in layout.segments if s.kind == "grid"]
    if order.kind == "row" or not grids:
        return Order(kind="row"), shapes[0]
    grid = max(grids, key=prod)
    if order.tile is not None:
        if len(order.tile) != len(grid):
            raise ValueError(f"Order tile={order.tile} does not fit a grid of {len(grid)} axes.")
        fits = [s for s in shapes if prod(order.tile) % s.block_q == 0]
        kind = "tiled" if order.kind == "auto" else order.kind
        return Order(kind=kind, tile=order.tile, subtile=order.subtile), (fits or shapes)[0]
    if order.kind == "hilbert":
        side = {1: 256, 2: 16, 3: 8}[len(grid)]
        tile = tuple(min(side, n) for n in grid)
        fits = [s for s in shapes if prod(tile) % s.block_q == 0]
        return Order(kind="hilbert", tile=tile), (fits or shapes)[0]
    if isinstance(spec, Dense) or spec.resolve(grid).is_dense:
        return Order(kind="row"), shapes[0]
    others = layout.length - prod(grid)
    _, tile, subtile, shape = min(
        (
            (cost / shape.speed, tile, subtile, shape)
            for shape in shapes
            for cost, tile, subtile in [best_tiles(spec.resolve(grid), shape, others=others)]
        ),
        key=lambda choice: choice[0],
    )
    return Order(kind="tiled", tile=tile, subtile=subtile), shape


@dataclass(frozen=True, slots=True)
class _Axis:
    """Counts of one axis for tiles of `t` queries and `s` keys, summed over the query tiles.

    entries, full: key tiles visited and full. pairs, full_pairs: query-key pairs of those.
    keys: keys visited. tiles: query tiles. Products over the axes give the counts of the grid.
    """

    t: int
    s: int
    tiles: int
    entries: int
    full: int
    pairs: int
    full_pairs: int
    keys: int


def best_tiles(
    spec: NeighborhoodOnGrid, shape: BlockShape, *, others: int = 0
) -> tuple[float, tuple[int, ...], tuple[int, ...]]:
    """Least counted work in pairs, with its query tile and key sub-tile.

    others: keys that every query sees besides its neighborhood.
    """
    return min(tile_costs(spec, shape, others=others))


def tile_costs(
    spec: NeighborhoodOnGrid, shape: BlockShape, *, others: int = 0
) -> Iterator[tuple[float, tuple[int, ...], tuple[int, ...]]]:
    """(cost in pairs, tile, subtile) of every shape worth trying."""
    rank = len(spec.grid)
    classes = prod(spec.dilation)
    steps = [-(-n // d) for n, d in zip(spec.grid, spec.dilation, strict=True)]
    bounds = []
    for axis, d in enumerate(spec.dilation):
        start, end = spec.axis_bounds(axis)
        bounds.append((start[::d].tolist(), end[::d].tolist()))
    counted: dict[tuple[int, int, int], _Axis] = {}

    def axis_counts(axis: int, t: int, s: int) -> _Axis:
        if (axis, t, s) not in counted:
            counted[axis, t, s] = _count_axis(*bounds[axis], steps[axis], t, s)
        return counted[axis, t, s]

    tiles = list(_boxes([_sides(n, s) for n, s in zip(steps, spec.stride, strict=True)],
                        shape.block_q))  # fmt: skip
    most = max(map(prod, tiles))
    # A tile three quarters full at least: SDPA on a CPU and tensor cores alike are slow below.
    for tile in (t for t in tiles if 4 * prod(t) >= 3 * most):
        subtiles = [sub for sub in product(*map(_divisors, tile)) if prod(sub) <= shape.block_k]
        widest = max(map(prod, subtiles))
        for sub in (s for s in subtiles if 2 * prod(s) >= widest):
            axes = [axis_counts(a, tile[a], sub[a]) for a in range(rank)]
            yield _cost(axes, shape, classes, others, prod(sub)), tile, sub


def _sides(n: int, stride: int) -> list[int]:
    """Tile sides worth trying on an axis: even splits, powers of two, multiples of the stride."""
    sides = {-(-n // parts) for parts in range(1, n + 1)}
    sides |= {1 << b for b in range(n.bit_length())}
    sides |= {m for m in range(stride, n + 1, stride) if m <= 8 * stride}
    return sorted(t for t in sides if t <= n)


def _cost(axes: list[_Axis], shape: BlockShape, classes: int, others: int, run: int) -> float:
    def total(name: str) -> int:
        return classes * prod(getattr(a, name) for a in axes)

    tiles, entries, full = total("tiles"), total("entries"), total("full")
    other_entries = tiles * -(-others // shape.block_k)
    if shape.padded:
        block = shape.block_q * shape.block_k
        pairs = (entries + other_entries) * block
        masked = (entries - full) * block
        ragged = full * block if run < shape.block_k else 0
    else:
        ragged = 0
        pairs = total("pairs")
        masked = total("pairs") - total("full_pairs")
    gathered = total("keys") + tiles * others
    return (
        pairs
        + shape.partial * masked
        + shape.ragged * ragged
        + shape.gather * gathered
        + shape.entry * (entries + other_entries)
        + shape.tile * tiles
    )


def _count_axis(start: list[int], end: list[int], n: int, t: int, s: int) -> _Axis:
    tiles = entries = full = pairs = full_pairs = keys = 0
    for a in range(0, n, t):
        b = min(a + t, n)
        lo_min, lo_max = start[a], start[b - 1]  # bounds never decrease along an axis
        hi_min, hi_max = end[a], end[b - 1]
        first, last = lo_min // s, -(-hi_max // s)
        whole_first = -(-lo_max // s)
        whole_last = -(-n // s) if hi_min == n else hi_min // s
        whole = max(whole_last - whole_first, 0)
        seen = min(last * s, n) - first * s
        seen_whole = min(whole_last * s, n) - whole_first * s if whole else 0
        tiles += 1
        entries += last - first
        full += whole
        keys += seen
        pairs += (b - a) * seen
        full_pairs += (b - a) * seen_whole
    return _Axis(t, s, tiles, entries, full, pairs, full_pairs, keys)


def _boxes(sides: list[list[int]], volume: int) -> Iterator[tuple[int, ...]]:
    """All boxes with one of the given sides on every axis, of at most `volume` cells."""
    if not sides:
        yield ()
        return
    for t in sides[0]:
        if t <= volume:
            for rest in _boxes(sides[1:], volume // t):
                yield (t, *rest)


@cache
def _divisors(n: int) -> tuple[int, ...]:
    return tuple(d for d in range(1, n + 1) if n % d == 0)

"""The planner: which tiles, by counted work; and one cached call from a rule to a plan.

Grids that tiles do not divide are the normal case (Wan: 21x45x80, 21x30x52). Entries are runs of any
length, so a tile may be any box of at most block_q tokens: 3x5x8 = 120 tiles 21x45x80 exactly, where
4x4x8 = 128 would leave a fifth of the rows empty. `tile_counts` counts the work of every shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from ..order.curves import Order, inverse_permutation
from .block_plan import BlockPlan
from .build import Rule, plan_blocks
from .layout import TokenLayout
from .local import Local
from .local_lists import plan_local
from .neighborhood import Dense, NeighborhoodOnGrid
from .tile_counts import cuts
from .tile_window import TileWindow, TileWindowOnGrid, window_cost
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
    spec: Rule | Local | tuple[Rule, ...],
    *,
    order: Order | None = None,
    impl: str = "blocks",
    head_dim: int = 64,
    precision: str = "model",
    shape: BlockShape | None = None,
    device: torch.device | str = "cpu",
) -> AttentionPlan:
    """The plan of `spec` on `layout` for an implementation, built on `device` and cached.

    spec: a tuple has one rule per head; the widest decides the tiles. precision: the short name of
    a `Precision`. shape: instead of those that are fast. Order "auto" takes the tile of a tile window, else
    the tiles of least counted work. Raises ValueError where the rule does not fit a grid of the layout.
    """
    if isinstance(spec, TileWindow):
        spec = spec.by_head()
    if shape is None:
        shapes = block_shapes(impl, head_dim, precision=precision, device=device)
    else:
        shapes = (shape,)
    return _plan(layout, spec, order or Order(), shapes, torch.device(device))


@lru_cache(maxsize=64)
def _plan(layout, spec, order, shapes, device) -> AttentionPlan:
    if isinstance(spec, Local):
        order, permutation, blocks = plan_local(layout, spec, order, shapes, device)
    else:
        order, shape = choose_order(layout, spec, order, shapes)
        permutation, blocks = plan_blocks(
            layout, spec, order=order, block_q=shape.block_q, block_k=shape.block_k, device=device
        )
    inverse = None if permutation is None else inverse_permutation(permutation)
    return AttentionPlan(layout, order, permutation, inverse, blocks)


def choose_order(
    layout: TokenLayout, spec, order: Order, shapes: tuple[BlockShape, ...]
) -> tuple[Order, BlockShape]:
    """The order with what it leaves to the planner, from the largest grid of the layout, and the shape of
    `shapes` that takes least time in it."""
    grids = [s.shape for s in layout.segments if s.kind == "grid"]
    if order.kind == "row" or not grids:
        return Order(kind="row"), shapes[0]
    grid = max(grids, key=prod)
    if isinstance(spec, tuple):
        local = [
            each for each in spec if not isinstance(each, Dense) and not each.resolve(grid).is_dense
        ]
        spec = max(local, key=lambda each: each.resolve(grid).visible) if local else Dense()
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
    rule = spec.resolve(grid)
    if isinstance(rule, TileWindowOnGrid):
        shape = min(shapes, key=lambda each: window_cost(rule, each, others=others) / each.speed)
        return Order(kind="tiled", tile=rule.tile), shape
    _, tile, subtile, shape = min(
        (
            (cost / shape.speed, tile, subtile, shape)
            for shape in shapes
            for cost, tile, subtile in [best_tiles(rule, shape, others=others)]
        ),
        key=lambda choice: choice[0],
    )
    return Order(kind="tiled", tile=tile, subtile=subtile), shape


def best_tiles(
    spec: NeighborhoodOnGrid, shape: BlockShape, *, others: int = 0
) -> tuple[float, tuple[int, ...], tuple[int, ...] | None]:
    """Least counted work in pairs, with its tile and its sub-tile of keys; None for a column.

    others: keys that every query sees besides its neighborhood.
    """
    return min(tile_costs(spec, shape, others=others), key=lambda found: found[0])


def tile_costs(
    spec: NeighborhoodOnGrid, shape: BlockShape, *, others: int = 0
) -> Iterator[tuple[float, tuple[int, ...], tuple[int, ...] | None]]:
    """(cost in pairs, tile, sub-tile of keys or None) of every cut worth trying."""
    for cut, counts in cuts(spec, shape):
        yield counts.cost(shape, others), cut.tile, cut.subtile

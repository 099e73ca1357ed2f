"""From the rule of local attention and an order to block lists: which blocks of the line meet, and how tiles and entries
of an implementation lie in them."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from ..order.curves import Order, order_grid
from .block_plan import BlockPlan, IntervalMask
from .layout import TokenLayout
from .local import OWN, Local, image_of, local_bounds, local_pairs, relations, scaled
from .neighborhood import Neighborhood
from .runs import Tiles, cut, merged
from .tile_counts import cuts
from .tiles import BlockShape

# Pairs tested at once: temporaries stay under half a gigabyte.
PAIRS_AT_ONCE = 1 << 24


class LocalPlan(NamedTuple):
    """permutation: int64 [S], position -> index in the model's own sequence, None for identity. order: of the image."""

    order: Order
    permutation: Tensor | None
    blocks: BlockPlan


def plan_local(
    layout: TokenLayout,
    spec: Local,
    order: Order,
    shapes: tuple[BlockShape, ...],
    device: torch.device | str = "cpu",
) -> LocalPlan:
    """Order the image and its guidance and list the blocks that `spec` makes visible.

    layout: one image, or several that see one another whole; with one there may be guidance of it. Order "auto"
    takes columns as wide as half a window where blocks are kept whole, whose tiles visit least, and without such
    blocks the tiles of least counted work. Raises ValueError for other layouts.
    """
    order, shape = choose_local(layout, spec, order, shapes)
    line = Line.of(layout, spec, order, device)
    lo, hi, coord = local_bounds(layout, spec, device)
    lo, hi, coord = (x[..., line.permutation] for x in (lo, hi, coord))
    block_q, block_k = spec.block or (shape.block_q, shape.block_k)
    runs_q, runs_k = line.cut(0, block_q, layout.queries), line.cut(1, block_k)

    rows, columns, whole = [], [], []
    for i, j, table in relations(layout):
        own_q, own_k = (runs_q.segment == i).nonzero()[:, 0], (runs_k.segment == j).nonzero()[:, 0]
        if table is None:
            rows.append(own_q.repeat_interleave(own_k.numel()))
            columns.append(own_k.repeat(own_q.numel()))
            whole.append(torch.ones_like(rows[-1], dtype=torch.bool))
            continue
        pairs = _Pairs(runs_q, runs_k, lo[table], hi[table], coord)
        row, column = pairs.meeting(own_q, own_k)
        if spec.block is not None:
            kept = pairs.really(row, column, boxes=spec.guidance == "windows" or table == OWN)
            row, column = row[kept], column[kept]
        rows.append(row)
        columns.append(column)
        whole.append(pairs.covered(row, column) | (spec.block is not None))
    row, column, whole = (torch.cat(parts) for parts in (rows, columns, whole))

    tiles = runs_q
    if spec.block is not None:  # the tiles of the implementation, inside the blocks
        tiles = cut(runs_q.of_position, torch.zeros_like(runs_q.of_position), shape.block_q)
        tiles = Tiles(tiles.start, tiles.count, line.segment[tiles.start])
        many = torch.bincount(runs_q.of_position[tiles.start], minlength=runs_q.start.numel())
        first = many.cumsum(0) - many
        inside = torch.arange(int(many[row].sum()), device=device)
        before = many[row].cumsum(0) - many[row]
        owner = torch.repeat_interleave(torch.arange(row.numel(), device=device), many[row])
        row, column, whole = first[row][owner] + inside - before[owner], column[owner], whole[owner]
    ranked = (row * runs_k.start.numel() + column).argsort()
    row, column, whole = row[ranked], column[ranked], whole[ranked]
    pieces = runs_k
    if spec.block is not None:
        pieces = Tiles(
            runs_k.start, runs_k.count, line.apart(runs_k, layout, spec, order, shape.block_k)
        )
    joined = 0 if spec.block is None else shape.block_k
    full, partial = merged((row, column), whole, tiles, pieces, joined)

    mask = None
    if partial.start.numel():
        kinds = [segment.kind for segment in layout.segments]
        is_guidance = torch.tensor([kind == "guidance" for kind in kinds], device=device)
        coarse = is_guidance[line.segment[partial.start.long()]]
        coarse &= ~is_guidance[tiles.segment[partial.rows]]
        mask = IntervalMask(lo=lo[..., : layout.queries].int(), hi=hi[..., : layout.queries].int(),
                            coord=coord.int(), table=coarse.int())  # fmt: skip
    if spec.block is None:
        visible = local_pairs(layout, spec)
    else:
        visible = int((tiles.count[row] * runs_k.count[column]).sum())
    blocks = BlockPlan(
        length_q=layout.queries, length_k=layout.length, block_q=shape.block_q, block_k=shape.block_k,
        q_start=tiles.start.int(), q_count=tiles.count.int(), full=full, partial=partial, mask=mask,
        visible=visible,
    )  # fmt: skip
    moved = not torch.equal(line.permutation, torch.arange(layout.length, device=device))
    return LocalPlan(order, line.permutation if moved else None, blocks)


def choose_local(
    layout: TokenLayout, spec: Local, order: Order, shapes: tuple[BlockShape, ...]
) -> tuple[Order, BlockShape]:
    """The order with what it leaves to the planner, and the shape of `shapes` that takes least time in it."""
    grid = image_of(layout).shape
    windows = spec.windows(grid)
    kept = None if spec.block is None else spec.block[0]

    def padded(shape: BlockShape) -> float:
        """Time of a tile of kept rows, or of a tile of its own."""
        return (1 if kept is None else -(-kept // shape.block_q) * shape.block_q) / shape.speed

    best = min(shapes, key=padded)
    if order.kind == "row":
        return Order(kind="row"), best
    if order.kind != "auto" or order.tile is not None:
        kind = "tiled" if order.kind == "auto" else order.kind
        tile = order.tile or tuple(map(min, windows, grid))
        if len(tile) != len(grid):
            raise ValueError(f"Order tile={order.tile} does not fit a grid of {len(grid)} axes.")
        fits = [s for s in shapes if prod(tile) % s.block_q == 0] if kept is None else []
        return Order(kind=kind, tile=tile, subtile=order.subtile), (fits or [best])[0]
    if kept is not None:
        columns = (grid[0], *(min(n, w // 2) for n, w in zip(grid[1:], windows[1:], strict=True)))
        return Order(kind="tiled", tile=columns), best
    reach = tuple(min(w // 2 * 2 + 1, n) for w, n in zip(windows, grid, strict=True))
    rule = Neighborhood(window=reach).resolve(grid)
    others = layout.length - prod(grid)
    _, tile, subtile, shape = min(
        (
            (counts.cost(shape, others) / shape.speed, found.tile, found.subtile, shape)
            for shape in shapes
            for found, counts in cuts(rule, shape)
        ),
        key=lambda choice: choice[0],
    )
    return Order(kind="tiled", tile=tile, subtile=subtile), shape


# -- the line and its blocks -------------------------------------------------------------------------


class Line(NamedTuple):
    """Tokens in their order: where each comes from, its run of queries and of keys, its segment; int64 [S] each.

    Kept blocks are cut from runs; they never cross a segment.
    """

    permutation: Tensor
    runs: tuple[Tensor, Tensor]
    segment: Tensor

    @classmethod
    def of(cls, layout: TokenLayout, spec: Local, order: Order, device) -> Line:
        image = image_of(layout)
        parts = []
        for index, (segment, start) in enumerate(
            zip(layout.segments, layout.offsets, strict=False)
        ):
            everything = torch.arange(segment.length, device=device)
            permutation, runs = everything, (torch.zeros_like(everything),) * 2
            if segment.kind in ("grid", "guidance"):
                own = order
                if segment.kind == "guidance":
                    own = _coarse_order(order, image.shape, segment.shape, spec)
                found = order_grid(segment.shape, own, device=device)
                permutation, runs = found.permutation, (found.run_q, found.run_k)
                # Runs shorter than a kept block, as windows of the guidance are, lie in one with others.
                tiles = (own.tile or (1,), own.subtile or own.tile or (1,))
                runs = tuple(
                    run if prod(tile) >= least else torch.zeros_like(run)
                    for run, tile, least in zip(runs, tiles, spec.block or (0, 0), strict=True)
                )
            parts.append((permutation + start, *runs, torch.full_like(permutation, index)))
        permutation, run_q, run_k, segment = (torch.cat(part) for part in zip(*parts, strict=True))
        return cls(permutation, (run_q, run_k), segment)

    def apart(
        self, keys: Tiles, layout: TokenLayout, spec: Local, order: Order, block_k: int
    ) -> Tensor:
        """The segment of every run of keys, told apart from the next where no entry shall cross: int64 [runs].

        In columns what a block of queries sees begins half a window above it. Where entries of all queries, those of
        text too, begin so far from the top of a column, modulo an entry, kernels that round keys by entries hold
        most keys once and not twice.
        """
        assert spec.block is not None
        grid = image_of(layout).shape
        if order.tile is None or order.tile[0] < grid[0] or spec.block[0] % block_k:
            return keys.segment
        first = -(spec.windows(grid)[0] // 2 * prod(order.tile[1:])) % block_k
        column = self.runs[1][keys.start]
        begins = torch.ones_like(column, dtype=torch.bool)
        begins[1:] = (column[1:] != column[:-1]) | (keys.segment[1:] != keys.segment[:-1])
        inside = keys.start - keys.start[begins][begins.cumsum(0) - 1]
        image = torch.tensor(
            [part.kind == "grid" for part in layout.segments], device=column.device
        )
        breaks = image[keys.segment] & (inside == first)
        return keys.segment + len(layout.segments) * breaks.cumsum(0)

    def cut(self, side: int, block: int, length: int | None = None) -> Tiles:
        """Queries (0) or keys (1) in pieces of at most `block` tokens."""
        return cut(self.runs[side][:length], self.segment[:length], block)


def _coarse_order(
    order: Order, grid: tuple[int, ...], coarse: tuple[int, ...], spec: Local
) -> Order:
    """The order of the guidance: as that of the image, in tiles as much smaller. Columns stay as wide, but where
    windows are seen by their numbers these follow one another."""
    if order.tile is None:
        return order
    if order.tile[0] >= grid[0]:
        if spec.guidance == "linear":
            return Order(kind="tiled", tile=spec.guidance_windows(grid, coarse))
        return Order(kind="tiled", tile=(coarse[0], *map(min, order.tile[1:], coarse[1:])))
    return Order(kind=order.kind, tile=scaled(order.tile, grid, coarse))


class _Pairs(NamedTuple):
    """Runs of queries and of keys under one table of bounds: lo, hi [axes, queries], coord [axes, keys]."""

    queries: Tiles
    keys: Tiles
    lo: Tensor
    hi: Tensor
    coord: Tensor

    def meeting(self, own_q: Tensor, own_k: Tensor) -> tuple[Tensor, Tensor]:
        """(row, column) of the runs among these whose boxes of coordinates meet."""
        low, _ = _extremes(self.lo[:, : self.queries.of_position.numel()], self.queries)
        _, high = _extremes(self.hi[:, : self.queries.of_position.numel()], self.queries)
        key_min, key_max = (x[:, own_k] for x in _extremes(self.coord, self.keys))
        found = []
        for rows in own_q.split(max(1, PAIRS_AT_ONCE // max(own_k.numel(), 1))):
            near = torch.ones(rows.numel(), own_k.numel(), dtype=torch.bool, device=rows.device)
            for axis in range(low.shape[0]):
                near &= low[axis, rows, None] <= key_max[axis]
                near &= high[axis, rows, None] > key_min[axis]
            row, column = near.nonzero().unbind(1)
            found.append((rows[row], own_k[column]))
        row, column = (torch.cat(part) for part in zip(*found, strict=True))
        return row, column

    def covered(self, row: Tensor, column: Tensor) -> Tensor:
        """Which of these pairs of runs are visible as a whole: bool [pairs]."""
        _, low = _extremes(self.lo[:, : self.queries.of_position.numel()], self.queries)
        high, _ = _extremes(self.hi[:, : self.queries.of_position.numel()], self.queries)
        key_min, key_max = _extremes(self.coord, self.keys)
        return ((low[:, row] <= key_min[:, column]) & (high[:, row] > key_max[:, column])).all(0)

    def really(self, row: Tensor, column: Tensor, *, boxes: bool) -> Tensor:
        """Which of these pairs of runs hold a visible pair: bool [pairs]. Their boxes meet, which decides for runs
        that are boxes, if all axes are places (`boxes`); of others every pair is looked at."""
        asked = torch.ones_like(row, dtype=torch.bool)
        if boxes:
            q_box, k_box = (_is_box(runs, self.coord) for runs in (self.queries, self.keys))
            asked = ~(q_box[row] & k_box[column])
        seen = torch.ones_like(asked)
        doubtful = asked.nonzero()[:, 0]
        block_q, block_k = int(self.queries.count.max()), int(self.keys.count.max())
        for part in doubtful.split(max(1, PAIRS_AT_ONCE // (block_q * block_k))):
            q, k = _positions(self.queries, row[part]), _positions(self.keys, column[part])
            inside = (self.coord[:, k][:, :, None] >= self.lo[:, q][..., None]).all(0)
            inside &= (self.coord[:, k][:, :, None] < self.hi[:, q][..., None]).all(0)
            seen[part] = inside.flatten(1).any(1)
        return seen


def _extremes(x: Tensor, runs: Tiles) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of x [axes, S] over every run: [axes, runs] each."""
    owner = runs.of_position.expand_as(x)
    empty = x.new_empty(x.shape[0], runs.start.numel())
    low, high = (
        empty.scatter_reduce(1, owner, x, kind, include_self=False) for kind in ("amin", "amax")
    )
    return low, high


def _is_box(runs: Tiles, coord: Tensor) -> Tensor:
    """Which runs are all tokens of their box of coordinates: bool [runs]."""
    low, high = _extremes(coord[:, : runs.of_position.numel()], runs)
    return (high - low + 1).prod(0) == runs.count


def _positions(runs: Tiles, index: Tensor) -> Tensor:
    """The tokens of some runs, short ones filled up with their last: int64 [n, longest]."""
    step = torch.arange(int(runs.count.max()), device=index.device)
    last = runs.count[index, None] - 1
    return runs.start[index, None] + torch.minimum(step.expand(index.numel(), -1), last)

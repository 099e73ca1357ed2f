"""From a rule and an order to block lists, on the device, without ever forming the S x S mask.

Every tile is summarised by a box: the extremes of its tokens' coordinates (keys) and of its tokens'
window bounds (queries). On every axis, with the extremes over the query tile,

    a key tile is visited  iff  min(lo) <= max(coord)  and  max(hi) >  min(coord)
    it is full             iff  max(lo) <= min(coord)  and  min(hi) >  max(coord)

For product-shaped tiles both are exact; for other runs (row-major, Hilbert pieces) they err towards
visiting and masking, never towards a wrong result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..order.curves import Order, order_grid
from .block_plan import BlockPlan, Entries, IntervalMask
from .layout import TokenLayout
from .neighborhood import Dense, Neighborhood

# Tile pairs tested at once. 2**24 pairs keep the temporaries of 279,000 tokens under a gigabyte.
PAIRS_AT_ONCE = 1 << 24


class OrderedPlan(NamedTuple):
    """permutation: int64 [S], position -> index in the model's own sequence, or None for identity."""

    permutation: Tensor | None
    blocks: BlockPlan


@dataclass(frozen=True, slots=True)
class _Tiles:
    """Runs of one kind (queries or keys): start, count, segment are int64 [n]."""

    start: Tensor
    count: Tensor
    segment: Tensor

    @property
    def of_position(self) -> Tensor:
        """The tile of every position: int64 [S]."""
        return torch.repeat_interleave(
            torch.arange(self.start.numel(), device=self.start.device), self.count
        )


def plan_blocks(
    layout: TokenLayout,
    spec: Dense | Neighborhood,
    *,
    order: Order,
    block_q: int,
    block_k: int,
    device: torch.device | str = "cpu",
) -> OrderedPlan:
    """Order the grids of `layout` and list the blocks that `spec` makes visible.

    Grid queries see their neighborhood in their own grid and every token of every other segment;
    all other queries see everything. Raises ValueError where the neighborhood does not fit a grid.
    """
    permutation, run_q, run_k, segment = [], [], [], []
    intervals: list[tuple[Tensor, Tensor, Tensor] | None] = []
    for index, (part, offset) in enumerate(zip(layout.segments, layout.offsets, strict=False)):
        grid = spec.resolve(part.shape) if _is_local(part, spec) else None
        if part.kind == "grid":
            line = order_grid(
                part.shape, order, dilation=grid.dilation if grid else None, device=device
            )
            permutation.append(line.permutation + offset)
            run_q.append(line.run_q)
            run_k.append(line.run_k)
        else:
            permutation.append(torch.arange(offset, offset + part.length, device=device))
            run_q.append(torch.zeros(part.length, dtype=torch.long, device=device))
            run_k.append(run_q[-1])
        segment.append(torch.full((part.length,), index, device=device))
        if grid is None or grid.is_dense:
            intervals.append(None)
        else:
            intervals.append(tuple(x[:, permutation[-1] - offset] for x in grid.intervals(device)))

    segments = torch.cat(segment)
    q_tiles = _cut(torch.cat(run_q), segments, block_q)
    k_tiles = _cut(torch.cat(run_k), segments, block_k)
    lo, hi, coord = _interval_tables(layout, intervals, device)
    full, partial = _lists(q_tiles, k_tiles, intervals, lo, hi, coord)

    mask = None
    if partial.start.numel():
        mask = IntervalMask(
            lo=lo[None].int(), hi=hi[None].int(), coord=coord.int(),
            table=torch.zeros_like(partial.start),
        )  # fmt: skip
    line = torch.cat(permutation)
    moved = not torch.equal(line, torch.arange(layout.length, device=device))
    return OrderedPlan(
        line if moved else None,
        BlockPlan(
            length_q=layout.length,
            length_k=layout.length,
            block_q=block_q,
            block_k=block_k,
            q_start=q_tiles.start.int(),
            q_count=q_tiles.count.int(),
            full=full,
            partial=partial,
            mask=mask,
            visible=visible_pairs(layout, spec),
        ),
    )


def visible_pairs(layout: TokenLayout, spec: Dense | Neighborhood) -> int:
    """Number of (query, key) pairs that `spec` makes visible in `layout`."""
    hidden = sum(
        part.length**2 - spec.resolve(part.shape).visible
        for part in layout.segments
        if _is_local(part, spec)
    )
    return layout.length**2 - hidden


def _is_local(part, spec) -> bool:
    return part.kind == "grid" and isinstance(spec, Neighborhood)


def _cut(run: Tensor, segment: Tensor, block: int) -> _Tiles:
    """Cut every run of equal (segment, run) ids into pieces of at most `block` tokens."""
    key = segment * (int(run.max()) + 1) + run
    length = torch.unique_consecutive(key, return_counts=True)[1]
    first = length.cumsum(0) - length
    pieces = -(-length // block)
    owner = torch.repeat_interleave(torch.arange(length.numel(), device=run.device), pieces)
    piece = torch.arange(owner.numel(), device=run.device) - (pieces.cumsum(0) - pieces)[owner]
    start = first[owner] + piece * block
    count = torch.minimum(length[owner] - piece * block, torch.full_like(start, block))
    return _Tiles(start, count, segment[start])


def _interval_tables(layout, intervals, device) -> tuple[Tensor, Tensor, Tensor]:
    """lo, hi, coord of the whole sequence: int64 [axes, S]; unused axes and segments hold 0 <= 0 < 1."""
    axes = max((x[0].shape[0] for x in intervals if x is not None), default=1)
    lo, coord = (
        torch.zeros(axes, layout.length, dtype=torch.long, device=device) for _ in range(2)
    )
    hi = torch.ones_like(lo)
    for part, offset, table in zip(layout.segments, layout.offsets, intervals, strict=False):
        if table is not None:
            for whole, own in zip((lo, hi, coord), table, strict=True):
                whole[: own.shape[0], offset : offset + part.length] = own
    return lo, hi, coord


def _lists(q_tiles, k_tiles, intervals, lo, hi, coord) -> tuple[Entries, Entries]:
    """The full and partial lists of every query tile."""
    owner_q, owner_k = q_tiles.of_position, k_tiles.of_position
    nq, nk = q_tiles.start.numel(), k_tiles.start.numel()
    lo_min, lo_max = _extremes(lo, owner_q, nq)  # [A, nq]
    hi_min, hi_max = _extremes(hi, owner_q, nq)
    key_min, key_max = _extremes(coord, owner_k, nk)  # [A, nk]
    local = torch.tensor([table is not None for table in intervals], device=lo.device)

    found: dict[str, list[tuple[Tensor, Tensor]]] = {"full": [], "partial": []}
    for first in range(0, nq, max(1, PAIRS_AT_ONCE // nk)):
        rows = slice(first, first + max(1, PAIRS_AT_ONCE // nk))
        own = q_tiles.segment[rows, None] == k_tiles.segment
        free = ~(own & local[q_tiles.segment[rows], None])
        visited, whole = free.clone(), free
        if not bool(free.all()):
            inside = torch.ones_like(free)
            covers = torch.ones_like(free)
            for a in range(lo.shape[0]):
                inside &= lo_min[a, rows, None] <= key_max[a]
                inside &= hi_max[a, rows, None] > key_min[a]
                covers &= lo_max[a, rows, None] <= key_min[a]
                covers &= hi_min[a, rows, None] > key_max[a]
            visited, whole = visited | inside, whole | (inside & covers)
        for name, pairs in (("full", whole), ("partial", visited & ~whole)):
            row, column = pairs.nonzero(as_tuple=True)
            found[name].append((row + first, column))
    return tuple(
        _compressed(torch.cat([r for r, _ in pairs]), torch.cat([c for _, c in pairs]),
                    k_tiles.start, k_tiles.count, nq)
        for pairs in found.values()
    )  # fmt: skip


def _compressed(row: Tensor, column: Tensor, start: Tensor, count: Tensor, rows: int) -> Entries:
    """Entries of (row, key tile) pairs that are sorted by row."""
    offset = torch.zeros(rows + 1, dtype=torch.int32, device=row.device)
    offset[1:] = torch.bincount(row, minlength=rows).cumsum(0)
    return Entries(offset=offset, start=start[column].int(), count=count[column].int())


def _extremes(x: Tensor, owner: Tensor, tiles: int) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of x [A, S] over the positions of every tile: [A, tiles] each."""
    index = owner.expand_as(x)
    empty = x.new_empty(x.shape[0], tiles)
    return tuple(
        empty.scatter_reduce(1, index, x, reduce, include_self=False) for reduce in ("amin", "amax")
    )

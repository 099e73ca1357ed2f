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

from ..order.curves import Order, OrderedGrid, order_grid
from .block_plan import BlockPlan, Entries, IntervalMask
from .layout import Segment, TokenLayout
from .neighborhood import Dense, Neighborhood, NeighborhoodOnGrid
from .runs import cut, merged
from .tile_window import TileWindow

# Tile pairs tested at once: temporaries stay under a gigabyte.
PAIRS_AT_ONCE = 1 << 23
GROUP = 32

Rule = Dense | Neighborhood | TileWindow


class KeyCells(NamedTuple):
    """An order of keys that is not that of the queries: the grid in small cells, which merge into entries.

    cell: keys per axis. offset: how far the first cell begins outside the grid, so that windows end
    where cells end. along: the axis on which the next cell of the line lies: there, an entry spans
    what the windows of a tile span, to the cell.
    """

    cell: tuple[int, ...]
    offset: tuple[int, ...]
    along: int

    def order(self, grid: tuple[int, ...], dilation, device) -> OrderedGrid:
        order = Order(kind="tiled", tile=self.cell)
        return order_grid(
            grid, order, dilation=dilation, offset=self.offset, along=self.along, device=device
        )


class OrderedPlan(NamedTuple):
    """permutation: int64 [S], position -> index in the model's own sequence, or None for identity."""

    permutation: Tensor | None
    blocks: BlockPlan


class TwoOrdersPlan(NamedTuple):
    """queries and keys: int64 [S] as above, None for identity; keys_only segments are in both."""

    queries: Tensor | None
    keys: Tensor | None
    blocks: BlockPlan


@dataclass(frozen=True, slots=True)
class _Line:
    """Tokens in their order: where each comes from, its tile and its segment, int64 [S] each."""

    permutation: Tensor
    run: Tensor
    segment: Tensor


def plan_blocks(
    layout: TokenLayout,
    spec: Rule | tuple[Rule, ...],
    *,
    order: Order,
    block_q: int,
    block_k: int,
    device: torch.device | str = "cpu",
) -> OrderedPlan:
    """Order the grids of `layout` and list the blocks that `spec` makes visible.

    Grid queries see their neighborhood in their own grid and every token of every other segment;
    all other queries see everything. spec: one rule, or one for every head. Raises ValueError where
    the neighborhood does not fit a grid.
    """
    found = plan_two_orders(
        layout, spec, order=order, block_q=block_q, block_k=block_k, device=device
    )
    return OrderedPlan(found.queries, found.blocks)


def plan_two_orders(
    layout: TokenLayout,
    spec: Rule | tuple[Rule, ...],
    *,
    order: Order,
    block_q: int,
    block_k: int,
    cells: KeyCells | None = None,
    device: torch.device | str = "cpu",
) -> TwoOrdersPlan:
    """`plan_blocks` with keys in an order of their own, where `cells` says so."""
    by_head = spec if isinstance(spec, tuple) else (spec,)
    rules = tuple(dict.fromkeys(by_head))
    resolved = [[_on_grid(part, rule) for part in layout.segments] for rule in rules]
    dilations = [_shared_dilation(own) for own in zip(*resolved, strict=True)]

    def line(ordered) -> _Line:
        lines = [ordered(part, d) for part, d in zip(layout.segments, dilations, strict=True)]
        return _Line(
            torch.cat([x[0] + start for x, start in zip(lines, layout.offsets, strict=False)]),
            torch.cat([x[1] for x in lines]),
            torch.cat([torch.full_like(x[1], i) for i, x in enumerate(lines)]),
        )

    def in_order(part: Segment, dilation) -> tuple[Tensor, Tensor, Tensor]:
        if part.kind != "grid":
            everything = torch.arange(part.length, device=device)
            return everything, torch.zeros_like(everything), torch.zeros_like(everything)
        found = order_grid(part.shape, order, dilation=dilation, device=device)
        return found.permutation, found.run_q, found.run_k

    def in_cells(part: Segment, dilation) -> tuple[Tensor, Tensor]:
        if part.kind != "grid" or cells is None:
            permutation, _, run_k = in_order(part, dilation)
            return permutation, run_k
        found = cells.order(part.shape, dilation, device)
        return found.permutation, found.run_k

    queries, keys = line(in_order), line(in_cells)
    n = layout.queries
    q_tiles = cut(queries.run[:n], queries.segment[:n], block_q)
    k_tiles = cut(keys.run, keys.segment, block_k)

    lists: dict[str, list[Entries]] = {"full": [], "partial": []}
    tables = _interval_tables(layout, resolved, device)
    coord = tables.coord[:, keys.permutation]
    lo, hi = (x[..., queries.permutation[:n]] for x in (tables.lo, tables.hi))
    for own, own_lo, own_hi in zip(resolved, lo, hi, strict=True):
        local = torch.tensor([_is_local(grid) for grid in own], device=coord.device)
        visited, whole = _visited(q_tiles, k_tiles, local, own_lo, own_hi, coord)
        found = merged(visited, whole, q_tiles, k_tiles, block_k if cells else 0)
        for name, entries in zip(lists, found, strict=True):
            lists[name].append(entries)

    full, partial = (Entries.joined(parts) for parts in lists.values())
    mask = variant = None
    if partial.start.numel():
        table = torch.repeat_interleave(
            torch.arange(len(rules), device=coord.device),
            torch.tensor([part.start.numel() for part in lists["partial"]], device=coord.device),
        )
        mask = IntervalMask(lo=lo.int(), hi=hi.int(), coord=coord.int(), table=table.int())
    if len(rules) > 1:
        numbers = [rules.index(rule) for rule in by_head]
        variant = torch.tensor([numbers], dtype=torch.int32, device=coord.device)
    return TwoOrdersPlan(
        _if_moved(queries.permutation),
        _if_moved(keys.permutation),
        BlockPlan(
            length_q=n,
            length_k=layout.length,
            block_q=block_q,
            block_k=block_k,
            q_start=q_tiles.start.int(),
            q_count=q_tiles.count.int(),
            full=full,
            partial=partial,
            mask=mask,
            variant=variant,
            variants=len(rules),
            visible=sum(visible_pairs(layout, rule) for rule in rules),
        ),
    )


def visible_pairs(layout: TokenLayout, spec: Rule) -> int:
    """Number of (query, key) pairs that `spec` makes visible in `layout`."""
    grids = ((part, _on_grid(part, spec)) for part in layout.segments)
    hidden = sum(part.length**2 - grid.visible for part, grid in grids if grid is not None)
    return layout.queries * layout.length - hidden


def _on_grid(part: Segment, spec: Rule) -> NeighborhoodOnGrid | None:
    if part.kind != "grid" or isinstance(spec, Dense):
        return None
    return spec.resolve(part.shape)


def _is_local(grid: NeighborhoodOnGrid | None) -> bool:
    return grid is not None and not grid.is_dense


def _shared_dilation(grids: tuple[NeighborhoodOnGrid | None, ...]) -> tuple[int, ...] | None:
    """The dilation that the order follows: residue classes come together where all heads have the same."""
    found = {grid.dilation for grid in grids if grid is not None}
    return found.pop() if len(found) == 1 else None


def _if_moved(permutation: Tensor) -> Tensor | None:
    identity = torch.arange(permutation.numel(), device=permutation.device)
    return None if torch.equal(permutation, identity) else permutation


def _interval_tables(layout: TokenLayout, resolved, device) -> IntervalMask:
    """Bounds [rules, axes, S] and coordinates [axes, S] in the model's order; other tokens hold 0 <= 0 < 1.

    Rules of different dilation split their axes differently: each has axes of its own and lets
    everything pass on those of the others.
    """
    dilations = [list(dict.fromkeys(g.dilation for g in own if _is_local(g)))
                 for own in zip(*resolved, strict=True)]  # fmt: skip
    pieces = []  # (segment, rules, first axis, lo, hi, coord)
    for index, own in enumerate(zip(*resolved, strict=True)):
        first = 0
        for dilation in dilations[index]:
            rules = [r for r, g in enumerate(own) if _is_local(g) and g.dilation == dilation]
            found = [own[r].intervals(device) for r in rules]
            pieces.append((index, rules, first, found))
            first += found[0][2].shape[0]
    axes = max((first + found[0][2].shape[0] for _, _, first, found in pieces), default=1)
    shape = (len(resolved), axes, layout.length)
    lo = torch.zeros(shape, dtype=torch.long, device=device)
    hi = torch.full(shape, layout.length, dtype=torch.long, device=device)
    coord = torch.zeros(shape[1:], dtype=torch.long, device=device)
    for index, rules, first, found in pieces:
        at = slice(layout.offsets[index], layout.offsets[index + 1])
        for rule, (low, high, where) in zip(rules, found, strict=True):
            own = slice(first, first + where.shape[0])
            lo[rule, own, at], hi[rule, own, at], coord[own, at] = low, high, where
    return IntervalMask(lo=lo, hi=hi, coord=coord, table=coord)


def _visited(q_tiles, k_tiles, local, lo, hi, coord) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """(query tile, key tile) of every visited pair, sorted, and which of them are full.

    Groups of key tiles are tested first: a million tiles of an LTX-2 video make too many pairs.
    """
    nq, nk = q_tiles.start.numel(), k_tiles.start.numel()
    lo_min, lo_max = _extremes(lo, q_tiles.of_position, nq)  # [A, nq]
    hi_min, hi_max = _extremes(hi, q_tiles.of_position, nq)
    key_min, key_max = _extremes(coord, k_tiles.of_position, nk)  # [A, nk]
    group = torch.arange(nk, device=coord.device) // GROUP
    groups = -(-nk // GROUP)
    first, last = _extremes(k_tiles.segment[None], group, groups)  # [1, groups]
    group_min, group_max = (
        _extremes(key_min, group, groups)[0],
        _extremes(key_max, group, groups)[1],
    )

    found = []
    for start in range(0, nq, max(1, PAIRS_AT_ONCE // groups)):
        rows = slice(start, start + max(1, PAIRS_AT_ONCE // groups))
        own = q_tiles.segment[rows, None]
        near = torch.ones(own.shape[0], groups, dtype=torch.bool, device=coord.device)
        for a in range(lo.shape[0]):
            near &= lo_min[a, rows, None] <= group_max[a]
            near &= hi_max[a, rows, None] > group_min[a]
        near |= ~local[own] | (first != own) | (last != own)
        for pairs in near.nonzero().split(max(1, PAIRS_AT_ONCE // GROUP)):
            row, column = pairs[:, :1] + start, pairs[:, 1:] * GROUP
            column = column + torch.arange(GROUP, device=coord.device)
            inside = column < nk
            row, column = row.expand_as(column)[inside], column[inside]
            own = q_tiles.segment[row]
            free = ~(local[own] & (own == k_tiles.segment[column]))
            visited = torch.ones_like(free)
            for a in range(lo.shape[0]):
                visited &= lo_min[a, row] <= key_max[a, column]
                visited &= hi_max[a, row] > key_min[a, column]
            seen = visited | free
            row, column, whole = row[seen], column[seen], free[seen]
            covers = torch.ones_like(whole)
            for a in range(lo.shape[0]):
                covers &= lo_max[a, row] <= key_min[a, column]
                covers &= hi_min[a, row] > key_max[a, column]
            found.append((row, column, whole | covers))
    row, column, whole = (torch.cat(parts) for parts in zip(*found, strict=True))
    return (row, column), whole


def _extremes(x: Tensor, owner: Tensor, tiles: int) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of x [A, S] over the positions of every tile: [A, tiles] each."""
    index = owner.expand_as(x)
    empty = x.new_empty(x.shape[0], tiles)
    low, high = (
        empty.scatter_reduce(1, index, x, reduce, include_self=False) for reduce in ("amin", "amax")
    )
    return low, high

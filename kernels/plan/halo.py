"""Two orders, one of queries and one of keys, for windows that are hardly larger than a tile.

A tile of 8x8 queries with a window of 7x7 sees 14x14 keys. Where keys lie in the tiles of the queries,
it visits nine of them, 24x24 keys, and 8% of its pairs count. Here keys lie in small cells of an order of
their own, shifted so that windows end where cells end, and the cells along one axis follow one another on
the line, so that all a tile sees there is one run, cut into blocks: 16x14 keys, 21%.

Where moving tokens costs more than it saves, which it often does for tiny windows, both orders stay
row-major: the work of every choice is counted and the price of the move is part of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch

from ..order.curves import Order
from .build import KeyCells, Rule, TwoOrdersPlan, plan_two_orders
from .layout import TokenLayout
from .neighborhood import Neighborhood, NeighborhoodOnGrid
from .planner import best_tiles, choose_order
from .tile_counts import AxisRule, axis_rules, sides_of
from .tiles import BlockShape

# Moving a token of one tensor takes as long as that many pairs. On an H200 4 D bytes at 4.06 TB/s (65,536 tokens of
# 24 heads of 128) against 4 D operations at 570 TFLOP/s. On a CPU: half of what copying a key and a value takes.
MOVE_PADDED, MOVE = 140, 12
# Sides of cells, and how many tiles of queries are tried: the best of these is within a few percent of the best.
CELL_SIDES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 32, 64)
TILES_TRIED = 16


class Halo(NamedTuple):
    """A tile of queries, cells of keys, and the counted work in pairs."""

    cost: float
    tile: tuple[int, ...]
    cells: KeyCells


@lru_cache(maxsize=64)
def plan_neighborhood(
    layout: TokenLayout,
    spec: Rule | tuple[Rule, ...],
    shapes: tuple[BlockShape, ...],
    device: torch.device,
    step: int = 1,
) -> TwoOrdersPlan:
    """The plan of least counted work for `spec`, one rule or one per head. Cached.

    layout: one grid, then at most one segment of other tokens. The widest rule decides the tiles.
    step: 0: entries are tiles of one order, as kernels need that round keys tile by tile. Otherwise all begin at
        multiples of it.
    """
    grid = layout.segments[0].shape
    rules = spec if isinstance(spec, tuple) else (spec,)
    local = [r for r in rules if isinstance(r, Neighborhood) and not r.resolve(grid).is_dense]
    if not local:
        order, shape = choose_order(layout, rules[0], Order(kind="row"), shapes)
        return plan_two_orders(layout, spec, order=order, block_q=shape.block_q,
                               block_k=shape.block_k, device=device)  # fmt: skip
    widest = max(local, key=lambda rule: rule.resolve(grid).visible).resolve(grid)
    others = layout.length - prod(grid)
    choices = []
    for shape in shapes:
        move = MOVE_PADDED if shape.padded else MOVE
        cost, tile, subtile = best_tiles(widest, shape, others=others)
        if not all(is_row_major(widest, each) for each in (tile, subtile or tile)):
            cost += 4 * move * prod(grid)
        order = Order(kind="tiled", tile=tile, subtile=subtile)
        choices.append((cost / shape.speed, shape, order, None))
        if step == 0:
            continue
        halo = best_halo(widest, shape, move=move, others=others, step=step)
        if not halo.tile:
            continue
        order = Order(kind="tiled", tile=halo.tile)
        choices.append((halo.cost / shape.speed, shape, order, halo.cells))
    _, shape, order, cells = min(choices, key=lambda choice: choice[0])
    return plan_two_orders(
        layout, spec, order=order, cells=cells, block_q=shape.block_q, block_k=shape.block_k,
        device=device,
    )  # fmt: skip


def best_halo(
    spec: NeighborhoodOnGrid,
    shape: BlockShape,
    *,
    move: float = 0.0,
    others: int = 0,
    step: int = 1,
) -> Halo:
    """Least counted work; an empty tile where no cells fit the step.

    move: pairs that moving a token of one tensor costs; there are four of them. others: keys that every query sees
    besides its neighborhood. step: what entries must begin at multiples of.
    """
    rules, tokens = axis_rules(spec), prod(spec.grid)
    best = Halo(float("inf"), (), KeyCells((), (), 0))
    cells = _cells(spec, shape, step)
    ranked = [
        (least + (0 if is_row_major(spec, tile) else 2 * move * tokens), least, tile)
        for least, tile in _tiles(spec, rules, shape)
    ]
    for total, least, tile in sorted(ranked)[:TILES_TRIED]:
        if total >= best.cost:
            break
        moved_q = total - least
        for cell in cells:
            spans = [_span(*each, step > 1) for each in zip(rules, tile, cell, strict=True)]
            for along in range(len(tile)):
                cost = moved_q + _cost(spans, along, prod(cell), shape, others, prod(spec.dilation))
                if cost < best.cost and not is_row_major(spec, cell, along):
                    cost += 2 * move * tokens
                if cost < best.cost:
                    offset = tuple(span.offset for span in spans)
                    best = Halo(cost, tile, KeyCells(cell, offset, along))
    return best


def is_row_major(spec: NeighborhoodOnGrid, tile: tuple[int, ...], along: int = -1) -> bool:
    """Whether tiles of that shape leave all tokens where they are."""
    steps = [(n, t) for n, t in zip(spec.grid, tile, strict=True)]
    several = [axis for axis, (n, t) in enumerate(steps) if t < n]
    if any(d > 1 < n for n, d in zip(spec.grid, spec.dilation, strict=True)):
        return False
    if not several:
        return True
    last = several[
        -1
    ]  # all later axes lie whole in a tile; all earlier ones must be cut to the token
    whole_before = all(t == 1 or n == 1 for n, t in steps[:last])
    return whole_before and along % len(tile) in (last, *range(last, len(tile)))


@dataclass(frozen=True, slots=True)
class _Span:
    """What the tiles of queries of an axis see of its cells.

    cells, whole: {number of cells a tile visits, and of those that need no mask: how many tiles}. The rest are
    sums over the tiles: visited cells, whole cells, keys and query-key pairs in the former.
    """

    offset: int
    tiles: int
    cells: tuple[tuple[int, int], ...]
    whole: tuple[tuple[int, int], ...]
    visited: int
    covered: int
    keys: int
    pairs: int


@lru_cache(maxsize=1 << 16)
def _span(rule: AxisRule, t: int, c: int, from_start: bool) -> _Span:
    start, end = _bounds(rule)
    middle = len(start) // t // 2 * t
    # A cell border where the windows of a tile in the middle begin, or where they end.
    offsets = {0, -start[middle] % c, -end[min(middle + t, len(end)) - 1] % c}
    if c >= len(start) or from_start:
        offsets = {0}
    return min((_span_at(rule, t, c, o) for o in sorted(offsets)), key=lambda s: s.visited)


def _span_at(rule: AxisRule, t: int, c: int, offset: int) -> _Span:
    start, end = _bounds(rule)
    n = len(start)
    cells, whole = Counter(), Counter()
    keys = pairs = 0
    for a in range(0, n, t):
        b = min(a + t, n)
        first, last = (start[a] + offset) // c, -(-(end[b - 1] + offset) // c)
        inner = -(-(start[b - 1] + offset) // c) if start[b - 1] else 0
        past = -(-(n + offset) // c) if end[a] == n else (end[a] + offset) // c
        seen = min(last * c - offset, n) - max(first * c - offset, 0)
        cells[last - first] += 1
        whole[max(past - inner, 0)] += 1
        keys += seen
        pairs += (b - a) * seen
    visited, covered = (sum(n * many for n, many in count.items()) for count in (cells, whole))
    return _Span(offset, cells.total(), tuple(cells.items()), tuple(whole.items()), visited, covered,
                 keys, pairs)  # fmt: skip


@lru_cache(maxsize=4096)
def _bounds(rule: AxisRule) -> tuple[list[int], list[int]]:
    """[start, end) of the visible keys of every query of the first residue class."""
    n, w, s, d, causal = rule
    start, end = NeighborhoodOnGrid((n,), (w,), (s,), (d,), (causal,)).axis_bounds(0)
    return start[::d].tolist(), end[::d].tolist()


def _cost(
    spans: list[_Span], along: int, area: int, shape: BlockShape, others: int, classes: int
) -> float:
    """area: keys of a cell."""
    line, block = spans[along], shape.block_k
    across = [span for axis, span in enumerate(spans) if axis != along]
    entries = prod(s.visited for s in across) * sum(
        many * -(-n * area // block) for n, many in line.cells
    )
    # A run of whole cells holds a block less where blocks do not begin with it.
    less = 0 if area % block == 0 else 1
    full = prod(s.covered for s in across) * sum(
        many * max(n * area // block - less, 0) for n, many in line.whole
    )
    tiles, keys = prod(s.tiles for s in spans), prod(s.keys for s in spans)
    entries += tiles * -(-others // block)
    if shape.padded:
        pairs = entries * shape.block_q * block
        masked = (entries - full) * shape.block_q * block
    else:
        pairs = prod(s.pairs for s in spans)
        masked = pairs * (1 - full / entries)
    return classes * (
        pairs
        + shape.partial * masked
        + shape.gather * (keys + tiles * others)
        + shape.entry * entries
        + shape.tile * tiles
    )


def _tiles(
    spec: NeighborhoodOnGrid, rules: list[AxisRule], shape: BlockShape
) -> Iterator[tuple[float, tuple[int, ...]]]:
    """(least work with cells of one key, tile) of every tile of queries worth trying."""
    steps = [-(-n // d) for n, d in zip(spec.grid, spec.dilation, strict=True)]
    sides = [sides_of(n, s) for n, s in zip(steps, spec.stride, strict=True)]
    tiles = list(_boxes(sides, shape.block_q))
    most = max(map(prod, tiles))
    for tile in (t for t in tiles if 4 * prod(t) >= 3 * most):
        spans = [_span_at(rule, t, 1, 0) for rule, t in zip(rules, tile, strict=True)]
        keys = prod(span.keys for span in spans)
        pairs = keys * shape.block_q if shape.padded else prod(span.pairs for span in spans)
        least = pairs + shape.gather * keys + shape.tile * prod(span.tiles for span in spans)
        yield prod(spec.dilation) * least, tile


def _cells(spec: NeighborhoodOnGrid, shape: BlockShape, step: int) -> list[tuple[int, ...]]:
    """Cells of at most a block; and whole rows, whole planes, of which a run needs no move at all."""
    steps = tuple(-(-n // d) for n, d in zip(spec.grid, spec.dilation, strict=True))
    if step > 1:
        whole = [[s for s in CELL_SIDES if n % s == 0] for n in spec.grid]
        regular = spec.dilation == (1,) * len(steps)
        return sorted(c for c in _boxes(whole, shape.block_k) if regular and prod(c) % step == 0)
    rows = {(1,) * axis + steps[axis:] for axis in range(len(steps) + 1)}
    if not shape.padded:  # a run costs what it holds: cells of one key are never worse
        return sorted(rows)
    sides = [sorted({s for s in CELL_SIDES if s < n} | {n}) for n in steps]
    return sorted({*_boxes(sides, shape.block_k), *rows})


def _boxes(sides: list[list[int]], volume: int) -> Iterator[tuple[int, ...]]:
    if not sides:
        yield ()
        return
    for t in sides[0]:
        if t <= volume:
            for rest in _boxes(sides[1:], volume // t):
                yield (t, *rest)

"""The fastest windows and strides of a density.

Counts are products over the axes, so that all combinations of one window and stride per axis are priced at once,
in a few dozen ways to cut the grid (`screen`). The best of them are planned as a user's call would be.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from math import ceil, prod
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.plan import Neighborhood
from ..kernels.plan.planner import best_tiles
from ..kernels.plan.tile_counts import AxisRule, axis_counts, boxes, columns, sides_of
from ..kernels.plan.tiles import BlockShape
from .model import Setting, Simulation, simulate

CUTS = 48  # ways to cut the grid that the screening prices
PLANNED = 8  # times as many as asked are priced exactly
STRIDES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 15, 16, 18, 20, 21, 24, 28, 30, 32, 40, 48)
STRIDES_OF_A_WINDOW = 2  # priced exactly; many come out alike
MOST_CHOICES = 200_000  # of windows and strides, spread evenly over all there are


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """density: at least this share of the grid, at most (1 + tolerance) times it. stride_share: a stride is at
    most this share of its window, where that is not the whole axis. window_share: a window is at least this
    share of the axis' side at that density, were all axes cut alike."""

    density: float
    tolerance: float = 0.05
    stride_share: float = 0.5
    window_share: float = 0.6

    def __post_init__(self):
        if not 0 < self.density < 1:
            raise ValueError(f"A density to search for lies between 0 and 1, got {self.density}.")
        if self.tolerance <= 0 or not 0 < self.stride_share <= 1 or not 0 <= self.window_share <= 1:
            raise ValueError(
                f"tolerance must be above 0, stride_share in (0, 1] and window_share in [0, 1], got "
                f"{self.tolerance}, {self.stride_share} and {self.window_share}."
            )


class Choice(NamedTuple):
    """cost: pairs of a head, per speed of the shape."""

    cost: float
    window: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def neighborhood(self) -> Neighborhood:
        return Neighborhood(window=self.window, stride=self.stride)


def search(
    wanted: Wanted, setting: Setting, *, count: int = 10, advance: Callable[[str], object] | None = None
) -> list[Simulation]:  # fmt: skip
    """The `count` fastest, the fastest first. advance: called with what is done next, `steps(count)` times.

    Raises ValueError where no window has that density.
    """
    tell = advance or (lambda text: None)
    screened = screen(wanted, setting, most=count * PLANNED, advance=tell)
    priced = []
    for choice in screened:
        tell("planning")
        priced.append((_exact_cost(choice, setting), choice))
    priced.sort(key=lambda pair: pair[0])
    found = []
    for _, choice in priced[:count]:
        tell("timing")
        found.append(simulate(choice.neighborhood, setting))
    return sorted(found, key=lambda each: each.ms)


def steps(count: int) -> int:
    return CUTS + count * PLANNED + count


def _exact_cost(choice: Choice, setting: Setting) -> float:
    rule = choice.neighborhood.resolve(setting.grid)
    return min(
        best_tiles(rule, shape, others=setting.text)[0] / shape.speed for shape in setting.shapes
    )


def screen(
    wanted: Wanted, setting: Setting, *, most: int, advance: Callable[[str], object]
) -> list[Choice]:
    """The `most` cheapest choices, by counts that take a cut as boxes, short at the borders of the grid."""
    options = [_options(n, wanted, len(setting.grid)) for n in setting.grid]
    index = _within(options, setting.grid, wanted)  # [axes, choices]
    if not index.shape[1]:
        raise ValueError(
            f"No window on {setting.grid} shows between {wanted.density:.1%} and "
            f"{wanted.density * (1 + wanted.tolerance):.1%} of the grid. Allow more with --tolerance."
        )
    best = torch.full((index.shape[1],), float("inf"), dtype=torch.float64)
    for q_tile, kv_tile, shape in likely_cuts(setting, wanted.density):
        advance("screening")
        cost = _cost(options, index, setting, q_tile, kv_tile, shape)
        best = torch.minimum(best, cost / shape.speed)
    found: list[Choice] = []
    of_window: Counter[tuple[int, ...]] = Counter()
    for i in best.argsort().tolist():
        pairs = [options[a][int(index[a, i])] for a in range(len(options))]
        window, stride = tuple(w for w, _ in pairs), tuple(s for _, s in pairs)
        of_window[window] += 1
        if of_window[window] <= STRIDES_OF_A_WINDOW:
            found.append(Choice(float(best[i]), window, stride))
        if len(found) == most:
            break
    return found


def _options(n: int, wanted: Wanted, rank: int) -> list[tuple[int, int]]:
    """(window, stride) on an axis of n tokens: windows are whole numbers of strides, or the whole axis."""
    least = max(1, ceil(wanted.window_share * n * wanted.density ** (1 / rank)))
    strides = sorted({*STRIDES, *(s for s in sides_of(n, 1) if n % s == 0)})
    found = {
        (w, s)
        for s in strides
        for w in range(s, n, s)
        if w >= least and s <= wanted.stride_share * w and (s > 1 or w % 2 == 0 or n < 32)
    }
    return [*sorted(found), (n, 1)]


def _within(options: list[list[tuple[int, int]]], grid: tuple[int, ...], wanted: Wanted) -> Tensor:
    """The combinations of the wanted density: int64 [axes, choices]."""
    shares = [
        torch.tensor([w / n for w, _ in axis], dtype=torch.float64)
        for n, axis in zip(grid, options, strict=True)
    ]
    density = reduce(lambda x, y: x[..., None] * y, shares)
    fits = (density >= wanted.density - 1e-9) & (density <= wanted.density * (1 + wanted.tolerance))
    index = torch.stack(fits.nonzero(as_tuple=True))
    step = -(-index.shape[1] // MOST_CHOICES)
    return index[:, ::step] if step > 1 else index


def likely_cuts(
    setting: Setting, density: float
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], BlockShape]]:
    """(query tile, key tile, shape) of the cuts that waste least on a window of that density in proportion."""
    grid, rank = setting.grid, len(setting.grid)
    window = tuple(max(1, round(n * density ** (1 / rank))) for n in grid)
    anywhere = Neighborhood(window=window).resolve(grid)
    found = []
    for shape in setting.shapes:
        pairs = [*boxes(anywhere, shape)]
        for base in columns(anywhere, shape):
            area = prod(base)
            pairs.append(((shape.block_q // area, *base), (shape.block_k // area, *base)))
        for q_tile, kv_tile in pairs:
            seen = prod(
                ceil(n / t) * (w + t + s)
                for n, w, t, s in zip(grid, window, q_tile, kv_tile, strict=True)
            )
            waste = seen / prod(kv_tile) * shape.block_q * shape.block_k / shape.speed
            found.append((waste, q_tile, kv_tile, shape))
    found.sort(key=lambda cut: cut[0])
    yield from (cut[1:] for cut in found[:CUTS])


def _cost(options, index, setting: Setting, q_tile, kv_tile, shape: BlockShape) -> Tensor:
    """In pairs: float64 [choices]."""
    sums: list[Tensor] = []
    tiles = 1
    for axis, (n, pairs) in enumerate(zip(setting.grid, options, strict=True)):
        found = [
            axis_counts(AxisRule(n, w, s, 1, False), q_tile[axis], kv_tile[axis]) for w, s in pairs
        ]
        tiles *= found[0].tiles
        table = torch.tensor([(c.entries, c.full_entries, c.whole) for c in found],
                             dtype=torch.float64)  # fmt: skip
        sums.append(table.T[:, index[axis]])  # [3, choices]
    entries, full, whole = reduce(torch.mul, sums)
    block = shape.block_q * shape.block_k
    short = full - whole if prod(kv_tile) == shape.block_k else full
    others = tiles * -(-setting.text // shape.block_k)
    return (
        block * (entries + others + shape.partial * (entries - full) + shape.ragged * short)
        + shape.tile * tiles
    )

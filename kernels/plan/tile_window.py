"""Sliding tile attention: queries and keys meet by whole tiles of the grid, so that no block needs a mask.

The grid is cut into tiles, short ones at the ends of axes that they do not divide. On an axis of m tiles a window
of k of them is visible to all queries of tile j:

    first = clamp(j - k // 2, 0, m - k)                  windows shift inwards at the borders
    visible: tiles first .. first + k - 1

Zhang et al., "Fast Video Generation with Sliding Tile Attention" (arXiv 2502.04507), whose code makes k + 1 of an even
k, and needs grids that tiles divide; FPSAttention (arXiv 2506.04648), which gives every tile its own scales.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import log, prod

import torch
from torch import Tensor

from .neighborhood import NeighborhoodOnGrid, check_count, per_axis
from .tiles import BlockShape

# Tiles that `default_tile` may take: of so many tokens, that many of them in a grid, each so much dearer than the
# cheapest one. Of the paper's grids it makes the paper's tile, 6x8x8.
MOST_TOKENS, MOST_TILES = 1024, 64
COST_TOLERANCE = 0.03
# In grids too small for both: so many tokens, or so many tiles, and blocks that are half empty anyway.
FEW_TOKENS, FEW_TILES, FEW_TOLERANCE = 64, 16, 0.5
# (block_q, block_k, speed) that it counts with: those of the Hopper kernel in 8 bits.
BLOCKS = ((192, 128, 1.0), (128, 128, 0.86))
DENSITY_TOLERANCE = 0.15

Window = int | tuple[int | None, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class TileWindow:
    """Sliding tile attention, for any grid it is resolved on.

    window: tiles per axis (an int serves every axis; None on an axis, or more than there are, take the whole axis).
    density: instead of a window, the share of the grid that a query should see, in (0, 1].
    heads: instead of both, the window of every head.
    tile: tokens per axis; None takes one of at most 1,024 tokens that wastes little, see `default_tile`.
    """

    window: Window | None = None
    density: float | None = None
    heads: tuple[Window, ...] = ()
    tile: int | tuple[int, ...] | None = None

    def __post_init__(self):
        for name in ("window", "tile"):
            object.__setattr__(self, name, _as_tuple(getattr(self, name)))
        object.__setattr__(self, "heads", tuple(map(_as_tuple, self.heads)))
        if (self.window is not None) + (self.density is not None) + bool(self.heads) != 1:
            raise ValueError(
                "A tile window needs one of window (tiles per axis), density (share of the grid) and heads (the "
                f"window of every head), got window={self.window}, density={self.density}, heads={self.heads}."
            )
        if self.density is not None and not 0 < self.density <= 1:
            raise ValueError(f"density must lie in (0, 1], got {self.density}.")
        for name, value in (("tile", self.tile), *(("window", w) for w in (self.window, *self.heads))):  # fmt: skip
            sides = value if isinstance(value, tuple) else (value,)
            if any(n is not None and (type(n) is not int or n < 1) for n in sides):
                raise ValueError(f"A {name} has whole numbers of at least 1, got {value}.")

    def check_axes(self, axes: int, where: str) -> None:
        """Raise ValueError where it fits no grid of so many axes. where: what has them, for the message."""
        for value in (self.window, *self.heads):
            check_count("window", value, axes, where)
        check_count("tile", self.tile, axes, where)

    def by_head(self) -> TileWindow | tuple[TileWindow, ...]:
        """One rule, or with `heads` one for every head."""
        if not self.heads:
            return self
        return tuple(TileWindow(window=window, tile=self.tile) for window in self.heads)

    def resolve(self, grid: tuple[int, ...]) -> TileWindowOnGrid:
        """The values per axis on this grid; of `heads` the widest. Raises ValueError where they do not fit it."""
        if not 1 <= len(grid) <= 3:
            raise ValueError(f"Tile windows exist on grids of 1 to 3 axes, got grid={grid}.")
        if self.heads:
            rules = self.by_head()
            assert isinstance(rules, tuple)
            return max((rule.resolve(grid) for rule in rules), key=lambda rule: rule.visible)
        tile = default_tile(grid)
        if self.tile is not None:
            tile = tuple(map(min, per_axis("tile", self.tile, grid), grid))
        tiles = tuple(-(-n // t) for n, t in zip(grid, tile, strict=True))
        if self.density is not None:
            window = _of_density(self.density, tiles)
        else:
            asked = per_axis("window", self.window, grid)
            window = tuple(m if k is None else min(k, m) for k, m in zip(asked, tiles, strict=True))
        return TileWindowOnGrid(
            grid=grid,
            window=tuple(min(k * t, n) for k, t, n in zip(window, tile, grid, strict=True)),
            stride=tile, dilation=(1,) * len(grid), causal=(False,) * len(grid), tiles=window,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class TileWindowOnGrid(NeighborhoodOnGrid):
    """A tile window on its grid. stride: the tile. tiles: of the window, which holds `window` tokens where none of
    them is short."""

    tiles: tuple[int, ...]

    @property
    def tile(self) -> tuple[int, ...]:
        return self.stride

    @property
    def is_dense(self) -> bool:
        return self.window == self.grid

    def axis_bounds(self, axis: int, device=None) -> tuple[Tensor, Tensor]:
        """[start, end) of the visible keys of every query on one axis: int64 [L]."""
        n, t = self.grid[axis], self.tile[axis]
        first, last = _seen(-(-n // t), self.tiles[axis], device)
        own = torch.arange(n, device=device) // t
        return first[own] * t, (last[own] * t).clamp(max=n)


def _seen(tiles: int, window: int, device=None) -> tuple[Tensor, Tensor]:
    """[first, last) of the tiles that every tile of an axis sees."""
    first = (torch.arange(tiles, device=device) - window // 2).clamp(0, tiles - window)
    return first, first + window


def window_cost(spec: TileWindowOnGrid, shape: BlockShape, *, others: int = 0) -> float:
    """Counted work of tiles cut into blocks, in pairs. others: keys that every query sees besides its window."""
    tokens = torch.ones(1, dtype=torch.long)
    for n, t in zip(spec.grid, spec.tile, strict=True):
        sides = torch.tensor([min(t, n - start) for start in range(0, n, t)])
        tokens = tokens[..., None] * sides
    tokens = tokens[0]
    blocks_q, blocks_k = (-(-tokens // block) for block in (shape.block_q, shape.block_k))
    keys, entries = tokens, blocks_k
    for axis, (m, k) in enumerate(zip(tokens.shape, spec.tiles, strict=True)):
        first, last = _seen(m, k)
        keys, entries = (
            ends.index_select(axis, last) - ends.index_select(axis, first)
            for ends in (_sums(keys, axis), _sums(entries, axis))
        )
    keys, entries = keys + others, entries + -(-others // shape.block_k)
    of_block = shape.block_q * shape.block_k
    pairs = (blocks_q * entries * of_block if shape.padded else tokens * keys).sum()
    rest = shape.gather * (blocks_q * keys).sum() + shape.entry * (blocks_q * entries).sum()
    return float(pairs + rest + shape.tile * blocks_q.sum())


def _sums(x: Tensor, axis: int) -> Tensor:
    """The sum of all before, along an axis, with that of all at its end."""
    return torch.cat([torch.zeros_like(x.narrow(axis, 0, 1)), x.cumsum(axis)], axis)


@lru_cache(maxsize=256)
def default_tile(grid: tuple[int, ...]) -> tuple[int, ...]:
    """The nearest to a cube of the tiles that are at most `COST_TOLERANCE` dearer than the cheapest one.

    At 91% sparsity the windows of such tiles take 2% more time than the cheapest tile and window of Wan at 720p, and no
    more at 480p, by `simulate`'s costs. It follows from the grid alone, so that all windows of a recipe share one tile.
    """
    tokens = prod(grid)
    few = min(FEW_TOKENS, tokens // FEW_TILES)
    most = max(1, few, min(MOST_TOKENS, tokens // MOST_TILES))
    found = {tile: _padding(grid, tile) for tile in _boxes(grid, most) if 4 * prod(tile) >= most}
    best = min(found.values())
    allowed = best * (1 + (COST_TOLERANCE if most > FEW_TOKENS else FEW_TOLERANCE))
    near = [tile for tile, cost in found.items() if cost <= allowed]

    def flatness(tile: tuple[int, ...]) -> tuple[float, float]:
        side = prod(tile) ** (1 / len(tile))
        return max(abs(log(t / side)) for t in tile), found[tile]

    return min(near, key=flatness)


def _boxes(grid: tuple[int, ...], most: int) -> Iterator[tuple[int, ...]]:
    if not grid:
        yield ()
        return
    for t in range(1, min(grid[0], most) + 1):
        for rest in _boxes(grid[1:], most // t):
            yield (t, *rest)


def _padding(grid: tuple[int, ...], tile: tuple[int, ...]) -> float:
    """The time of blocks of queries and keys, were all tiles visible, by that of tokens."""
    sizes = [((t, n // t), (n % t, 1)) for n, t in zip(grid, tile, strict=True)]
    parts = [
        (prod(side for side, _ in part), prod(count for _, count in part))
        for part in product(*sizes)
    ]

    def padded(block: int) -> int:
        return sum(many * -(-tokens // block) * block for tokens, many in parts)

    costs = (padded(block_q) * padded(block_k) / speed for block_q, block_k, speed in BLOCKS)
    return min(costs) / prod(grid) ** 2


def _of_density(density: float, tiles: tuple[int, ...]) -> tuple[int, ...]:
    """The window of about that density that reaches along all axes alike.

    Where it can it is two tiles long at least, for tiles that see only themselves along an axis never learn of
    the others, and an odd number of them, so that queries are in its middle.
    """
    if density == 1:
        return tiles
    share = density ** (1 / max(sum(m > 1 for m in tiles), 1))
    windows = list(product(*(range(1, m + 1) for m in tiles)))

    def off(window: tuple[int, ...]) -> float:
        return abs(log(prod(window) / prod(tiles) / density))

    def uneven(window: tuple[int, ...]) -> tuple[int, int, float, float]:
        alone = sum(k == 1 < m for k, m in zip(window, tiles, strict=True))
        aside = sum(k % 2 == 0 and k < m for k, m in zip(window, tiles, strict=True))
        ratios = (log(k / m / share) for k, m in zip(window, tiles, strict=True) if m > 1)
        return alone, aside, sum(map(abs, ratios)), off(window)

    allowed = max(min(map(off, windows)), log(1 + DENSITY_TOLERANCE)) + 1e-9
    return min((w for w in windows if off(w) <= allowed), key=uneven)


def _as_tuple(value):
    return tuple(value) if isinstance(value, list) else value

"""Generalized neighborhood attention: which keys of a grid a query sees.

The rule is separable. On an axis of length L with window w, stride s and dilation d, query i meets
only keys of its own residue class modulo d; with i' = i // d and L' the length of that class,

    leader = min((i' // s) * s + s // 2, L' - 1)         the query that decides for its stride group
    start  = clamp(leader - w // 2, 0, L' - w)           windows shift inwards at the borders
    visible: start <= j' < start + w

and on a causal axis leader = min((i' // s) * s + s - 1, L' - 1), start = max(leader - w + 1, 0),
visible: start <= j' <= i'.

Hassani et al., "Neighborhood Attention Transformer" (2023); "Generalized Neighborhood Attention"
(arXiv 2504.16922, section 3), with the border rules of NATTEN 0.21.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from math import ceil, floor, inf, log, prod

import torch
from torch import Tensor

from ..order.curves import grid_coordinates

# Whole blocks are worth that much: on two cores a third of the pairs at stride 8 takes 1.6 times as long as a
# quarter of them at stride 16 (4,096 tokens).
DENSITY_TOLERANCE = 0.25


@dataclass(frozen=True, kw_only=True, slots=True)
class Dense:
    """Every query sees every key."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Neighborhood:
    """A neighborhood, for any grid it is resolved on.

    window: keys per axis (an int serves every axis, None on an axis takes the whole axis).
    density: instead of a window, the share of the grid that a query should see, in (0, 1]; the
        window keeps about the grid's proportions, so one recipe serves every resolution.
    stride, dilation, causal: as in the module docstring, one value or one per axis. stride=None follows
        the grid: the largest power of two up to a quarter of the axis, at most 16 and the window, and
        less where the density would be missed by more than a quarter.
    """

    window: int | tuple[int | None, ...] | None = None
    density: float | None = None
    stride: int | tuple[int, ...] | None = 1
    dilation: int | tuple[int, ...] = 1
    causal: bool | tuple[bool, ...] = False

    def __post_init__(self):
        for name in ("window", "stride", "dilation", "causal"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        if (self.window is None) == (self.density is None):
            raise ValueError(
                "A neighborhood needs either window (keys per axis) or density (share of the grid), "
                f"got window={self.window} and density={self.density}."
            )
        if self.density is not None and not 0 < self.density <= 1:
            raise ValueError(f"density must lie in (0, 1], got {self.density}.")

    def check_axes(self, axes: int, where: str) -> None:
        """Raise ValueError where it fits no grid of so many axes. where: what has them, for the message."""
        for name in ("window", "stride", "dilation", "causal"):
            check_count(name, getattr(self, name), axes, where)
        free = (1,) * axes
        # On the smallest grid that the window fits, only mistakes of the options themselves remain.
        sizes = (
            per_axis(name, getattr(self, name), free) for name in ("window", "stride", "dilation")
        )
        self.resolve(tuple(max((w or s or 1) * d, 1) for w, s, d in zip(*sizes, strict=True)))

    def resolve(self, grid: tuple[int, ...]) -> NeighborhoodOnGrid:
        """The values per axis on this grid. Raises ValueError where they do not fit it."""
        rank = len(grid)
        if not 1 <= rank <= 3:
            raise ValueError(f"Neighborhoods exist on grids of 1 to 3 axes, got grid={grid}.")
        dilation = per_axis("dilation", self.dilation, grid)
        causal = tuple(bool(c) for c in per_axis("causal", self.causal, grid))
        asked = per_axis("stride", self.stride, grid)
        if self.density is None:
            window = tuple(
                n // d if w is None else w
                for w, n, d in zip(per_axis("window", self.window, grid), grid, dilation,
                                   strict=True)
            )  # fmt: skip
            stride = _strides(grid, asked, at_most=window)
        else:
            window, stride = _of_density(self.density, grid, asked, dilation)
        for axis, (n, w, s, d) in enumerate(zip(grid, window, stride, dilation, strict=True)):
            where = f"on axis {axis} of the grid {grid}: window={w}, stride={s}, dilation={d}"
            if w < 1 or s < 1 or d < 1:
                raise ValueError(f"window, stride and dilation must be at least 1 {where}.")
            if w * d > n:
                raise ValueError(
                    f"The window does not fit {where}; window * dilation may be at most {n}. "
                    "Choose a smaller window, None for the whole axis, or density= to follow the grid."
                )
            if s > w:
                raise ValueError(
                    f"The stride is larger than the window {where}; some keys would never be seen. "
                    f"Choose a stride of at most {w}."
                )
        return NeighborhoodOnGrid(grid, window, stride, dilation, causal)


@dataclass(frozen=True, slots=True)
class NeighborhoodOnGrid:
    """A neighborhood with one value per axis, checked against its grid. Hashable: plans are cached by it."""

    grid: tuple[int, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    causal: tuple[bool, ...]

    @property
    def is_dense(self) -> bool:
        return self.window == self.grid and not any(self.causal)

    def axis_bounds(self, axis: int, device=None) -> tuple[Tensor, Tensor]:
        """[start, end) of the visible keys of every query on one axis, in steps of the dilation: int64 [L]."""
        n, w, s, d = (v[axis] for v in (self.grid, self.window, self.stride, self.dilation))
        i = torch.arange(n, device=device)
        length = -(-(n - i % d) // d)
        i = i // d
        if self.causal[axis]:
            leader = torch.minimum(i // s * s + s - 1, length - 1)
            return (leader - (w - 1)).clamp(min=0), i + 1
        leader = torch.minimum(i // s * s + s // 2, length - 1)
        start = torch.minimum((leader - w // 2).clamp(min=0), length - w)
        return start, start + w

    def intervals(self, device=None) -> tuple[Tensor, Tensor, Tensor]:
        """(lo, hi, coord) of all tokens in row-major order, int64 [axes', S] each.

        A dilated axis becomes two: the residue class, where a query sees exactly its own, and the
        quotient. So axes' = rank + number of dilated axes.
        """
        lo, hi, coord = [], [], []
        for axis, x in enumerate(grid_coordinates(self.grid, device)):
            start, end = self.axis_bounds(axis, device)
            d = self.dilation[axis]
            if d > 1:
                lo.append(x % d)
                hi.append(x % d + 1)
                coord.append(x % d)
            lo.append(start[x])
            hi.append(end[x])
            coord.append(x // d)
        return torch.stack(lo), torch.stack(hi), torch.stack(coord)

    @property
    def visible(self) -> int:
        """Number of visible (query, key) pairs of the grid."""
        total = 1
        for axis in range(len(self.grid)):
            start, end = self.axis_bounds(axis)
            total *= int((end - start).sum())
        return total

    @property
    def density(self) -> float:
        return self.visible / prod(self.grid) ** 2


def neighborhood_mask(spec: NeighborhoodOnGrid, device=None) -> Tensor:
    """The rule itself, pair by pair, as bool [S, S] in row-major order: the oracle of every test."""
    mask = torch.ones(1, 1, dtype=torch.bool, device=device)
    for axis, n in enumerate(spec.grid):
        d = spec.dilation[axis]
        start, end = spec.axis_bounds(axis, device)
        i = torch.arange(n, device=device)
        one = (i[:, None] % d == i % d) & (i // d >= start[:, None]) & (i // d < end[:, None])
        mask = (mask[:, None, :, None] & one[None, :, None, :]).reshape(
            mask.shape[0] * n, mask.shape[1] * n
        )
    return mask


def _of_density(
    density: float, grid: tuple[int, ...], asked: tuple, dilation: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Window and stride per axis of about the grid's proportions that see `density` of the grid.

    Windows are whole numbers of strides, so that those of a stride group end on blocks. Where a free
    stride leaves the density more than `DENSITY_TOLERANCE` off, it is halved.
    """
    share = density ** (1 / max(sum(n > 1 for n in grid), 1))
    best = (inf, (), ())
    for limit in (16, 8, 4, 2, 1):
        stride = _strides(grid, asked, at_most=(limit,) * len(grid))
        choices = []
        for n, s, d in zip(grid, stride, dilation, strict=True):
            strides = share * n / s
            around = {min(max(k, 1) * s, max(n // d, 1)) for k in (floor(strides), ceil(strides))}
            choices.append(sorted(around))
        for window in product(*choices):
            error = abs(log(prod(window) / prod(grid) / density))
            if error < best[0] - 1e-9:
                best = (error, window, tuple(map(min, stride, window)))
        if best[0] <= log(1 + DENSITY_TOLERANCE) or None not in asked:
            break
    return best[1:]


def _strides(grid: tuple[int, ...], asked: tuple, at_most: tuple[int, ...]) -> tuple[int, ...]:
    """The strides asked for. None follows the axis: windows that move by whole blocks need no masks."""
    free = (
        min(16, 1 << max(n // 4, 1).bit_length() - 1, m) for n, m in zip(grid, at_most, strict=True)
    )
    return tuple(f if s is None else s for f, s in zip(free, asked, strict=True))


def check_count(name: str, value, axes: int, where: str) -> None:
    if isinstance(value, tuple) and len(value) != axes:
        raise ValueError(f"{name}={value} has {len(value)} values, but {where}.")


def per_axis(name: str, value, grid: tuple[int, ...]) -> tuple:
    if isinstance(value, tuple):
        if len(value) != len(grid):
            raise ValueError(
                f"{name}={value} has {len(value)} values, but the grid {grid} has {len(grid)} axes."
            )
        return value
    return (value,) * len(grid)

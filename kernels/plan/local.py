"""Hierarchical local attention of Scale-DiT: text, an image, and the same image small as guidance.

    text      sees text and the image, not the guidance
    image     sees text, the tokens around it (|dh| <= r and |dw| <= r, r half a window, clipped at borders) and the
              guidance of its own window and of those around it
    guidance  sees the tokens around it in the guidance, in windows as much smaller, and nothing else

The public code computes blocks of 128 queries and 64 keys whole as soon as one pair in them is visible. That is
`block`: such blocks of the ordered line are kept whole, whatever the tiles of an implementation are, so that all of
them compute the same and none needs a mask. `block=None` is the rule itself.

"Scale-DiT" (arXiv 2510.16325), section 3; https://github.com/PeterYYZhang/Scale-DiT, whose mask is
`Local(guidance="linear")` in the order of its windows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..order.curves import grid_coordinates
from .layout import Segment, TokenLayout
from .neighborhood import check_count, per_axis

OWN, GUIDANCE = 0, 1  # tables of bounds: for keys of the query's own segment, and of the guidance


@dataclass(frozen=True, kw_only=True, slots=True)
class Local:
    """Which tokens meet in Scale-DiT, for any image.

    window: tokens per axis of a window of the image, at least 2; a query sees half a window to each side.
    block: (queries, keys) of the blocks of the ordered line that are kept whole; None keeps the rule itself.
    guidance: which windows of the guidance an image token sees: its own and the eight around it ("windows"), or
        as the public code has it those of the next lower and the next higher number ("linear"), which are the
        ones to the left and to the right, or at an end of a row the far end of another.
    """

    window: int | tuple[int, ...] = 16
    block: tuple[int, int] | None = (128, 64)
    guidance: Literal["windows", "linear"] = "windows"

    def __post_init__(self):
        for name in ("window", "block"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        sides = self.window if isinstance(self.window, tuple) else (self.window,)
        if any(side < 2 for side in sides):
            raise ValueError(f"A window has at least 2 tokens on every axis, got {self.window}.")
        if self.block is not None and (len(self.block) != 2 or min(self.block) < 1):
            raise ValueError(
                f"block is (queries, keys), both at least 1, or None, got {self.block}."
            )
        if self.guidance not in ("windows", "linear"):
            raise ValueError(f"guidance is 'windows' or 'linear', got {self.guidance!r}.")

    def check_axes(self, axes: int, where: str) -> None:
        """Raise ValueError where it fits no grid of so many axes. where: what has them, for the message."""
        check_count("window", self.window, axes, where)

    def windows(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        """The window on every axis of a grid."""
        return per_axis("window", self.window, grid)

    def guidance_windows(self, grid: tuple[int, ...], coarse: tuple[int, ...]) -> tuple[int, ...]:
        """The windows of `grid` on a coarser one."""
        return scaled(self.windows(grid), grid, coarse)


def relations(layout: TokenLayout) -> list[tuple[int, int, int | None]]:
    """(segment of queries, segment of keys, the table that decides, or None where all pairs are visible)."""
    found: list[tuple[int, int, int | None]] = []
    for i, queries in enumerate(layout.segments):
        for j, keys in enumerate(layout.segments):
            if queries.keys_only:
                continue
            if keys.kind == "guidance":
                if queries.kind in ("grid", "guidance"):
                    found.append((i, j, GUIDANCE if queries.kind == "grid" else OWN))
            elif queries.kind != "guidance":
                found.append((i, j, OWN if i == j and keys.kind == "grid" else None))
    return found


def local_bounds(layout: TokenLayout, spec: Local, device=None) -> tuple[Tensor, Tensor, Tensor]:
    """(lo, hi, coord) in the model's order: int64 [2, axes, S] twice, and [axes, S].

    With numbered windows of the guidance there is an axis more, their number. Tokens without a rule on an axis
    hold 0 <= 0 < all.
    """
    image = image_of(layout)
    linear = spec.guidance == "linear"
    axes = len(image.shape) + linear
    lo = torch.zeros(2, axes, layout.length, dtype=torch.long, device=device)
    hi = torch.full_like(lo, layout.length + 1)
    coord = torch.zeros(axes, layout.length, dtype=torch.long, device=device)
    coarse = next((s.shape for s in layout.segments if s.kind == "guidance"), None)
    for segment, start in zip(layout.segments, layout.offsets, strict=False):
        if segment.kind not in ("grid", "guidance"):
            continue
        own = slice(start, start + segment.length)
        windows = spec.windows(segment.shape)
        if segment.kind == "guidance":
            windows = spec.guidance_windows(image.shape, segment.shape)
        place = grid_coordinates(segment.shape, device)  # [axes, n]
        for axis, (x, window) in enumerate(zip(place, windows, strict=True)):
            coord[axis, own] = x
            lo[OWN, axis, own], hi[OWN, axis, own] = x - window // 2, x + window // 2 + 1
        if coarse is None:
            continue
        windows = spec.guidance_windows(image.shape, coarse)
        ratios = zip(place, coarse, segment.shape, windows, strict=True)
        of_window = [x * m // n // w for x, m, n, w in ratios]  # of the guidance, per axis
        if linear:
            number = torch.zeros_like(of_window[0])
            for x, m, w in zip(of_window, coarse, windows, strict=True):
                number = number * -(-m // w) + x
            coord[-1, own] = number if segment.kind == "guidance" else 0
            lo[GUIDANCE, -1, own], hi[GUIDANCE, -1, own] = number - 1, number + 2
        else:
            for axis, (x, w) in enumerate(zip(of_window, windows, strict=True)):
                lo[GUIDANCE, axis, own], hi[GUIDANCE, axis, own] = (x - 1) * w, (x + 2) * w
    return lo, hi, coord


def local_pairs(layout: TokenLayout, spec: Local) -> int:
    """Number of (query, key) pairs that the rule itself makes visible, counted axis by axis."""
    lo, hi, coord = local_bounds(layout, spec)
    total = 0
    for i, j, table in relations(layout):
        queries, keys = layout.segments[i], layout.segments[j]
        if table is None:
            total += queries.length * keys.length
            continue
        q = slice(layout.offsets[i], layout.offsets[i + 1])
        k = slice(layout.offsets[j], layout.offsets[j + 1])
        seen = torch.ones(queries.length, dtype=torch.long)
        if table == GUIDANCE and spec.guidance == "linear":
            ends = torch.nn.functional.pad(coord[-1, k].bincount().cumsum(0), (1, 0))
            most = ends.numel() - 1
            seen = ends[hi[table, -1, q].clamp(0, most)] - ends[lo[table, -1, q].clamp(0, most)]
        else:
            for axis, n in enumerate(keys.shape):
                seen = seen * (hi[table, axis, q].clamp(max=n) - lo[table, axis, q].clamp(min=0))
        total += int(seen.sum())
    return total


def local_mask(layout: TokenLayout, spec: Local) -> Tensor:
    """The rule itself, pair by pair, as bool [queries, keys] in the model's order: the oracle of the tests."""
    mask = torch.zeros(layout.queries, layout.length, dtype=torch.bool)
    lo, hi, coord = local_bounds(layout, spec)
    for i, j, table in relations(layout):
        q = slice(layout.offsets[i], layout.offsets[i + 1])
        k = slice(layout.offsets[j], layout.offsets[j + 1])
        if table is None:
            mask[q, k] = True
        else:
            inside = coord[:, None, k] >= lo[table][:, q, None]
            mask[q, k] = (inside & (coord[:, None, k] < hi[table][:, q, None])).all(0)
    return mask


def image_of(layout: TokenLayout) -> Segment:
    images = [segment for segment in layout.segments if segment.kind == "grid"]
    guidance = [segment for segment in layout.segments if segment.kind == "guidance"]
    if not images or len(guidance) > 1 or (guidance and len(images) > 1):
        raise ValueError(
            f"Local attention takes an image with its guidance, or images without, got {layout.segments}."
        )
    if any(len(segment.shape) != len(images[0].shape) for segment in (*images, *guidance)):
        raise ValueError(f"An image and its guidance have the same axes, got {layout.segments}.")
    return max(images, key=lambda segment: segment.length)


def scaled(
    sides: tuple[int, ...], grid: tuple[int, ...], coarse: tuple[int, ...]
) -> tuple[int, ...]:
    return tuple(max(1, round(s * m / n)) for s, m, n in zip(sides, coarse, grid, strict=True))

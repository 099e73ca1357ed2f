"""Runs of tokens: cutting a line into tiles, and joining the tiles that a query tile visits into entries."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .block_plan import Entries


@dataclass(frozen=True, slots=True)
class Tiles:
    """Runs of one kind (queries or keys): start, count, segment are int64 [n]."""

    start: Tensor
    count: Tensor
    segment: Tensor

    @property
    def of_position(self) -> Tensor:
        """The tile of every position: int64 [S]."""
        return _owners(self.count)


def cut(run: Tensor, segment: Tensor, block: int) -> Tiles:
    """Cut every run of equal (segment, run) ids into pieces of at most `block` tokens."""
    key = segment * (int(run.max()) + 1) + run
    length = torch.unique_consecutive(key, return_counts=True)[1]
    first = length.cumsum(0) - length
    owner, start, count = _pieces(length, block)
    start = start + first[owner]
    return Tiles(start, count, segment[start])


def merged(
    pairs: tuple[Tensor, Tensor], whole: Tensor, q_tiles: Tiles, k_tiles: Tiles, block: int
) -> tuple[Entries, Entries]:
    """The full and the partial entries of all rows.

    pairs: (query tile, key tile), sorted. whole: bool, which of them are full. Where `block` is not 0, key
    tiles that lie together on the line become entries of up to `block` keys; one is full if all its
    tiles are.
    """
    row, column = pairs
    start, count = k_tiles.start[column], k_tiles.count[column]
    if block and row.numel():
        segment = k_tiles.segment[column]
        begins = torch.ones_like(whole)
        begins[1:] = (row[1:] != row[:-1]) | (start[1:] != start[:-1] + count[:-1])
        begins[1:] |= segment[1:] != segment[:-1]  # no mask may see tokens without coordinates
        first = begins.nonzero()[:, 0]
        run = begins.cumsum(0) - 1
        length = torch.zeros_like(first).index_add_(0, run, count)
        before = length.cumsum(0) - length  # visited keys of all runs before
        owner, inside, pieces = _pieces(length, block)
        # The tiles that a piece overlaps, found by counting visited keys.
        ends = count.cumsum(0)
        low = torch.searchsorted(ends, before[owner] + inside, right=True)
        high = torch.searchsorted(ends, before[owner] + inside + pieces)
        holes = torch.nn.functional.pad((~whole).cumsum(0), (1, 0))
        whole = holes[high + 1] == holes[low]
        row, start, count = row[first][owner], start[first][owner] + inside, pieces
    rows = q_tiles.start.numel()
    full, partial = (_entries(row[x], start[x], count[x], rows) for x in (whole, ~whole))
    return full, partial


def _entries(row: Tensor, start: Tensor, count: Tensor, rows: int) -> Entries:
    offset = torch.zeros(rows + 1, dtype=torch.int32, device=row.device)
    offset[1:] = torch.bincount(row, minlength=rows).cumsum(0)
    return Entries(offset=offset, start=start.int(), count=count.int())


def _owners(count: Tensor) -> Tensor:
    return torch.repeat_interleave(torch.arange(count.numel(), device=count.device), count)


def _pieces(length: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pieces of at most `block` of every length: owner, where it begins in its owner, and its length."""
    pieces = -(-length // block)
    owner = _owners(pieces)
    piece = torch.arange(owner.numel(), device=length.device) - (pieces.cumsum(0) - pieces)[owner]
    start = piece * block
    return owner, start, (length[owner] - start).clamp(max=block)

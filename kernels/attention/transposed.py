"""A BlockPlan seen from its keys: for every block of keys the queries that visit it. Derived once per plan.

Tiles cut the keys where they like, gradients of keys want one cut for all. Blocks of keys end where entries
end as far as their width allows, so that in plans whose tiles share one cut, as the planner makes them, no
entry is split in vain; any other plan works too, with masks where an entry covers a part of a block.

A *visit* is a run of queries of one tile, at most `rows` long, that reads an interval of one block of keys
through one entry. Neighbouring full entries are joined first; visits that cover their block need no mask.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..plan.block_plan import BlockPlan, Entries


class Visits(NamedTuple):
    """int32 [n] each. Those of key block j under variant v are offset[v * blocks + j] and so on.

    q_start, q_count: the queries; first_row: their first one's place in its tile. lo, hi: the visible
    columns of the key block. entry: of the plan's list; column: of the entry, where the key block starts.
    """

    offset: Tensor
    q_start: Tensor
    q_count: Tensor
    first_row: Tensor
    tile: Tensor
    lo: Tensor
    hi: Tensor
    entry: Tensor
    column: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class TransposedPlan:
    """k_start, k_count: int32 [blocks], all keys. order: int32 [variants, blocks], the `heavy` longest first.

    whole: visits that cover their key block; cut: those of full entries that do not, None if there are
    none; partial: those under the plan's mask.
    """

    k_start: Tensor
    k_count: Tensor
    order: Tensor
    heavy: int
    whole: Visits
    cut: Visits | None
    partial: Visits

    @property
    def blocks(self) -> int:
        return self.k_start.numel()


class _Runs(NamedTuple):
    """int64 [n] each: keys start .. end that a list row visits through an entry."""

    row: Tensor
    start: Tensor
    end: Tensor
    entry: Tensor
    entry_start: Tensor


_cache: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def transpose(plan: BlockPlan, rows: int, width: int) -> TransposedPlan:
    """Visits of at most `rows` queries to blocks of at most `width` keys, kept while the plan's tensors live."""
    source = (plan.q_start, plan.full.start, plan.partial.offset, plan.partial.start)
    kept = _cache.setdefault(plan.full.offset, {})
    known = kept.get((rows, width))
    if known is None or any(a is not b for a, b in zip(known[0], source, strict=True)):
        kept[rows, width] = known = source, _transpose(plan, rows, width)
    return known[1]


def _transpose(plan: BlockPlan, rows: int, width: int) -> TransposedPlan:
    full, partial = _joined(plan.full), _runs(plan.partial)
    k_start = _key_blocks(plan, (full, partial), width)
    k_end = torch.cat([k_start[1:], k_start.new_tensor([plan.length_k])])
    split = [_split(runs, k_start, k_end) for runs in (full, partial)]
    runs, block = split[0]
    covers = (runs.start == k_start[block]) & (runs.end == k_end[block])

    def visits(runs: _Runs, block: Tensor) -> Visits:
        return _visits(plan, runs, block, k_start, rows)

    def chosen(where: Tensor) -> Visits:
        return visits(_Runs(*(x[where] for x in runs)), block[where])

    whole, rest = chosen(covers), chosen(~covers)
    masked = visits(*split[1])
    length = sum(v.offset.diff() for v in (whole, rest, masked)).view(plan.variants, -1)
    is_heavy = length > 2 * length.float().mean()
    # Light blocks keep their places: neighbours share queries in the L2 cache.
    order = torch.where(is_heavy, length, 0).argsort(dim=1, descending=True, stable=True).int()
    return TransposedPlan(
        k_start.int(), (k_end - k_start).int(), order, int(is_heavy.sum(1).amin()), whole,
        rest if rest.tile.numel() else None, masked,
    )  # fmt: skip


def _runs(entries: Entries) -> _Runs:
    start = entries.start.long()
    number = torch.arange(start.numel(), device=start.device)
    return _Runs(entries.rows, start, start + entries.count, number, start)


def _joined(entries: Entries) -> _Runs:
    """Neighbouring runs of a row as one."""
    runs = _runs(entries)
    if not runs.row.numel():
        return runs
    order = (runs.row * (int(runs.end.max()) + 1) + runs.start).argsort()
    runs = _Runs(*(x[order] for x in runs))
    is_first = torch.ones_like(runs.row, dtype=torch.bool)
    is_first[1:] = (runs.row[1:] != runs.row[:-1]) | (runs.start[1:] != runs.end[:-1])
    return _Runs(*(x[is_first] for x in runs))._replace(end=runs.end[is_first.roll(-1)])


def _key_blocks(plan: BlockPlan, lists: tuple[_Runs, _Runs], width: int) -> Tensor:
    """Starts of key blocks, int64: on a grid, or at ends of entries, whichever needs fewer visits."""
    device = plan.device
    grid = torch.arange(0, max(plan.length_k, 1), width, device=device)
    ends = torch.cat([grid[:1], *(x for runs in lists for x in (runs.start, runs.end))])
    ends = ends.unique().tolist()  # the first is 0
    starts = [0]
    while starts[-1] + width < plan.length_k:
        within = ends[bisect_right(ends, starts[-1] + width) - 1]
        starts.append(within if within > starts[-1] else starts[-1] + width)
    fitted = torch.tensor(starts, device=device)
    visits = [
        int(sum((_blocks_of(runs, cut)[1]).sum() for runs in lists)) for cut in (grid, fitted)
    ]
    return grid if visits[0] <= visits[1] else fitted


def _blocks_of(runs: _Runs, k_start: Tensor) -> tuple[Tensor, Tensor]:
    """The first key block of every run, and how many it visits."""
    first = torch.searchsorted(k_start, runs.start, right=True) - 1
    last = torch.searchsorted(k_start, runs.end - 1, right=True) - 1
    return first, torch.where(runs.end > runs.start, last - first + 1, 0)


def _split(runs: _Runs, k_start: Tensor, k_end: Tensor) -> tuple[_Runs, Tensor]:
    """Runs cut at key blocks, and the block of every piece."""
    first, count = _blocks_of(runs, k_start)
    owner, piece = _repeated(count)
    block = first[owner] + piece
    runs = _Runs(*(x[owner] for x in runs))
    return runs._replace(
        start=torch.maximum(runs.start, k_start[block]), end=torch.minimum(runs.end, k_end[block])
    ), block


def _visits(plan: BlockPlan, runs: _Runs, block: Tensor, k_start: Tensor, rows: int) -> Visits:
    """The pieces, each once for every `rows` queries of its tile, sorted by key block."""
    tile = runs.row % plan.tiles
    owner, part = _repeated((plan.q_count[tile].long() + rows - 1) // rows)
    listed = (runs.row // plan.tiles * k_start.numel() + block)[owner]
    order = listed.argsort(stable=True)
    owner, part, listed = owner[order], part[order], listed[order]
    tile, block = tile[owner], block[owner]
    offset = torch.zeros(plan.variants * k_start.numel() + 1, dtype=torch.int32, device=plan.device)
    offset[1:] = torch.bincount(listed, minlength=offset.numel() - 1).cumsum(0)
    return Visits(offset, *(x.int() for x in (
        plan.q_start[tile] + part * rows,
        (plan.q_count[tile] - part * rows).clamp(max=rows),
        part * rows,
        tile,
        runs.start[owner] - k_start[block],
        runs.end[owner] - k_start[block],
        runs.entry[owner],
        k_start[block] - runs.entry_start[owner],
    )))  # fmt: skip


def _repeated(count: Tensor) -> tuple[Tensor, Tensor]:
    """Every index i count[i] times, and which time it is."""
    owner = torch.repeat_interleave(torch.arange(count.numel(), device=count.device), count)
    return owner, torch.arange(owner.numel(), device=count.device) - (count.cumsum(0) - count)[
        owner
    ]

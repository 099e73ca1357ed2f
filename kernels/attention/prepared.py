"""A BlockPlan in the form that GPU kernels read, derived once per plan and cached while it lives.

* Full entries of the whole block width come before the ragged ones, so that the hot loop over them
  has neither masks nor counts.
* Interval bounds of all axes are packed into one 32-bit word (or a few), a field per axis with a
  guard bit above it. With G the guard bits, `(coord + G) - lo` keeps the guard bit of an axis iff
  lo <= coord, and `(last + 2 G) - (coord + G)` keeps it iff coord <= last. So all axes together
  cost two subtractions, one AND and one comparison a pair, instead of four operations an axis.
* Tiles much longer than the mean (text queries see everything) start before all others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..plan.block_plan import BitMask, BlockPlan, IntervalMask


class PackedIntervals(NamedTuple):
    """lo, hi: int32 [tables, words, Sq]; coord: int32 [words, Sk + 1]; table: int32 [n], None for one.

    coord[:, Sk] lies outside every interval: columns past an entry's count are sent there.
    """

    lo: Tensor
    hi: Tensor
    coord: Tensor
    table: Tensor | None
    guard: Tensor  # int32 [words]
    length_q: int
    length_k: int


class PackedBits(NamedTuple):
    """bits: int32 [n, block_q, words], as in BitMask."""

    bits: Tensor
    block_q: int


@dataclass(frozen=True, slots=True, eq=False)
class PreparedPlan:
    """order: int32 [variants, tiles], the first `heavy` tiles of every row are the longest ones.

    whole_end: int32 [rows], where the ragged entries of a row begin; None if there are none.
    full_start, full_count: the full entries, whole ones first in every row.
    mask: None without partial entries. words: 32-bit words of a token (intervals) or a row (bits).
    """

    order: Tensor
    heavy: int
    whole_end: Tensor | None
    full_start: Tensor
    full_count: Tensor
    mask: PackedIntervals | PackedBits | None
    words: int
    source: tuple[Tensor, ...]


# The key is a tensor and not the plan: a custom op hands over tensors, from which a new BlockPlan is
# made in every call.
_cache: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def prepare(plan: BlockPlan, width: int) -> PreparedPlan:
    """The plan for blocks of `width` keys. The first call for a plan waits for the device, once."""
    source = (plan.full.start, plan.full.count, plan.partial.offset, plan.partial.start,
              *([] if plan.mask is None else plan.to_tensors()[9:]))  # fmt: skip
    ready = _cache.get(plan.full.offset)
    if (
        ready is not None
        and len(ready.source) == len(source)
        and all(a is b for a, b in zip(ready.source, source, strict=True))
    ):
        return ready
    full, partial = plan.full, plan.partial
    length = (full.offset.diff() + partial.offset.diff()).view(plan.variants, plan.tiles)
    is_heavy = length > 2 * length.float().mean()
    # Light tiles keep their places: neighbours in the list share keys in the L2 cache.
    order = torch.where(is_heavy, length, 0).argsort(dim=1, descending=True, stable=True).int()
    is_ragged = full.count != width
    facts = [is_heavy.sum(1).amin()[None], is_ragged.any()[None]]
    intervals = isinstance(plan.mask, IntervalMask) and partial.start.numel() > 0
    if intervals:
        facts += [plan.mask.coord.amin(1), plan.mask.coord.amax(1)]
    heavy, ragged, *extremes = torch.cat([fact.long() for fact in facts]).tolist()

    whole_end, start, count = None, full.start, full.count
    if ragged:
        row = full.rows
        ranked = (2 * row + is_ragged).argsort(stable=True)
        start, count = start[ranked], count[ranked]
        whole = torch.zeros_like(full.offset).index_add_(0, row, (~is_ragged).int())
        whole_end = full.offset[:-1] + whole[:-1]

    mask, words = None, 0
    if intervals:
        axes = len(extremes) // 2
        mask = _pack_intervals(plan, plan.mask, extremes[:axes], extremes[axes:])
        words = mask.guard.numel()
    elif isinstance(plan.mask, BitMask) and partial.start.numel():
        mask = PackedBits(plan.mask.bits, plan.mask.bits.shape[1])
        words = plan.mask.bits.shape[2]
    _cache[plan.full.offset] = ready = PreparedPlan(
        order, heavy, whole_end, start, count, mask, words, source
    )
    return ready


def _pack_intervals(
    plan: BlockPlan, mask: IntervalMask, lowest: list[int], highest: list[int]
) -> PackedIntervals:
    fields, words, used = [], 0, 32  # (word, shift, bits) of every axis
    for low, high in zip(lowest, highest, strict=True):
        bits = (high - low + 1).bit_length()
        if used + bits + 1 > 32:
            words, used = words + 1, 0
        fields.append((words - 1, used, bits))
        used += bits + 1
    tables = mask.lo.shape[0]
    lo = torch.zeros(tables, words, plan.length_q, dtype=torch.int64, device=plan.device)
    hi = torch.zeros_like(lo)
    coord = torch.zeros(words, plan.length_k + 1, dtype=torch.int64, device=plan.device)
    guards = [0] * words
    for axis, (word, shift, bits) in enumerate(fields):
        low, span = lowest[axis], highest[axis] - lowest[axis]
        first = (mask.lo[:, axis].long() - low).clamp(0, span + 1)
        last = (mask.hi[:, axis].long() - 1 - low).clamp(-1, span)
        first = torch.where(first > last, span + 1, first)  # an empty interval lets nothing pass
        lo[:, word] += first << shift
        hi[:, word] += (last.clamp(min=0) << shift) + (2 << (shift + bits))
        coord[word, :-1] += (mask.coord[axis].long() - low) << shift
        coord[word, -1] += (2**bits - 1) << shift
        guards[word] += 1 << (shift + bits)
    guard = torch.tensor(guards, device=plan.device)
    return PackedIntervals(
        _wrapped(lo), _wrapped(hi), _wrapped(coord + guard[:, None]),
        mask.table if tables > 1 else None, _wrapped(guard), plan.length_q, plan.length_k,
    )  # fmt: skip


def _wrapped(x: Tensor) -> Tensor:
    """int64 to int32 modulo 2^32, as the subtractions in the kernel wrap."""
    return ((x + (1 << 31)) % (1 << 32) - (1 << 31)).int()

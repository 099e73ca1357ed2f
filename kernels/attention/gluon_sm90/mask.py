"""The masks of a plan as the Hopper kernel reads them: one bit a pair, for all partial entries.

Intervals become bits as well, once per plan: testing a bit takes two instructions a pair, a packed interval
six and eight registers more, which three warpgroups do not have. Windows look alike from most tiles, so
equal masks are kept once: 35,292 entries of a 30 x 40 x 40 grid have 74 different masks, 150 KiB in all.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ...plan.block_plan import BlockPlan

COLUMNS = 128  # keys of an entry, in words of 32
_CHUNK = 256  # entries at once
# What an entry is to the 64 queries of a consumer, in 2 bits for each of three, above the number of its mask.
EMPTY, WHOLE, MIXED = 0, 1, 3
KIND_SHIFT = 24
CONSUMER_ROWS = 64  # queries of a consumer
# Consumers look at kinds where they pass that share of masked entries by, or none needs its mask: looking makes a
# masked block longer.
LEAST_PASSED = 0.2

# By the tensor that identifies a plan's entries: a compiled call makes new plans of the same tensors.
_masks: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


class Masks(NamedTuple):
    """bits: different masks, int32 [masks, block_q, 4]. entries: int32 [n], of every partial entry the number of its
    mask and above it the kinds. by_group: whether these are worth a look; mixed: whether any is MIXED.

    Bit 2 j + i of word c is for key 8 j + 2 c + i of an entry, 0 past its count: what a thread of the accumulator
    holds of a row is a word.
    """

    bits: Tensor
    entries: Tensor
    by_group: bool
    mixed: bool


def masks_of(plan: BlockPlan) -> Masks:
    """The first call for a plan waits for the device."""
    if plan.partial.offset not in _masks:
        tile = plan.partial.rows % plan.tiles
        entries = torch.arange(tile.numel(), device=plan.device)
        marks = [_marks(_pack(_visible(plan, e, tile[e]))) for e in entries.split(_CHUNK)]
        unique, number = torch.unique(torch.cat(marks), dim=0, return_inverse=True)
        assert unique.shape[0] < min(1 << KIND_SHIFT, (1 << 29) // plan.block_q)
        first = entries.new_full(unique.shape[:1], entries.numel())
        first = first.scatter_reduce(0, number, entries, "amin")
        bits = torch.cat([_pack(_visible(plan, e, tile[e])) for e in first.split(_CHUNK)])
        kinds = _kinds(bits)
        shift = KIND_SHIFT + 2 * torch.arange(kinds.shape[1], device=plan.device)
        marked = number | (kinds << shift).sum(1)[number]
        own = kinds[number, : -(-plan.block_q // CONSUMER_ROWS)]
        mixed, passed = bool((own == MIXED).any()), float((own == EMPTY).double().mean())
        by_group = passed >= LEAST_PASSED or not mixed
        _masks[plan.partial.offset] = Masks(bits, marked.int(), by_group, mixed)
    return _masks[plan.partial.offset]


def consumers_of(plan: BlockPlan) -> Tensor:
    """Of every partial entry the share of consumers that do not pass it by: fp32 [n]."""
    masks = masks_of(plan)
    if not masks.by_group:
        return torch.ones_like(masks.entries, dtype=torch.float32)
    groups = -(-plan.block_q // CONSUMER_ROWS)
    kinds = masks.entries[:, None] >> (KIND_SHIFT + 2 * torch.arange(groups, device=plan.device))
    return (kinds & 1).float().mean(1)


def _kinds(bits: Tensor) -> Tensor:
    """What every mask is to each of three consumers: int64 [masks, 3]; EMPTY past the end of the tile."""
    rows = torch.nn.functional.pad(bits, (0, 0, 0, 3 * CONSUMER_ROWS - bits.shape[1]))
    words = rows.unflatten(1, (3, CONSUMER_ROWS)).flatten(2)
    there = torch.arange(3, device=bits.device) * CONSUMER_ROWS < bits.shape[1]
    whole, empty = (words == -1).all(2), (words == 0).all(2) | ~there
    return torch.where(empty, EMPTY, torch.where(whole, WHOLE, MIXED))


def _marks(bits: Tensor) -> Tensor:
    """128 bits that tell masks apart: int64 [entries, 2]."""
    x = bits.flatten(1).long()  # [E, words]
    place = torch.arange(x.shape[1], device=x.device)
    marks = []
    for odd in (0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9):  # as splitmix64 mixes
        y = (x + (place + 1) * odd) * odd
        y = (y ^ (y >> 29)) * 0x14D049BB133111EB
        marks.append((y ^ (y >> 32)).sum(1))
    return torch.stack(marks, 1)


def _visible(plan: BlockPlan, entries: Tensor, tile: Tensor) -> Tensor:
    """bool [entries, block_q, COLUMNS]; rows past the tile's end are as its last one."""
    column = torch.arange(COLUMNS, device=plan.device)
    inside = (column < plan.partial.count[entries, None])[:, None]  # [E, 1, BN]
    if hasattr(plan.mask, "bits"):
        words = plan.mask.bits[entries]
        words = torch.nn.functional.pad(words, (0, COLUMNS // 32 - words.shape[2]))
        return ((words[..., column // 32] >> (column % 32)) & 1 == 1) & inside
    row = torch.arange(plan.block_q, device=plan.device)
    query = plan.q_start[tile, None] + row.minimum(plan.q_count[tile, None] - 1)  # [E, BM]
    key = (plan.partial.start[entries, None] + column).clamp(max=plan.length_k - 1)  # [E, BN]
    seen = inside
    for axis in range(plan.mask.coord.shape[0]):
        table = plan.mask.table[entries, None].long()
        lo = plan.mask.lo[table, axis, query][..., None]
        hi = plan.mask.hi[table, axis, query][..., None]
        coord = plan.mask.coord[axis, key][:, None]
        seen = seen & (coord >= lo) & (coord < hi)
    return seen.expand(-1, plan.block_q, -1)


def _pack(seen: Tensor) -> Tensor:
    """bool [.., COLUMNS] as the words of `Masks`, int32 [.., 4]."""
    shift = torch.arange(COLUMNS // 4, dtype=torch.int32, device=seen.device)
    by_thread = seen.unflatten(-1, (-1, 4, 2)).transpose(-2, -3).flatten(-2)  # [.., 4, COLUMNS / 4]
    return (by_thread.int() << shift).sum(-1, dtype=torch.int32)

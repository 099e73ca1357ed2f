"""The masks of a plan as the Hopper kernel reads them: one bit a pair, for all partial entries.

Intervals become bits as well, once per plan: testing a bit takes two instructions a pair, a packed interval
six and eight registers more, which three warpgroups do not have. Windows look alike from most tiles, so
equal masks are kept once: 35,292 entries of a 30 x 40 x 40 grid have 74 different masks, 150 KiB in all.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ...plan.block_plan import BlockPlan

COLUMNS = 128  # keys of an entry, in words of 32
_CHUNK = 256  # entries at once

# By the tensor that identifies a plan's entries: a compiled call makes new plans of the same tensors.
_masks: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def masks_of(plan: BlockPlan) -> tuple[Tensor, Tensor]:
    """Different masks, int32 [masks, block_q, COLUMNS / 32], and the mask of every partial entry, int32 [n].

    Bit j of word w is for key 32 w + j of an entry, 0 past its count. The first call for a plan waits for
    the device.
    """
    if plan.partial.offset not in _masks:
        tile = plan.partial.rows % plan.tiles
        entries = torch.arange(tile.numel(), device=plan.device)
        marks = [_marks(_pack(_visible(plan, e, tile[e]))) for e in entries.split(_CHUNK)]
        unique, mask = torch.unique(torch.cat(marks), dim=0, return_inverse=True)
        first = entries.new_full(unique.shape[:1], entries.numel())
        first = first.scatter_reduce(0, mask, entries, "amin")
        bits = [_pack(_visible(plan, e, tile[e])) for e in first.split(_CHUNK)]
        _masks[plan.partial.offset] = torch.cat(bits), mask.int()
    return _masks[plan.partial.offset]


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
    shift = torch.arange(32, dtype=torch.int32, device=seen.device)
    return (seen.unflatten(-1, (-1, 32)).int() << shift).sum(-1, dtype=torch.int32)

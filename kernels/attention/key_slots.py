"""Keys laid out for kernels that quantise them by blocks: every run of keys starts at a multiple of a width.

Entries of a plan are runs of keys (start, count) at any start, so that ragged tiles need no padding. An
8-bit kernel wants more: keys that share a scale may not straddle two runs, and a transposed V is fetched in
aligned boxes. So run j is moved to slot j, at width * j, and what it leaves empty is padding that no entry
counts. Plans whose runs start at multiples of the width, as those of dense attention in row order do, stay
as they are and cost nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..plan.block_plan import BlockPlan, Entries, IntervalMask
from .bias import Bias, BlockBias

# Slots may take this many times the keys, or this many positions: runs that overlap have slots of their
# own, and a plan that cuts the keys of every tile anew would need one for every entry.
MOST_GROWTH = 8
ALWAYS_FITS = 1 << 16


@dataclass(frozen=True, slots=True, eq=False)
class KeySlots:
    """The plan over slots, and where they get their keys.

    plan: shows the same pairs as the plan it comes from, of keys counted in slots.
    order: int32 [plan.length_k], the key at a position, -1 where it is padding; None if keys stay in place.
    """

    plan: BlockPlan
    order: Tensor | None

    def bias(self, bias: Bias) -> Bias:
        """The bias of the same pairs, of keys at their new positions."""
        if self.order is None:
            return bias
        order = self.order.long().clamp(min=0)  # no pair of padding is visible: any number will do
        if isinstance(bias, BlockBias):
            return BlockBias(bias.rows[..., order])
        return replace(bias, k_index=bias.k_index[order])


@dataclass(frozen=True, slots=True, eq=False)
class _Found:
    """What is kept for a plan and a width. slots: None if keys stay in place or do not fit."""

    source: tuple[Tensor, ...]
    positions: int
    slots: KeySlots | None


# By the tensor that identifies a plan, and by width: a custom op makes a new BlockPlan in every call.
_cache: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def slot_width(block_k: int) -> int:
    """The least width for entries of up to `block_k` keys: a power of two, 16 at least."""
    return max(16, 1 << (block_k - 1).bit_length())


def unsupported(plan: BlockPlan, width: int, step: int = 0) -> list[str]:
    """Every reason why `key_slots` cannot lay out this plan; empty if it can."""
    if plan.block_k > width:
        return [f"plan blocks may have at most {width} keys, got {plan.block_k}"]
    positions = _find(plan, width, step or width).positions
    if positions > max(MOST_GROWTH * plan.length_k, ALWAYS_FITS):
        return [
            f"its {positions // width} different runs of keys would take {positions} positions for "
            f"{plan.length_k} keys"
        ]
    return []


def key_slots(plan: BlockPlan, width: int, step: int = 0) -> KeySlots:
    """The plan with run j of its keys at width * j; as it is where all start at multiples of step (width, if 0).
    The first call for a plan waits for the device, once."""
    assert not unsupported(plan, width, step)
    return _find(plan, width, step or width).slots or KeySlots(plan, None)


def _find(plan: BlockPlan, width: int, step: int) -> _Found:
    source = (plan.full.start, plan.full.count, plan.partial.offset, plan.partial.start, plan.q_start,
              *([] if plan.mask is None else plan.to_tensors()[9:]))  # fmt: skip
    widths: dict[tuple, _Found] = _cache.setdefault(plan.full.offset, {})  # pyright: ignore
    found = widths.get((width, step))
    if (
        found is None
        or len(found.source) != len(source)
        or any(a is not b for a, b in zip(found.source, source, strict=True))
    ):
        # Kept for calls to come: made in inference mode, it could never meet autograd.
        with torch.inference_mode(False), torch.no_grad():
            widths[width, step] = found = _lay_out(plan, width, step, source)
    return found


def _lay_out(plan: BlockPlan, width: int, step: int, source: tuple[Tensor, ...]) -> _Found:
    full, partial = plan.full, plan.partial
    start = torch.cat([full.start, partial.start]).long()
    count = torch.cat([full.count, partial.count]).long()
    runs, slot = torch.unique((start << 32) | count, return_inverse=True)
    moves, positions = bool((start % step).any()), max(1, runs.numel()) * width
    if not moves:
        return _Found(source, plan.length_k, None)
    if positions > max(MOST_GROWTH * plan.length_k, ALWAYS_FITS):
        return _Found(source, positions, None)
    column = torch.arange(width, device=plan.device)
    order = torch.where(
        column < (runs & 0xFFFFFFFF)[:, None], (runs >> 32)[:, None] + column, -1
    ).flatten()  # [slots * width]
    mask = plan.mask
    if isinstance(mask, IntervalMask):
        # The first key stands in for padding: any coordinate of a key keeps the range of the others.
        mask = replace(mask, coord=mask.coord[:, order.clamp(min=0)].contiguous())
    moved_start = (slot * width).int()
    # Tensors by which others cache are new: this is another plan.
    moved = replace(
        plan,
        length_k=positions,
        q_start=plan.q_start.clone(),
        full=Entries(
            offset=full.offset.clone(), start=moved_start[: full.start.numel()].clone(), count=full.count
        ),
        partial=Entries(
            offset=partial.offset.clone(), start=moved_start[full.start.numel() :].clone(),
            count=partial.count,
        ),
        mask=mask,
    )  # fmt: skip
    return _Found(source, positions, KeySlots(moved, order.int()))

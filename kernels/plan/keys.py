"""Plans with keys that no query may see: the padding of a batch, by batch entry."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from .block_plan import BlockPlan, Entries, IntervalMask

# Of every batch entry, the runs (start, end) of keys that are visible, in ascending order.
KeyRanges = tuple[tuple[tuple[int, int], ...], ...]


def key_ranges(mask: Tensor) -> KeyRanges | None:
    """The runs of True in a padding mask [B, S_k]; None if it hides nothing. Waits for the device."""
    mask = mask.detach().to("cpu", torch.bool)
    if bool(mask.all()):
        return None
    edges = torch.nn.functional.pad(mask.int(), (1, 1)).diff()
    return tuple(
        tuple(
            zip(
                (row == 1).nonzero()[:, 0].tolist(),
                (row == -1).nonzero()[:, 0].tolist(),
                strict=True,
            )
        )
        for row in edges
    )


def hide_keys(plan: BlockPlan, ranges: KeyRanges) -> BlockPlan:
    """`plan` with only the keys of `ranges`, in the plan's order, cached: one variant for each batch entry (and
    each variant that heads have), or one for all if there is one. Every query, those of padding too, keeps what
    it saw of the visible keys.

    Raises ValueError where a hidden key lies in a partial block of the plan, or batch entries have other plans.
    """
    # Cached: made in inference mode, it could never meet autograd later.
    with torch.inference_mode(False):
        return _hide_keys(plan, ranges)


@lru_cache(maxsize=64)
def _hide_keys(plan: BlockPlan, ranges: KeyRanges) -> BlockPlan:
    own = plan.variant if plan.variant is not None else torch.zeros(1, 1, dtype=torch.int32)
    if own.shape[0] > 1:
        raise ValueError("hide_keys takes a plan that all batch entries share.")
    wrong = [r for row in ranges for r in row if not 0 <= r[0] < r[1] <= plan.length_k]
    if wrong or not ranges:
        raise ValueError(
            f"Key ranges {wrong or ranges} do not lie in a plan of {plan.length_k} keys."
        )
    count = len(ranges)
    full = _stacked([_clipped(plan.full, row) for row in ranges])
    partial = _stacked([plan.partial] * count)
    _check_partial(plan.partial, ranges)
    hidden = _pairs(plan, _stacked([plan.full] * count)) - _pairs(plan, full)
    mask = plan.mask
    if isinstance(mask, IntervalMask):
        mask = replace(mask, table=mask.table.repeat(count))
    elif mask is not None:
        mask = replace(mask, bits=mask.bits.repeat(count, 1, 1))
    first = torch.arange(count, dtype=torch.int32, device=plan.device) * plan.variants
    variants = count * plan.variants
    return replace(
        plan,
        q_start=plan.q_start.clone(),  # others cache by it: this is another plan
        full=full,
        partial=partial,
        mask=mask,
        variant=first[:, None] + own.to(plan.device) if variants > 1 else None,
        variants=variants,
        visible=plan.visible * count - hidden,
    )


def _clipped(entries: Entries, row: tuple[tuple[int, int], ...]) -> Entries:
    """The parts of all runs that lie in the ranges of one batch entry."""
    first, last = entries.start.long(), (entries.start + entries.count).long()
    bounds = torch.tensor(row, device=first.device).reshape(-1, 2)
    start = torch.maximum(first[:, None], bounds[:, 0])  # [runs, ranges]
    end = torch.minimum(last[:, None], bounds[:, 1])
    kept = end > start
    owner = entries.rows[:, None].expand_as(kept)[kept]
    offset = torch.zeros_like(entries.offset)
    offset[1:] = torch.bincount(owner, minlength=offset.numel() - 1).cumsum(0)
    return Entries(offset=offset, start=start[kept].int(), count=(end - start)[kept].int())


def _stacked(lists: list[Entries]) -> Entries:
    """Lists of several variants, one after the other."""
    starts = [0]
    for entries in lists[:-1]:
        starts.append(starts[-1] + entries.start.numel())
    offsets = [e.offset[:-1] + first for e, first in zip(lists, starts, strict=True)]
    total = lists[-1].offset[-1:] + starts[-1]
    return Entries(
        offset=torch.cat([*offsets, total]).int(),
        start=torch.cat([e.start for e in lists]),
        count=torch.cat([e.count for e in lists]),
    )


def _check_partial(partial: Entries, ranges: KeyRanges) -> None:
    """Where a mask decides, hiding more would change how many pairs are visible in a way nobody counts."""
    for row in ranges:
        clipped = _clipped(partial, row)
        if int(clipped.count.sum()) != int(partial.count.sum()):
            raise ValueError("A hidden key lies in a block that the plan's own mask cuts.")


def _pairs(plan: BlockPlan, entries: Entries) -> int:
    return int((plan.q_count[entries.rows % plan.tiles].long() * entries.count.long()).sum())

"""Which program of the Hopper kernel computes which tiles, and in which order.

Dealt on the host once per plan, hence static: deterministic, and safe in CUDA graphs.
"""

from __future__ import annotations

import heapq

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..plan.block_plan import BlockPlan

# A tile's first wait and its epilogue take about as long as this many key blocks.
_TILE_OVERHEAD = 2

# By the tensor that identifies a plan: a compiled call makes new plans of the same tensors.
_dealt: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def deal(plan: BlockPlan, batch: int, heads: int, programs: int) -> tuple[Tensor, Tensor]:
    """Deal (batch, head, tile) to programs: int32 offsets [programs + 1] and items [n].

    Long tiles first, the rest in order (neighbours share keys in the L2 cache), each to the program
    with the least work so far. An item is ((b * heads + h) * variants + variant) * tiles + tile.
    The first call for a plan waits for the device.
    """
    dealt = _dealt.setdefault(plan.q_start, {})
    key = (batch, heads, programs)
    if key not in dealt:
        items, cost = _items(plan, batch, heads)
        if bool((cost == cost[0]).all()):
            program = torch.arange(len(items)) % programs
        else:
            heavy = torch.where(cost > 2 * cost.double().mean(), cost, 0)
            order = heavy.argsort(descending=True, stable=True)
            items, cost = items[order], cost[order]
            program = _least_loaded(cost.tolist(), programs)
        offset = torch.zeros(programs + 1, dtype=torch.int64)
        offset[1:] = torch.bincount(program, minlength=programs).cumsum(0)
        items = items[program.argsort(stable=True)]
        dealt[key] = offset.int().to(plan.device), items.int().to(plan.device)
    return dealt[key]


def _items(plan: BlockPlan, batch: int, heads: int) -> tuple[Tensor, Tensor]:
    """All items in order and their costs in key blocks, int64 on the CPU."""
    entries = (plan.full.offset.diff() + plan.partial.offset.diff()).cpu().long()
    cost = (entries + _TILE_OVERHEAD).view(plan.variants, plan.tiles)
    variant = torch.zeros(1, 1, dtype=torch.int64)
    if plan.variant is not None:
        variant = plan.variant.cpu().long()
    variant = variant.expand(batch, heads).flatten()  # [B H]
    bh = torch.arange(batch * heads)
    items = (bh * plan.variants + variant)[:, None] * plan.tiles + torch.arange(plan.tiles)
    return items.flatten(), cost[variant].flatten()


def _least_loaded(cost: list[int], programs: int) -> Tensor:
    """The program of every item: that with the least work so far."""
    heap = [(0, p) for p in range(programs)]
    program = []
    for c in cost:
        load, p = heap[0]
        program.append(p)
        heapq.heapreplace(heap, (load + c, p))
    return torch.tensor(program)

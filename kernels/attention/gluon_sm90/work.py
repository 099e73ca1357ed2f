"""Which program of the Hopper kernel computes which tiles, and in which order.

Dealt on the host once per plan, hence static: deterministic, and safe in CUDA graphs.
"""

from __future__ import annotations

import heapq
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ...plan.block_plan import BlockPlan
from .mask import CONSUMER_ROWS, consumers_of

# A tile's first wait and its epilogue take about as long as this many key blocks.
_TILE_OVERHEAD = 2

# Most parts of a tile, to fill the last round of a launch and to spread long tiles. At 4,608 tokens 576 tiles
# take five rounds of 132: 0.415 ms in one part, 0.400 in several (H200, bf16).
MOST_PARTS = 8
# Tiles in parts cost another launch, about as long as this many key blocks.
_COMBINE = 3
_LEAST_BLOCKS = 4  # of a part
# What parts must save: a share of the time of all tiles, and key blocks.
LEAST_GAIN, LEAST_SAVED = 0.005, 8
LEAST_LOAD = 64  # key blocks of a program, below which the launch itself takes the time
_MOST_SLOTS = 1 << 15


class Work(NamedTuple):
    """Work of all programs, int32. Program p has items offset[p] : offset[p + 1].

    item: ((b * heads + h) * variants + variant) * tiles + tile. part: None, or slot << 16 | part << 8 |
    parts for every item. split: None, or item, first slot and number of parts of every tile that is
    computed in parts, [n, 3]. slots: parts in all.
    """

    offset: Tensor
    item: Tensor
    part: Tensor | None
    split: Tensor | None
    slots: int


# By the tensor that identifies a plan: a compiled call makes new plans of the same tensors.
_dealt: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def deal(plan: BlockPlan, batch: int, heads: int, programs: int) -> Work:
    """Deal (batch, head, tile) to programs.

    Long tiles first, the rest in order (neighbours share keys in the L2 cache), each to the program
    with the least work so far. Where all take as long, the programs go in rounds. Tiles that would fill the
    last round badly, or are long beside the work of a program, are computed in parts. The first call for a
    plan waits for the device.
    """
    dealt = _dealt.setdefault(plan.q_start, {})
    key = (batch, heads, programs)
    if key not in dealt:
        items, cost, whole = _items(plan, batch, heads)
        parts = _parts(cost, whole, programs).long()
        program, _ = _schedule(cost, parts, programs)
        order = program.argsort(stable=True)
        offset = torch.zeros(programs + 1, dtype=torch.int64)
        offset[1:] = torch.bincount(program, minlength=programs).cumsum(0)
        items_dealt = items.repeat_interleave(parts)[order]

        def here(x: Tensor) -> Tensor:
            return x.int().to(plan.device)

        slots = int(parts[parts > 1].sum())
        code = split = None
        if slots:
            first = torch.where(parts > 1, parts, 0).cumsum(0) - parts
            part = torch.arange(len(program)) - (parts.cumsum(0) - parts).repeat_interleave(parts)
            slot = first.repeat_interleave(parts) + part
            of = parts.repeat_interleave(parts)
            code = here(torch.where(of > 1, slot << 16 | part << 8 | of, 1)[order])
            split = here(torch.stack([items, first, parts], 1)[parts > 1])
        dealt[key] = Work(here(offset), here(items_dealt), code, split, slots)
    return dealt[key]


def _parts(cost: Tensor, whole: Tensor, programs: int) -> Tensor:
    """In how many parts to compute every item; only a whole item, one without masked entries, can be cut."""
    ones = torch.ones_like(cost, dtype=torch.int64)
    load = float(cost.sum()) / programs
    if MOST_PARTS < 2 or load < LEAST_LOAD:
        return ones
    tried = []
    rest = len(cost) % programs
    if bool((cost == cost[0]).all()) and rest:
        last = torch.arange(len(cost)) >= len(cost) - rest
        tried += [torch.where(last, n, 1) for n in range(2, MOST_PARTS + 1)]
    tried += [(cost * share / load).long().clamp(1, MOST_PARTS) for share in (2, 4)]
    most = ((cost - _TILE_OVERHEAD) // _LEAST_BLOCKS).clamp(min=1).long()
    whole_time = _schedule(cost, ones, programs)[1]
    best, least = ones, min((1 - LEAST_GAIN) * whole_time, whole_time - LEAST_SAVED)
    for parts in tried:
        parts = torch.where(whole, parts.minimum(most), 1)
        slots = int(parts[parts > 1].sum())
        time = _schedule(cost, parts, programs)[1] + _COMBINE
        if 0 < slots < _MOST_SLOTS and time < least:
            best, least = parts, time
    return best


def _schedule(cost: Tensor, parts: Tensor, programs: int) -> tuple[Tensor, float]:
    """The program of every part of every item, and the time of the last one to end, in key blocks."""
    cost = ((cost - _TILE_OVERHEAD) / parts + _TILE_OVERHEAD).repeat_interleave(parts)
    if bool((cost == cost[0]).all()):
        program = torch.arange(len(cost)) % programs
        return program, float(-(-len(cost) // programs) * cost[0])
    # Neighbours stay together, but long items begin and short ones fill what is left.
    heavy = torch.where(cost > 2 * cost.mean(), cost, 0) - (cost < 0.85 * cost.mean()).double()
    order = heavy.argsort(descending=True, stable=True)
    program = torch.empty_like(order)
    # To the program with the least work so far.
    heap = [(0.0, p) for p in range(programs)]
    chosen = []
    for c in cost[order].tolist():
        load, p = heap[0]
        chosen.append(p)
        heapq.heapreplace(heap, (load + c, p))
    program[order] = torch.tensor(chosen)
    return program, max(load for load, _ in heap)


def _items(plan: BlockPlan, batch: int, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """All items in order, their costs in key blocks, and whether they have no masked entries; on the CPU.

    What a consumer passes by costs it nothing: counted so, the longest program of FLUX 4K with windows of 80 and strides
    of 16 has 3% less to do. In a short tile consumers without queries pass all by; the others wait for each other less.
    """
    cost = plan.full.offset.diff().cpu().double()
    whole = (plan.partial.offset.diff() == 0).cpu().view(plan.variants, plan.tiles)
    if plan.partial.start.numel():
        cost.index_add_(0, plan.partial.rows.cpu(), consumers_of(plan).cpu().double())
    consumers, most = -(-plan.q_count.cpu() // CONSUMER_ROWS), -(-plan.block_q // CONSUMER_ROWS)
    share = (consumers + 1) / (most + 1)
    cost = cost.view(plan.variants, plan.tiles) * share + _TILE_OVERHEAD
    variant = torch.zeros(1, 1, dtype=torch.int64)
    if plan.variant is not None:
        variant = plan.variant.cpu().long()
    variant = variant.expand(batch, heads).flatten()  # [B H]
    bh = torch.arange(batch * heads)
    items = (bh * plan.variants + variant)[:, None] * plan.tiles + torch.arange(plan.tiles)
    return items.flatten(), cost[variant].flatten(), whole[variant].flatten()

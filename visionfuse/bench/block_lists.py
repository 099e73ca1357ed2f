"""Plans that are lists of whole key blocks, by a rule on block numbers: dense, a band, or any other."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..kernels.plan.block_plan import BlockPlan, Entries

BLOCK_Q, BLOCK_K = 192, 128
# Key blocks that query tile `tile` of `tiles` visits, of `blocks`.
Keys = Callable[[int, int, int], Iterable[int]]


def all_keys(tile: int, tiles: int, blocks: int) -> range:
    return range(blocks)


def band_of(share: float) -> Keys:
    """That share of the keys, around the queries."""

    def keys(tile: int, tiles: int, blocks: int) -> range:
        width = min(blocks, max(1, round(share * blocks)))
        first = min(max(tile * blocks // tiles - width // 2, 0), blocks - width)
        return range(first, first + width)

    return keys


band = band_of(0.09)


def block_list(length_q: int, length_k: int, block_q: int, keys: Keys) -> BlockPlan:
    """A plan of full entries at multiples of BLOCK_K, the last one as short as the keys end."""
    tiles, blocks = -(-length_q // block_q), -(-length_k // BLOCK_K)
    offset, start = [0], []
    for tile in range(tiles):
        start += [BLOCK_K * j for j in keys(tile, tiles, blocks)]
        offset.append(len(start))
    q_start = torch.arange(tiles, dtype=torch.int32) * block_q
    starts = torch.tensor(start, dtype=torch.int32)
    none = torch.zeros(0, dtype=torch.int32)
    plan = BlockPlan(
        length_q=length_q, length_k=length_k, block_q=block_q, block_k=BLOCK_K,
        q_start=q_start, q_count=(length_q - q_start).clamp(max=block_q),
        full=Entries(offset=torch.tensor(offset, dtype=torch.int32), start=starts,
                     count=(length_k - starts).clamp(max=BLOCK_K)),
        partial=Entries(offset=torch.zeros(tiles + 1, dtype=torch.int32), start=none, count=none),
    )  # fmt: skip
    return plan


def list_visible(length: int, block_q: int, keys: Keys) -> Callable[[Tensor], Tensor]:
    """From the rule and not from a plan: query positions [n] -> the keys they see, bool [n, length]."""
    tiles, blocks = -(-length // block_q), -(-length // BLOCK_K)

    def visible(rows: Tensor) -> Tensor:
        seen = torch.zeros(rows.numel(), blocks, dtype=torch.bool)
        for i, query in enumerate(rows.tolist()):
            seen[i, list(keys(query // block_q, tiles, blocks))] = True
        return seen.repeat_interleave(BLOCK_K, 1)[:, :length].to(rows.device)

    return visible

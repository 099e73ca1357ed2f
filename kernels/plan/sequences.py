"""Plans of sequences: dense, causal, packed (varlen) and padded attention, where a query sees one run of keys.

Whatever makes a query see the keys lo .. hi - 1 is one plan: on the sorted cuts of the keys a tile visits the cuts
from the first that ends after its least lo to the last that begins before its largest hi, and those between
its largest lo and its least hi are full. So lists come from four binary searches a tile, and no table of
tiles by keys is ever formed. Plans are built on the host and not cached here: callers know when two are the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .block_plan import BlockPlan, Entries, IntervalMask
from .runs import cut


def causal(
    length_q: int, length_k: int, *, block_q: int = 128, block_k: int = 128,
    device: torch.device | str = "cpu",
) -> BlockPlan:  # fmt: skip
    """Right-aligned: the last query sees every key, the one before it all but the last, and so on.

    That is what a query of a KV cache may see; with more queries than keys the first ones see nothing. (PyTorch's
    `is_causal` aligns the first query with the first key, FlashAttention since 2.1 and this the last ones.)
    """
    return packed(
        (0, length_q), (0, length_k), causal=True, block_q=block_q, block_k=block_k, device=device
    )


def packed(
    cu_seqlens_q: Sequence[int] | Tensor,
    cu_seqlens_k: Sequence[int] | Tensor,
    *,
    causal: bool = False,
    block_q: int = 128,
    block_k: int = 128,
    device: torch.device | str = "cpu",
) -> BlockPlan:
    """Sequences one after the other in one line, as FlashAttention's varlen functions take them.

    cu_seqlens_q, cu_seqlens_k: n + 1 increasing numbers from 0: sequence i has the queries cu_seqlens_q[i] ..
    cu_seqlens_q[i + 1] - 1 and sees its own keys alone; causal: right-aligned in each. Sequences may be empty.
    Raises ValueError where these are not such numbers. Reading a tensor waits for its device.
    """
    q_ends, k_ends = _ends("cu_seqlens_q", cu_seqlens_q), _ends("cu_seqlens_k", cu_seqlens_k)
    if q_ends.numel() != k_ends.numel():
        raise ValueError(
            f"cu_seqlens_q and cu_seqlens_k must be of the same sequences, got {q_ends.numel() - 1} and "
            f"{k_ends.numel() - 1}."
        )
    sequence = torch.repeat_interleave(torch.arange(q_ends.numel() - 1), q_ends.diff())  # [S_q]
    lo, hi = k_ends[:-1][sequence], k_ends[1:][sequence]
    if causal:
        from_end = q_ends[1:][sequence] - torch.arange(sequence.numel())  # 1 for the last query
        hi = torch.maximum(hi - from_end + 1, lo)
    keys = torch.repeat_interleave(torch.arange(k_ends.numel() - 1), k_ends.diff())
    return _plan(lo[None], hi[None], sequence, keys, block_q, block_k).to(device)


def padded(
    lengths: Sequence[int] | Tensor,
    length_q: int,
    length_k: int,
    *,
    causal: bool = False,
    block_q: int = 128,
    block_k: int = 128,
    device: torch.device | str = "cpu",
) -> BlockPlan:
    """A batch of which entry b has lengths[b] keys, and padding behind them up to length_k.

    causal: right-aligned with length_k, as in `causal`. Every query, those of padding too, sees what keys there
    are; with [length_k] this is dense attention. Raises ValueError for lengths outside 0 .. length_k.
    """
    ends = torch.as_tensor(lengths).long().cpu()
    if ends.dim() != 1 or not ends.numel() or bool(((ends < 0) | (ends > length_k)).any()):
        raise ValueError(f"lengths must be in 0 .. {length_k}, one a batch entry, got {lengths}.")
    hi = ends[:, None].expand(-1, length_q)
    if causal:
        aligned = torch.arange(length_q) + length_k - length_q + 1
        hi = torch.minimum(hi, aligned.clamp(min=0))
    one_q, one_k = (torch.zeros(n, dtype=torch.int64) for n in (length_q, length_k))
    return _plan(torch.zeros_like(hi), hi, one_q, one_k, block_q, block_k).to(device)


def _ends(name: str, numbers: Sequence[int] | Tensor) -> Tensor:
    ends = torch.as_tensor(numbers).long().cpu()
    if ends.dim() != 1 or ends.numel() < 2 or ends[0] != 0 or bool((ends.diff() < 0).any()):
        raise ValueError(
            f"{name} must be n + 1 increasing numbers from 0 for n sequences, got {ends.tolist()}."
        )
    return ends


def _plan(
    lo: Tensor, hi: Tensor, q_sequence: Tensor, k_sequence: Tensor, block_q: int, block_k: int
) -> BlockPlan:
    """Query q of variant v sees the keys lo[v, q] .. hi[v, q] - 1. lo, hi: int64 [variants, S_q]; neither tiles
    nor entries cross from one sequence into the next, int64 [S_q] and [S_k] in ascending order."""
    variants, length_q = lo.shape
    length_k = k_sequence.numel()
    if not length_q or not length_k:
        raise ValueError(f"A plan needs queries and keys, got {length_q} and {length_k}.")
    tiles, runs = cut(q_sequence, q_sequence, block_q), cut(k_sequence, k_sequence, block_k)
    n, owner = tiles.start.numel(), tiles.of_position
    # Rows that see nothing may widen nothing, and keep their tile from having full entries.
    blind = lo >= hi
    least_lo = _extreme(lo.masked_fill(blind, length_k), owner, n, "amin").flatten()  # [V * tiles]
    most_hi = _extreme(hi.masked_fill(blind, 0), owner, n, "amax").flatten()
    most_lo = _extreme(lo.masked_fill(blind, length_k), owner, n, "amax").flatten()
    least_hi = _extreme(hi.masked_fill(blind, 0), owner, n, "amin").flatten()

    run_start, run_end = runs.start, runs.start + runs.count
    first = torch.searchsorted(run_end, least_lo, right=True)
    last = torch.maximum(torch.searchsorted(run_start, most_hi), first)
    whole_first = torch.searchsorted(run_start, most_lo).clamp(first, last)
    # Where all rows end alike the last entry ends there too, without a mask.
    alike = least_hi == most_hi
    whole_last = torch.where(alike, last, torch.searchsorted(run_end, least_hi, right=True))
    whole_last = torch.minimum(torch.maximum(whole_last, whole_first), last)
    none = whole_first == whole_last
    whole_first, whole_last = (
        torch.where(none, last, whole_first),
        torch.where(none, last, whole_last),
    )

    row, run = _listed(first, last)
    whole = (run >= whole_first[row]) & (run < whole_last[row])
    start, end = run_start[run], run_end[run]
    end = torch.where(whole, torch.minimum(end, most_hi[row]), end)
    full, partial = (
        _entries(row[kind], start[kind], (end - start)[kind], variants * n)
        for kind in (whole, ~whole)
    )
    mask = None
    if partial.start.numel():
        mask = IntervalMask(
            lo=lo[:, None].int(), hi=hi[:, None].int(),
            coord=torch.arange(length_k, dtype=torch.int32)[None],
            table=(partial.rows // n).int(),
        )  # fmt: skip
    variant = torch.arange(variants, dtype=torch.int32)[:, None] if variants > 1 else None
    return BlockPlan(
        length_q=length_q, length_k=length_k, block_q=block_q, block_k=block_k,
        q_start=tiles.start.int(), q_count=tiles.count.int(), full=full, partial=partial, mask=mask,
        variant=variant, variants=variants, visible=int((hi - lo).clamp(min=0).sum()),
    )  # fmt: skip


def _extreme(x: Tensor, owner: Tensor, tiles: int, reduce: str) -> Tensor:
    """Over the queries of every tile: [variants, S_q] -> [variants, tiles]."""
    out = x.new_empty(x.shape[0], tiles)
    return out.scatter_reduce(1, owner.expand_as(x), x, reduce, include_self=False)


def _listed(first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """All (row, run) with first[row] <= run < last[row]."""
    length = last - first
    row = torch.repeat_interleave(torch.arange(first.numel()), length)
    return row, torch.arange(row.numel()) - (length.cumsum(0) - length - first)[row]


def _entries(row: Tensor, start: Tensor, count: Tensor, rows: int) -> Entries:
    offset = torch.zeros(rows + 1, dtype=torch.int32)
    offset[1:] = torch.bincount(row, minlength=rows).cumsum(0)
    return Entries(offset=offset, start=start.int(), count=count.int())

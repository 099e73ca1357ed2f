"""Several GPUs: plans and precisions under diffusers' context parallelism.

    pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    pipe.enable_visionfuse("gna", density=0.3)

Under Ulysses (arXiv 2309.14509) every GPU holds a part of the tokens of all heads, and for attention all tokens of
a part of the heads. Plans are of the whole sequence and shared by heads, so that they hold there as they are, once the
tokens stand in their order again: diffusers splits text and image each by itself, and the exchange would leave
[text 0, image 0, text 1, image 1].

Under ring attention every GPU keeps its queries and, as diffusers does it, gets the keys and values of all. What is
dense runs there in one call, in any precision, in whatever order the keys come.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate, groupby, pairwise
from typing import Any

import torch
from torch import Tensor

from .context import ACTIVE
from .kernels.plan import BlockPlan, TokenLayout, sequences

Attention = Callable[[Tensor, Tensor, Tensor, BlockPlan], Tensor]


def enter(processors: list[Any], layout: TokenLayout, dense: bool) -> str:
    """Prepare for a forward with these processors. dense: every query sees every key. Returns why its attention
    cannot follow a plan; empty if it can."""
    ACTIVE.streams, ACTIVE.ring = (), 1
    parallel = next((p for p in map(context_parallel, processors) if p is not None), None)
    if parallel is None:
        return ""
    ring, ulysses = parallel.ring_degree, parallel.ulysses_degree
    if ring > 1 and ulysses > 1:
        return "ring attention and Ulysses at once; use ulysses_degree alone"
    if ring > 1 and not dense:
        return "ring attention keeps queries apart, and a plan is of all; use ulysses_degree, or a dense recipe"
    if parallel.ulysses_anything:
        return "ulysses_anything makes parts of several lengths; not supported with a plan"
    streams = _streams(layout)
    if any(length % (ring * ulysses) for length in streams):
        lengths = " and ".join(map(str, streams))
        return f"{lengths} tokens cannot be split into {ring * ulysses} equal parts"
    ACTIVE.streams, ACTIVE.ring = streams, ring
    return ""


def context_parallel(processor: Any) -> Any:
    """diffusers' ContextParallelConfig of a processor, or None."""
    config = getattr(processor, "_parallel_config", None)
    return getattr(config, "context_parallel_config", None)


def lengths(q: Tensor, k: Tensor, config: Any) -> tuple[int, int]:
    """Of a plan for q and k (B, S / degree, H, D): its queries and its keys. config: diffusers' ParallelConfig."""
    if config is None:
        return q.shape[1], k.shape[1]
    parallel = config.context_parallel_config
    ulysses = parallel.ulysses_degree
    return ulysses * q.shape[1], ulysses * parallel.ring_degree * k.shape[1]


def own_queries(plans: list[BlockPlan]) -> list[BlockPlan]:
    """Under ring attention, where plans are dense, the same for a GPU's part of the queries."""
    if ACTIVE.ring == 1:
        return plans
    return [
        _dense(p.length_q // ACTIVE.ring, p.length_k, p.block_q, p.block_k, p.device) for p in plans
    ]


@lru_cache(maxsize=16)
def _dense(length_q: int, length_k: int, block_q: int, block_k: int, device: Any) -> BlockPlan:
    with torch.inference_mode(False):
        blocks = {"block_q": block_q, "block_k": block_k, "device": device}
        return sequences.padded([length_k], length_q, length_k, **blocks)


def _streams(layout: TokenLayout) -> tuple[int, ...]:
    """The lengths of what diffusers splits each by itself: text, and everything else."""
    runs = groupby(layout.segments, key=lambda segment: segment.kind == "text")
    return tuple(sum(segment.length for segment in run) for _, run in runs)


def attend(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, config: Any, own: Attention) -> Tensor:
    """`own(q, k, v, plan)` with all tokens of this GPU's heads, or with all keys. q, k, v: (B, S / degree, H, D) -> the
    same."""
    parallel = config.context_parallel_config
    if parallel.ring_degree > 1:
        group, parts = parallel._ring_mesh.get_group(), parallel.ring_degree
        k, v = map(_receive_keys, [_gather(x, parts, group) for x in (k, v)])
        return own(q, k, v, plan)
    group, parts = parallel._ulysses_mesh.get_group(), parallel.ulysses_degree
    ends = accumulate((length // parts for length in ACTIVE.streams), initial=0)
    streams = list(pairwise(ends))  # of one GPU's tokens
    heads = q.shape[2] // parts
    if plan.variant is not None and plan.variant.shape[1] > 1:  # plans by head: those of our heads
        first = torch.distributed.get_rank(group) * heads
        plan = replace(plan, variant=plan.variant.narrow(1, first, heads))
    # Eager, all three are on their way before the first is waited for. Compiled, PyTorch waits for each at once: made to
    # travel while values are projected, they took 1.4 times as long and the products longer (Wan2.1-14B on two H200s).
    sent = [_send(_by_heads(x, parts), group) for x in (q, k, v)]
    q, k, v = (_all_tokens(_receive(x), streams) for x in sent)
    return _all_heads(_receive(_send(_by_tokens(own(q, k, v, plan), parts, streams), group)))


def _by_heads(x: Tensor, parts: int) -> Tensor:
    """(B, S / parts, H, D) -> [receiver, B, S / parts, H / parts, D]"""
    return x.unflatten(2, (parts, -1)).permute(2, 0, 1, 3, 4)


def _all_tokens(got: Tensor, streams: list[tuple[int, int]]) -> Tensor:
    """[sender, B, S / parts, H / parts, D] -> (B, S, H / parts, D), the tokens in the order of the plan."""
    got = got.transpose(0, 1)
    return _joined([got[:, :, a:b].flatten(1, 2) for a, b in streams], 1)


def _by_tokens(x: Tensor, parts: int, streams: list[tuple[int, int]]) -> Tensor:
    """(B, S, H / parts, D) -> [receiver, B, S / parts, H / parts, D]"""
    lengths = [parts * (b - a) for a, b in streams]
    cut = [part.unflatten(1, (parts, -1)) for part in x.split(lengths, 1)]
    return _joined(cut, 2).transpose(0, 1)


def _all_heads(got: Tensor) -> Tensor:
    """[sender, B, S / parts, H / parts, D] -> (B, S / parts, H, D)"""
    return got.permute(1, 2, 0, 3, 4).flatten(2, 3)


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    """A single part is not copied: a video without text among its tokens."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _send(x: Tensor, group: Any) -> tuple[Tensor, torch.Size]:
    """Part i of the first axis goes to process i."""
    from torch.distributed._functional_collectives import all_to_all_single

    return all_to_all_single(x.contiguous().flatten(), None, None, group), x.shape


def _gather(x: Tensor, parts: int, group: Any) -> tuple[Tensor, torch.Size]:
    """Every process gets those of all, one after the other."""
    from torch.distributed._functional_collectives import all_gather_tensor

    return all_gather_tensor(x.contiguous(), 0, group), torch.Size((parts, *x.shape))


def _receive_keys(sent: tuple[Tensor, torch.Size]) -> Tensor:
    """[sender, B, S / parts, H, D] -> (B, S, H, D)"""
    return _receive(sent).transpose(0, 1).flatten(1, 2)


def _receive(sent: tuple[Tensor, torch.Size]) -> Tensor:
    """What the others sent, in the shape of what was."""
    from torch.distributed._functional_collectives import wait_tensor

    return wait_tensor(sent[0]).view(sent[1])

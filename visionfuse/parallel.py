"""Several GPUs: plans and precisions under diffusers' context parallelism.

    pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    pipe.enable_visionfuse("gna", density=0.3)

Under Ulysses (arXiv 2309.14509) every GPU holds a part of the tokens of all heads, and for attention all tokens of
a part of the heads. Plans are of the whole sequence and shared by heads, so that they hold there as they are, once the
tokens stand in their order again: diffusers splits text and image each by itself, and the exchange would leave
[text 0, image 0, text 1, image 1].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate, groupby, pairwise
from typing import Any

import torch
from torch import Tensor

from .context import ACTIVE
from .kernels.plan import BlockPlan, TokenLayout

Attention = Callable[[Tensor, Tensor, Tensor, BlockPlan], Tensor]


def enter(processors: list[Any], layout: TokenLayout) -> str:
    """Prepare for a forward with these processors. Returns why its attention cannot follow a plan; empty if it can."""
    ACTIVE.streams = ()
    parallel = next((p for p in map(context_parallel, processors) if p is not None), None)
    if parallel is None:
        return ""
    if parallel.ring_degree > 1:
        return "ring attention hands parts of the keys around, a plan is of all; use ulysses_degree"
    if parallel.ulysses_anything:
        return "ulysses_anything makes parts of several lengths; not supported with a plan"
    streams = _streams(layout)
    if any(length % parallel.ulysses_degree for length in streams):
        lengths = " and ".join(map(str, streams))
        return f"{lengths} tokens cannot be split into {parallel.ulysses_degree} equal parts"
    ACTIVE.streams = streams
    return ""


def context_parallel(processor: Any) -> Any:
    """diffusers' ContextParallelConfig of a processor, or None."""
    config = getattr(processor, "_parallel_config", None)
    return getattr(config, "context_parallel_config", None)


def degree(config: Any) -> int:
    """How many GPUs share the sequence of an attention call with diffusers' `parallel_config`."""
    return 1 if config is None else config.context_parallel_config.ulysses_degree


def _streams(layout: TokenLayout) -> tuple[int, ...]:
    """The lengths of what diffusers splits each by itself: text, and everything else."""
    runs = groupby(layout.segments, key=lambda segment: segment.kind == "text")
    return tuple(sum(segment.length for segment in run) for _, run in runs)


def attend(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, config: Any, own: Attention) -> Tensor:
    """`own(q, k, v, plan)` with all tokens of this GPU's heads. q, k, v: (B, S / degree, H, D) -> the same."""
    parallel = config.context_parallel_config
    group, parts = parallel._ulysses_mesh.get_group(), parallel.ulysses_degree
    ends = accumulate((length // parts for length in ACTIVE.streams), initial=0)
    streams = list(pairwise(ends))  # of one GPU's tokens
    heads = q.shape[2] // parts
    if plan.variant is not None and plan.variant.shape[1] > 1:  # plans by head: those of our heads
        first = torch.distributed.get_rank(group) * heads
        plan = replace(plan, variant=plan.variant.narrow(1, first, heads))
    # All three are on their way before the first is waited for.
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


def _receive(sent: tuple[Tensor, torch.Size]) -> Tensor:
    """What the others sent, in the shape of what was."""
    from torch.distributed._functional_collectives import wait_tensor

    return wait_tensor(sent[0]).view(sent[1])

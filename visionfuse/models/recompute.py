"""Less memory in training: what is cheap to compute again in the backward is not kept for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import cast

import torch
from timm.models.nextvit import ConvNormAct
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint, noop_context_fn


def recomputed(
    layer: Callable[[Tensor], Tensor], x: Tensor, owner: nn.Module, *, random: bool = True
) -> Tensor:
    """layer(x), of which autograd keeps x alone.

    The backward computes the rest again, up to the last tensor that it lacks: not the convolution or matrix
    product at the end. owner: has all modules of the layer; its batch normalisations count these numbers once.
    random: whether the layer draws any.
    """
    norms = [m for m in owner.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    return cast(Tensor, checkpoint(
        layer, x, use_reentrant=False, preserve_rng_state=random,
        context_fn=(lambda: (nullcontext(), _uncounted(norms))) if norms else noop_context_fn,
    ))  # fmt: skip


@contextmanager
def _uncounted(norms: list[_BatchNorm]) -> Iterator[None]:
    """Statistics of the batch, but no step of the running ones; a copy counts the batch."""
    kept = [(norm, norm.momentum, cast(Tensor, norm.num_batches_tracked)) for norm in norms]
    for norm, _, batches in kept:
        norm.momentum, norm.num_batches_tracked = 0.0, batches.clone()
    try:
        yield
    finally:
        for norm, momentum, batches in kept:
            norm.momentum, norm.num_batches_tracked = momentum, batches


class ConvSequence(nn.Sequential):
    """nn.Sequential of convolutions and pointwise layers, of which training keeps the convolutions' results.

    recompute: what stands between two convolutions (normalisation, activation, gates) is computed again in
    the backward. Of `BN, act, conv` then one tensor is kept instead of three. torch.compile decides by itself.
    """

    def __init__(self, *layers: nn.Module, recompute: bool = True) -> None:
        super().__init__(*layers)
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        if self.recompute and not torch.jit.is_scripting():
            return self._by_segments(x)
        for layer in self:
            x = layer(x)
        return x

    def _by_segments(self, x: Tensor) -> Tensor:
        traced = torch.compiler.is_compiling() or isinstance(x, torch.fx.Proxy)
        if traced or not torch.is_grad_enabled():
            return super().forward(x)
        parts = [
            part
            for layer in self
            for part in (layer.children() if isinstance(layer, ConvNormAct) else (layer,))
        ]
        segment = nn.Sequential()
        for part in parts:
            segment.append(part)
            if isinstance(part, nn.Conv2d):
                alone = len(segment) == 1
                x = segment(x) if alone else recomputed(segment, x, segment, random=False)
                segment = nn.Sequential()
        return segment(x)

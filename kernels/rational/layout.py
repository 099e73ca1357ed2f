"""How an activation lies in memory: rows, groups of channels, and the run of elements of a group in a row.

Every dense tensor is [rows, groups, run], whatever its channel dimension: with channels last a row is a
token and a run the channels of a group; in NCHW a row is an image and a run all pixels of these channels.
The kernels see nothing else. Inside, a run is counted in vectors of `width` elements, 16 bytes where the
length of a run allows it: a thread then holds one set of coefficients for a whole vector.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

VECTOR_BYTES = 16


class Runs(NamedTuple):
    """A tensor as [rows, groups, run * width] elements: `run` counts vectors of `width`."""

    rows: int
    groups: int
    run: int
    width: int

    @property
    def columns(self) -> int:
        """Vectors of a row."""
        return self.groups * self.run


def dense(x: Tensor, like: Tensor | None = None) -> Tensor:
    """x without gaps, and in the memory order of `like`; x itself if it is so already."""
    if like is None:
        return x if _dense_order(x) is not None else torch.empty_like(x).copy_(x)
    if x.stride() == like.stride():
        return x
    return torch.empty_like(like, dtype=x.dtype).copy_(x)


def runs(x: Tensor, channel_dim: int, groups: int, *, itemsize: int) -> Runs:
    """The runs of a dense tensor. itemsize: bytes of the widest element that a vector is read as."""
    order = _dense_order(x)
    assert order is not None, x.stride()
    channel = order.index(channel_dim % x.dim())
    sizes = [x.shape[d] for d in order]
    rows, run = prod(sizes[:channel]), prod(sizes[channel:]) // groups
    width = min(VECTOR_BYTES // itemsize, run & -run) if run else 1
    return Runs(rows=rows, groups=groups, run=run // width, width=width)


def _dense_order(x: Tensor) -> list[int] | None:
    """The dimensions from the slowest to the fastest, None if x has gaps or repeats elements."""
    order = sorted(range(x.dim()), key=lambda d: -x.stride(d))
    return order if x.permute(order).is_contiguous() else None

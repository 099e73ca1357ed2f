"""Tokens to the order of a plan, and back. `move` has the kernel, for GPUs."""

from __future__ import annotations

from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .curves import inverse_permutation


class Orders(NamedTuple):
    """Which token of the inputs stands at every position of a plan: int64 [S_q] and [S_k], permutations. None: its own."""

    queries: Tensor | None = None
    keys: Tensor | None = None

    @property
    def moves(self) -> bool:
        return self.queries is not None or self.keys is not None

    @property
    def of_all(self) -> list[Tensor | None]:
        """Of q, k and v."""
        return [self.queries, self.keys, self.keys]

    @property
    def back(self) -> Orders:
        return Orders(inverse(self.queries), inverse(self.keys))


IN_PLACE = Orders()
_HAS_TRITON = find_spec("triton") is not None

# By tensor: the inverse of an order, and what `through` made of it. Plans and their orders live long.
_inverse: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_through: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def take(x: Tensor, order: Tensor | None, dim: int = 1) -> Tensor:
    """x with row order[i] at place i of a dimension; x as it is where order is None."""
    return x if order is None else x.index_select(dim, order)


def inverse(order: Tensor | None) -> Tensor | None:
    """The order that undoes it."""
    if order is not None and order not in _inverse:
        # Kept for calls to come: made in inference mode, it could never meet autograd.
        with torch.inference_mode(False), torch.no_grad():
            _inverse[order] = inverse_permutation(order)
    return None if order is None else _inverse[order]


def moved(tensors: list[Tensor], orders: list[Tensor | None]) -> list[Tensor]:
    """`take` of up to three tensors [B, S, H, D] of one batch and head dim, on a GPU in one launch."""
    if tensors[0].is_cuda and _HAS_TRITON:
        from .move import moved

        return moved(tensors, orders)
    return [take(x, order) for x, order in zip(tensors, orders, strict=True)]


def through(order: Tensor | None, positions: Tensor | None) -> Tensor | None:
    """order[positions], -1 where positions is: [S']. Either may be None, which keeps tokens in place."""
    if order is None or positions is None:
        return order if positions is None else positions
    known: list[tuple[Tensor, Tensor]] = _through.setdefault(order, [])  # pyright: ignore
    for theirs, found in known:
        if theirs is positions:
            return found
    with torch.inference_mode(False), torch.no_grad():
        found = torch.where(positions < 0, -1, order[positions.clamp(min=0).long()]).int()
    known.append((positions, found))
    return found

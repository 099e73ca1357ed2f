"""What is added to the scores before the softmax: softmax(scale * q k + bias)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..plan.block_plan import BlockPlan


@dataclass(frozen=True, slots=True, eq=False)
class RelativeBias:
    """One learned number for every relative position and head, as in Swin, NAT and DiNAT.

    The bias of query q and key k in head h is table[h, k_index[k] - q_index[q]] where that index exists,
    else 0: tokens without a position have an index far away, such as 2**29. Positions on several axes share
    one index, see `from_coordinates`.

    table: (H or 1, n), floating, may require a gradient. q_index: int32 [S_q]; k_index: int32 [S_k], both
        in the plan's order. Differences must fit int32.
    """

    table: Tensor
    q_index: Tensor
    k_index: Tensor

    @classmethod
    def from_coordinates(cls, table: Tensor, q_coord: Tensor, k_coord: Tensor) -> RelativeBias:
        """The bias table[h, r_0, r_1, ...], r_a = k_coord[a, k] - q_coord[a, q] + w_a - 1.

        table: (H or 1, 2 w_0 - 1, 2 w_1 - 1, ...). q_coord: int [axes, S_q]; k_coord: int [axes, S_k];
        of dilated neighborhoods the coordinates divided by the dilation. Pairs that are w_a or more
        apart on an axis must be invisible: they get the number of another pair.
        """
        sizes = table.shape[1:]
        if (
            len(sizes) != len(q_coord)
            or len(sizes) != len(k_coord)
            or any(n % 2 == 0 for n in sizes)
        ):
            raise ValueError(
                f"A table (H, 2 w_0 - 1, ...) has an odd size for every axis, got {tuple(table.shape)} "
                f"for {len(q_coord)} axes of queries and {len(k_coord)} of keys."
            )
        q_index = torch.zeros_like(q_coord[0], dtype=torch.int32)
        k_index = torch.zeros_like(k_coord[0], dtype=torch.int32)
        for size, q, k in zip(sizes, q_coord, k_coord, strict=True):
            q_index = q_index * size + q
            k_index = k_index * size + k + size // 2
        return cls(table.flatten(1), q_index.int(), k_index.int())

    def to_tensors(self) -> list[Tensor]:
        return [self.table, self.q_index, self.k_index]

    def check(self, q: Tensor, k: Tensor, plan: BlockPlan) -> None:
        """Raise ValueError where it does not fit q (B, S_q, H, D), k (B, S_k, H_kv, D)."""
        _check_floating("table", self.table, q)
        if self.table.dim() != 2 or self.table.shape[0] not in (1, q.shape[2]):
            raise ValueError(
                f"The table must be (H or 1, n) for {q.shape[2]} heads, got {tuple(self.table.shape)}."
            )
        for name, index, length in (
            ("q_index", self.q_index, q.shape[1]),
            ("k_index", self.k_index, k.shape[1]),
        ):
            if index.shape != (length,) or index.dtype != torch.int32 or index.device != q.device:
                raise ValueError(
                    f"{name} must be int32 [{length}] on {q.device}, got {index.dtype} "
                    f"{list(index.shape)} on {index.device}."
                )

    def block(self, tile: int, q: slice, k: slice | Tensor) -> Tensor:
        """The bias of some queries and keys, (1, H or 1, queries, keys); tile: that of the queries."""
        index, inside = self._index(q, k)
        return torch.where(inside, self.table[:, index], 0.0)[None]

    def gradient(
        self,
        total: Tensor,
        d_scores: Tensor,
        q: slice | None = None,
        k: slice | Tensor | None = None,
    ) -> Tensor:
        """`total` (H or 1, n) and what the scores (B, H, queries, keys) of some queries and keys add to it."""
        index, inside = self._index(q or slice(None), slice(None) if k is None else k)
        own = torch.where(inside, d_scores.sum(0), 0.0).flatten(1)
        own = own if total.shape[0] > 1 else own.sum(0, keepdim=True)
        return total.index_add_(1, index.flatten(), own.to(total.dtype))

    def _index(self, q: slice, k: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Columns of the table, int32 [queries, keys], and where there is such a column."""
        index = self.k_index[k] - self.q_index[q][:, None]
        inside = (index >= 0) & (index < self.table.shape[1])
        return torch.where(inside, index, 0), inside


@dataclass(frozen=True, slots=True, eq=False)
class BlockBias:
    """One number for every key and block of queries, such as mean(q_tile) k of smoothed queries.

    (SageAttention2, arXiv 2411.10958, section 3.2, adds it to scores of queries without their mean.)

    rows: (B or 1, H or 1, tiles, S_k) floating, `tiles` being those of the plan. It has no gradient.
    """

    rows: Tensor

    def to_tensors(self) -> list[Tensor]:
        return [self.rows]

    def check(self, q: Tensor, k: Tensor, plan: BlockPlan) -> None:
        """Raise ValueError where it does not fit q (B, S_q, H, D), k (B, S_k, H_kv, D) and the plan."""
        _check_floating("rows", self.rows, q)
        expected = (q.shape[0], q.shape[2], plan.tiles, k.shape[1])
        if self.rows.dim() != 4 or any(
            n != m and (n != 1 or axis > 1)
            for axis, (n, m) in enumerate(zip(self.rows.shape, expected, strict=True))
        ):
            raise ValueError(
                f"The rows must be (B or 1, H or 1, tiles, S_k) with (B, H, tiles, S_k) = {expected}, got "
                f"{tuple(self.rows.shape)}."
            )
        if self.rows.requires_grad and torch.is_grad_enabled():
            raise ValueError("A BlockBias has no gradient; detach its rows.")

    def block(self, tile: int, q: slice, k: slice | Tensor) -> Tensor:
        """The bias of a tile's queries and some keys, (B or 1, H or 1, 1, keys)."""
        return self.rows[:, :, tile, k].unsqueeze(2)


Bias = RelativeBias | BlockBias


def from_tensors(tensors: list[Tensor]) -> Bias | None:
    """The bias that `to_tensors` took apart; None of an empty list."""
    kinds = {0: lambda: None, 1: BlockBias, 3: RelativeBias}
    return kinds[len(tensors)](*tensors)


def _check_floating(name: str, x: Tensor, q: Tensor) -> None:
    if not x.is_floating_point() or x.device != q.device:
        raise ValueError(f"{name} must be floating and on {q.device}, got {x.dtype} on {x.device}.")

"""BlockPlan: which key blocks each query block visits, as every attention implementation reads it.

Queries and keys are counted along one line (after any permutation). The line of queries is cut into
tiles (start, count), count <= block_q. Each tile has a compressed list (CSR) of *full* entries,
where every pair is visible, and one of *partial* entries, where a mask decides. An entry is a run
of keys (start, count), count <= block_k. Runs never overlap within one tile's lists, tiles never
overlap, and neither needs padding: ragged ends are simply shorter runs.

The mask of partial entries is one of two kinds:
  IntervalMask  key k is visible to query q iff lo[t, a, q] <= coord[a, k] < hi[t, a, q] on every axis a
  BitMask       one bit a pair, packed along keys
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Entries:
    """Compressed lists of key runs: those of row r are start/count[offset[r] : offset[r + 1]].

    offset: int32 [rows + 1]; start, count: int32 [n].
    """

    offset: Tensor
    start: Tensor
    count: Tensor

    @property
    def rows(self) -> Tensor:
        """The row of every entry: int64 [n]."""
        lengths = self.offset.diff().long()
        return torch.repeat_interleave(
            torch.arange(lengths.numel(), device=lengths.device),
            lengths,
            output_size=self.start.numel(),
        )

    @classmethod
    def joined(cls, parts: list[Entries]) -> Entries:
        """The rows of all parts, one after the other."""
        if len(parts) == 1:
            return parts[0]
        before = torch.tensor([0, *(part.start.numel() for part in parts)]).cumsum(0).tolist()
        offset = [part.offset[:-1] + n for part, n in zip(parts, before, strict=False)]
        return cls(
            offset=torch.cat([*offset, parts[-1].offset[-1:] + before[-2]]),
            start=torch.cat([part.start for part in parts]),
            count=torch.cat([part.count for part in parts]),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class IntervalMask:
    """lo, hi: int32 [tables, axes, S_q]; coord: int32 [axes, S_k]; table: int32 [n_partial].

    `table[e]` names the pair of bound tables that partial entry e uses: keys of different segments
    (a reference image, a low-resolution grid) have different windows.
    """

    lo: Tensor
    hi: Tensor
    coord: Tensor
    table: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BitMask:
    """bits: int32 [n_partial, block_q, ceil(block_k / 32)]; bit j of word w is key 32 * w + j of the entry."""

    bits: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlockPlan:
    """See the module docstring. All tensors live on one device.

    q_start, q_count: int32 [tiles].
    full, partial: lists with variants * tiles rows; row = variant * tiles + tile.
    variant: int32 [B or 1, H or 1] chooses the lists of a batch entry and head; None: one for all.
    visible: number of visible (query, key) pairs, summed over the variants.
    """

    length_q: int
    length_k: int
    block_q: int
    block_k: int
    q_start: Tensor
    q_count: Tensor
    full: Entries
    partial: Entries
    mask: IntervalMask | BitMask | None = None
    variant: Tensor | None = None
    variants: int = 1
    visible: int = 0

    @property
    def tiles(self) -> int:
        return self.q_start.numel()

    @property
    def device(self) -> torch.device:
        return self.q_start.device

    @property
    def density(self) -> float:
        """Visible pairs as a share of all pairs, all variants alike: the FLOPs that an ideal kernel would do."""
        return self.visible / (self.variants * self.length_q * self.length_k)

    @property
    def visited_density(self) -> float:
        """Pairs inside visited blocks as a share of all pairs, each block counted at its real size, and each
        variant as often as heads and batch entries take it."""
        return self._pairs(self.full, self.partial) / (
            self.variants * self.length_q * self.length_k
        )

    @property
    def full_share(self) -> float:
        """Share of the visited pairs that lie in full blocks."""
        visited = self._pairs(self.full, self.partial)
        return self._pairs(self.full) / visited if visited else 1.0

    def _pairs(self, *lists: Entries) -> float:
        taken = [1.0] * self.variants
        if self.variant is not None:
            times = self.variant.cpu().flatten().bincount(minlength=self.variants)
            taken = (times.double() * self.variants / times.sum()).tolist()
        total = 0.0
        for entries in lists:
            variant, tile = entries.rows // self.tiles, entries.rows % self.tiles
            pairs = torch.zeros(self.variants, dtype=torch.int64, device=self.device)
            pairs.index_add_(0, variant, self.q_count[tile].long() * entries.count.long())
            total += sum(n * times for n, times in zip(pairs.tolist(), taken, strict=True))
        return total

    def to(self, device) -> BlockPlan:
        return BlockPlan.from_tensors([t.to(device) for t in self.to_tensors()], self.scalars())

    # A custom op takes tensors and integers, not dataclasses: these four lines are the whole bridge.

    def scalars(self) -> list[int]:
        kind = {type(None): 0, IntervalMask: 1, BitMask: 2}[type(self.mask)]
        return [self.length_q, self.length_k, self.block_q, self.block_k, self.variants,
                self.visible, kind]  # fmt: skip

    def to_tensors(self) -> list[Tensor]:
        """Flat list: tiles, full, partial, variant (empty if None), mask tensors."""
        empty = self.q_start.new_empty(0)
        mask: list[Tensor] = []
        if isinstance(self.mask, IntervalMask):
            mask = [self.mask.lo, self.mask.hi, self.mask.coord, self.mask.table]
        elif isinstance(self.mask, BitMask):
            mask = [self.mask.bits]
        lists = [t for e in (self.full, self.partial) for t in (e.offset, e.start, e.count)]
        return [self.q_start, self.q_count, *lists,
                empty if self.variant is None else self.variant, *mask]  # fmt: skip

    @classmethod
    def from_tensors(cls, tensors: list[Tensor], scalars: list[int]) -> BlockPlan:
        length_q, length_k, block_q, block_k, variants, visible, kind = scalars
        q_start, q_count, fo, fs, fc, po, ps, pc, variant, *mask = tensors
        masks = {
            0: lambda: None,
            1: lambda: IntervalMask(lo=mask[0], hi=mask[1], coord=mask[2], table=mask[3]),
            2: lambda: BitMask(bits=mask[0]),
        }
        return cls(
            length_q=length_q, length_k=length_k, block_q=block_q, block_k=block_k,
            q_start=q_start, q_count=q_count,
            full=Entries(offset=fo, start=fs, count=fc),
            partial=Entries(offset=po, start=ps, count=pc),
            mask=masks[kind](), variant=variant if variant.numel() else None,
            variants=variants, visible=visible,
        )  # fmt: skip

    def partial_mask(self, entries: slice | Tensor, tile: int) -> Tensor:
        """The mask of some partial entries of one query tile: bool [entries, q_count, block_k].

        Written to be read; columns past an entry's count are False.
        """
        start, count = self.partial.start[entries].long(), self.partial.count[entries].long()
        column = torch.arange(self.block_k, device=self.device)
        inside = column < count[:, None]  # [E, BN]
        q0, qn = int(self.q_start[tile]), int(self.q_count[tile])
        if isinstance(self.mask, IntervalMask):
            key = (start[:, None] + column).clamp(max=self.length_k - 1)
            coord = self.mask.coord[:, key]  # [A, E, BN]
            table = self.mask.table[entries].long()
            lo = self.mask.lo[table, :, q0 : q0 + qn].permute(1, 0, 2)[..., None]  # [A, E, BM, 1]
            hi = self.mask.hi[table, :, q0 : q0 + qn].permute(1, 0, 2)[..., None]
            seen = ((coord[:, :, None] >= lo) & (coord[:, :, None] < hi)).all(0)
        elif isinstance(self.mask, BitMask):
            words = self.mask.bits[entries, :qn]  # [E, BM, W]
            seen = (words[..., column // 32] >> (column % 32)) & 1 == 1
        else:
            raise AssertionError("a plan without partial entries has no mask")
        return seen & inside[:, None]

    def dense_mask(self, variant: int = 0) -> Tensor:
        """Every visible pair as bool [S_q, S_k]: for references and pictures, not for large grids."""
        mask = torch.zeros(self.length_q, self.length_k, dtype=torch.bool, device=self.device)
        full, partial = self.full.offset.tolist(), self.partial.offset.tolist()
        for tile, (q0, qn) in enumerate(
            zip(self.q_start.tolist(), self.q_count.tolist(), strict=True)
        ):
            row = variant * self.tiles + tile
            for e in range(full[row], full[row + 1]):
                k0, kn = int(self.full.start[e]), int(self.full.count[e])
                mask[q0 : q0 + qn, k0 : k0 + kn] = True
            seen = slice(partial[row], partial[row + 1])
            if seen.start < seen.stop:
                blocks = self.partial_mask(seen, tile)
                for block, k0, kn in zip(
                    blocks,
                    self.partial.start[seen].tolist(),
                    self.partial.count[seen].tolist(),
                    strict=True,
                ):
                    mask[q0 : q0 + qn, k0 : k0 + kn] = block[:, :kn]
        return mask

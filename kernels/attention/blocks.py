"""Portable block-sparse attention: gather the keys that a tile visits and call SDPA on them.

One call of SDPA per query tile, over all heads. Neighbouring entries merge into slices, so a tile
whose keys lie together is attended without a copy. Needs nothing but torch, hence runs on every
device; on a CPU it turns sparsity into time, which is what it is for.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.weak import WeakTensorKeyDictionary

from ..plan.block_plan import BlockPlan

# Additive masks are kept between calls while one plan's take less than this.
MASK_BYTES = 512 << 20


@dataclass(frozen=True, slots=True)
class _Tile:
    """The work of one query tile: `slices` of visible keys, the last `masked` keys under a mask."""

    q: slice
    slices: list[slice]
    masked: int
    row: int
    index: int


# A plan's tiles and masks by the tensor that identifies it: a compiled call rebuilds the BlockPlan.
_tiles: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_masks: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def unsupported(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> list[str]:
    if q.shape[2] % k.shape[2]:
        return [f"{q.shape[2]} query heads do not divide into {k.shape[2]} key heads"]
    return []


def forward(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """q (B, S_q, H, D), k and v (B, S_k, H_kv, D) -> out (B, S_q, H, D), lse (B, H, S_q) fp32 or None."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = (
        q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32) if return_lse else None
    )
    group = q.shape[2] // k.shape[2]
    for variant, batch, heads in _heads_by_variant(plan, q.shape[2]):
        kv_heads = heads if isinstance(heads, slice) else heads // group
        parts = q[batch, :, heads], k[batch, :, kv_heads], v[batch, :, kv_heads]
        for tile in _plan_tiles(plan, variant):
            o, e = _attend(*parts, tile, plan, scale, return_lse)
            out[batch, tile.q, heads] = o
            if lse is not None:
                lse[batch, heads, tile.q] = e
    return out, lse


def _attend(q, k, v, tile: _Tile, plan: BlockPlan, scale: float, return_lse: bool):
    """One tile: (B, M, H, D) and its lse (B, H, M)."""
    q = q[:, tile.q].transpose(1, 2)  # (B, H, M, D)
    if not tile.slices:
        empty = torch.full(q.shape[:3], -torch.inf, device=q.device)
        return torch.zeros_like(q).transpose(1, 2), empty
    k, v = (_gather(x, tile.slices).transpose(1, 2) for x in (k, v))
    if k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    mask = _mask(tile, plan, k.shape[2], q.dtype) if tile.masked else None
    blind = None  # rows that see no key of this tile: softmax has no value there
    if mask is not None and tile.masked == k.shape[2]:
        blind = (mask == -torch.inf).all(-1)
        blind = blind[:, None] if bool(blind.any()) else None
        if blind is not None:
            mask = mask.masked_fill(blind, 0.0)
    lse = None
    if return_lse:
        scores = (q @ k.mT).float() * scale
        scores = scores if mask is None else scores + mask
        lse = scores.logsumexp(-1)
        if blind is not None:
            lse = lse.masked_fill(blind[:, 0], -torch.inf)
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    if blind is not None:
        out = out.masked_fill(blind, 0.0)
    return out.transpose(1, 2), lse


def _gather(x: Tensor, slices: list[slice]) -> Tensor:
    """The named tokens of x (B, S, H, D), as a view where they lie together."""
    if len(slices) == 1:
        return x[:, slices[0]]
    return torch.cat([x[:, s] for s in slices], dim=1)


def _heads_by_variant(plan: BlockPlan, heads: int):
    """(variant, batch slice, heads as a slice or indices) in as few groups as the plan allows."""
    if plan.variant is None:
        yield 0, slice(None), slice(None)
        return
    table = plan.variant.tolist()
    for b, row in enumerate(table):
        batch = slice(None) if len(table) == 1 else slice(b, b + 1)
        for variant in sorted(set(row)):
            own = [h for h, value in enumerate(row) if value == variant]
            yield variant, batch, slice(None) if len(row) == 1 else torch.tensor(own)


def _plan_tiles(plan: BlockPlan, variant: int) -> list[_Tile]:
    """The tiles of a variant, with neighbouring full entries merged; read from the device once a plan."""
    if plan.q_start not in _tiles:
        full, partial = _runs(plan.full), _runs(plan.partial)
        rows = list(zip(plan.q_start.tolist(), plan.q_count.tolist(), strict=True))
        tiles = []
        for row in range(plan.variants * plan.tiles):
            index = row % plan.tiles
            q0, qn = rows[index]
            masked = sum(n for _, n in partial[row])
            slices = _merged(full[row]) + _merged(partial[row])
            tiles.append(_Tile(slice(q0, q0 + qn), slices, masked, row, index))
        _tiles[plan.q_start] = tiles
    return _tiles[plan.q_start][variant * plan.tiles : (variant + 1) * plan.tiles]


def _runs(entries) -> list[list[tuple[int, int]]]:
    offset = entries.offset.tolist()
    runs = list(zip(entries.start.tolist(), entries.count.tolist(), strict=True))
    return [runs[a:b] for a, b in itertools.pairwise(offset)]


def _merged(runs: list[tuple[int, int]]) -> list[slice]:
    slices: list[slice] = []
    for start, count in runs:
        if slices and slices[-1].stop == start:
            slices[-1] = slice(slices[-1].start, start + count)
        else:
            slices.append(slice(start, start + count))
    return slices


def _mask(tile: _Tile, plan: BlockPlan, keys: int, dtype: torch.dtype) -> Tensor:
    """Additive mask of a tile, [M, keys]: 0 where visible, -inf where not."""
    kept = _masks.setdefault(plan.q_start, {})
    mask = kept.get((tile.row, dtype))
    if mask is None:
        offset = plan.partial.offset[tile.row : tile.row + 2].tolist()
        blocks = plan.partial_mask(slice(*offset), tile.index)  # [E, M, block_k]
        column = torch.arange(plan.block_k, device=plan.device)
        inside = column < plan.partial.count[slice(*offset), None]
        seen = blocks.transpose(1, 2)[inside].mT  # [M, masked]
        mask = torch.zeros(seen.shape[0], keys, dtype=dtype, device=plan.device)
        mask[:, keys - tile.masked :].masked_fill_(~seen, -torch.inf)
        if sum(m.numel() * m.element_size() for m in kept.values()) < MASK_BYTES:
            kept[tile.row, dtype] = mask
    return mask

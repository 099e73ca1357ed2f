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
from .bias import Bias, RelativeBias

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

    def keys(self, device: torch.device) -> slice | Tensor:
        """All visited keys, in the order of the slices."""
        if len(self.slices) == 1:
            return self.slices[0]
        return torch.cat([torch.arange(s.start, s.stop, device=device) for s in self.slices])


# A plan's tiles and masks by the tensor that identifies it: a compiled call rebuilds the BlockPlan.
_tiles: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_masks: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def unsupported(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> list[str]:
    if q.shape[2] % k.shape[2]:
        return [f"{q.shape[2]} query heads do not divide into {k.shape[2]} key heads"]
    return []


def forward(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float, return_lse: bool,
    bias: Bias | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
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
            added = None
            if bias is not None and tile.slices:
                added = _part(bias.block(tile.index, tile.q, tile.keys(q.device)), batch, heads)
            o, e = _attend(*parts, tile, plan, scale, return_lse, added)
            out[batch, tile.q, heads] = o
            if lse is not None:
                lse[batch, heads, tile.q] = e.to(lse.dtype)
    return out, lse


def backward(
    grad: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    out: Tensor | None, lse: Tensor | None, plan: BlockPlan, scale: float, bias: Bias | None = None,
    table_gradient: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of q, k, v and of a relative bias' table, a tile at a time, with the formulas of `reference`.

    A tile has all keys that its queries see, so its weights need neither out nor lse. Sums are fp32 or fp64.
    """
    exact = torch.promote_types(q.dtype, torch.float32)
    d_q = torch.zeros_like(q, memory_format=torch.contiguous_format)
    d_k, d_v = (torch.zeros(x.shape, dtype=exact, device=x.device) for x in (k, v))
    d_table = None
    if table_gradient and isinstance(bias, RelativeBias):
        d_table = torch.zeros_like(bias.table, dtype=exact)
    group = q.shape[2] // k.shape[2]
    kv_head = torch.arange(q.shape[2], device=q.device) // group
    for variant, batch, heads in _heads_by_variant(plan, q.shape[2]):
        own = kv_head[heads]
        for tile in _plan_tiles(plan, variant):
            if not tile.slices:
                continue
            b_q, b_grad = (x[batch, tile.q, heads].transpose(1, 2).to(exact) for x in (q, grad))
            b_k, b_v = (
                _gather(x[batch], tile.slices)[:, :, own].transpose(1, 2).to(exact) for x in (k, v)
            )
            scores = b_q @ b_k.mT * scale  # [B, H, M, K]
            if tile.masked:
                scores = scores + _mask(tile, plan, b_k.shape[2], exact)
            if bias is not None:
                block = bias.block(tile.index, tile.q, tile.keys(q.device))
                scores = scores + _part(block, batch, heads)
            weights = scores.softmax(-1)
            if tile.masked == b_k.shape[2]:  # rows that see no key
                weights = weights.nan_to_num(0.0)
            d_weights = b_grad @ b_v.mT
            shift = (weights * d_weights).sum(-1, keepdim=True)
            if grad_lse is not None:
                shift = shift - grad_lse[batch, heads, tile.q, None]
            d_scores = weights * (d_weights - shift)
            d_q[batch, tile.q, heads] = (scale * d_scores @ b_k).transpose(1, 2).to(q.dtype)
            _scatter(d_k[batch], tile.slices, own, scale * d_scores.mT @ b_q)
            _scatter(d_v[batch], tile.slices, own, weights.mT @ b_grad)
            if d_table is not None:
                rows = heads if d_table.shape[0] > 1 else slice(None)
                where = tile.q, tile.keys(q.device)
                d_table[rows] = bias.gradient(d_table[rows], d_scores, *where)
    return (
        d_q,
        d_k.to(k.dtype),
        d_v.to(v.dtype),
        d_table if d_table is None else d_table.to(bias.table.dtype),
    )


def _scatter(total: Tensor, slices: list[slice], heads: Tensor, x: Tensor) -> None:
    """Add x (B, H, keys, D) to the keys of `slices` of total (B, S, H_kv, D), head h to heads[h]."""
    sizes = [s.stop - s.start for s in slices]
    for part, s in zip(x.transpose(1, 2).split(sizes, 1), slices, strict=True):
        total[:, s].index_add_(2, heads, part)


def _attend(
    q, k, v, tile: _Tile, plan: BlockPlan, scale: float, return_lse: bool, bias: Tensor | None
):
    """One tile: (B, M, H, D) and its lse (B, H, M)."""
    q = q[:, tile.q].transpose(1, 2)  # (B, H, M, D)
    if not tile.slices:
        empty = torch.full(q.shape[:3], -torch.inf, device=q.device)
        return torch.zeros_like(q).transpose(1, 2), empty
    k, v = (_gather(x, tile.slices).transpose(1, 2) for x in (k, v))
    dtype = q.dtype
    if (
        bias is not None
    ):  # SDPA wants q's dtype, in which a large bias would lose what scores differ by
        exact = torch.promote_types(dtype, bias.dtype)
        q, k, v, bias = (x.to(exact) for x in (q, k, v, bias))
    if k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    mask = _mask(tile, plan, k.shape[2], q.dtype) if tile.masked else None
    blind = None  # rows that see no key of this tile: softmax has no value there
    if mask is not None and tile.masked == k.shape[2]:
        blind = (mask == -torch.inf).all(-1)
        blind = blind[:, None] if bool(blind.any()) else None
        if blind is not None:
            mask = mask.masked_fill(blind, 0.0)
    if bias is not None:
        mask = bias if mask is None else mask + bias
    lse = None
    if return_lse:
        exact = torch.promote_types(q.dtype, torch.float32)
        scores = q.to(exact) @ k.to(exact).mT * scale
        scores = scores if mask is None else scores + mask
        lse = scores.logsumexp(-1)
        if blind is not None:
            lse = lse.masked_fill(blind[:, 0], -torch.inf)
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    if blind is not None:
        out = out.masked_fill(blind, 0.0)
    return out.transpose(1, 2).to(dtype), lse


def _part(x: Tensor, batch, heads) -> Tensor:
    """x (B or 1, H or 1, ...) for some batch entries and heads."""
    x = x if x.shape[0] == 1 else x[batch]
    return x if x.shape[1] == 1 else x[:, heads]


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

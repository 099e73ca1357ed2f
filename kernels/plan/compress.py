"""Any boolean mask as a BlockPlan: blocks without a visible pair are skipped, mixed ones keep their bits."""

from __future__ import annotations

import torch
from torch import Tensor

from .block_plan import BitMask, BlockPlan, Entries


def compress(mask: Tensor, *, block_q: int = 128, block_k: int = 64) -> BlockPlan:
    """Compress a mask.

    mask: bool [S_q, S_k], [H, S_q, S_k] or [B, H, S_q, S_k]; True where the query sees the key.
        Broadcast dimensions (size or stride 0/1) are kept once, so a mask shared by heads costs no more.
    """
    if mask.dtype != torch.bool or not 2 <= mask.dim() <= 4:
        raise ValueError(
            f"compress needs a bool mask of shape [S_q, S_k], [H, S_q, S_k] or [B, H, S_q, S_k], got "
            f"{mask.dtype} {tuple(mask.shape)}. Turn an additive mask into `mask == 0` first."
        )
    variant = None
    if mask.dim() > 2:
        mask = mask if mask.dim() == 4 else mask[None]
        for axis in (0, 1):
            if mask.stride(axis) == 0:
                mask = mask.narrow(axis, 0, 1)
        batch, heads = mask.shape[:2]
        if batch * heads > 1:
            variant = torch.arange(batch * heads, dtype=torch.int32, device=mask.device)
            variant = variant.view(batch, heads)
    sq, sk = mask.shape[-2:]
    mask = mask.reshape(-1, sq, sk)
    variants = mask.shape[0]

    nq, nk = -(-sq // block_q), -(-sk // block_k)
    blocks = torch.zeros(variants, nq * block_q, nk * block_k, dtype=torch.bool, device=mask.device)
    blocks[:, :sq, :sk] = mask
    blocks = blocks.view(variants, nq, block_q, nk, block_k).transpose(2, 3)  # [V, nq, nk, BM, BN]
    visible = blocks.sum((-2, -1))
    q_start = torch.arange(nq, device=mask.device) * block_q
    q_count = (sq - q_start).clamp(max=block_q)
    k_start = torch.arange(nk, device=mask.device) * block_k
    k_count = (sk - k_start).clamp(max=block_k)
    whole = visible == q_count[:, None] * k_count

    def entries(pairs: Tensor) -> Entries:  # pairs: bool [V, nq, nk]
        rows = pairs.flatten(0, 1)
        offset = torch.zeros(rows.shape[0] + 1, dtype=torch.int32, device=mask.device)
        offset[1:] = rows.sum(1).cumsum(0)
        column = rows.nonzero()[:, 1]
        return Entries(offset=offset, start=k_start[column].int(), count=k_count[column].int())

    mixed = (visible > 0) & ~whole
    partial = entries(mixed)
    return BlockPlan(
        length_q=sq,
        length_k=sk,
        block_q=block_q,
        block_k=block_k,
        q_start=q_start.int(),
        q_count=q_count.int(),
        full=entries(whole),
        partial=partial,
        mask=BitMask(bits=_pack(blocks[mixed])) if partial.start.numel() else None,
        variant=variant,
        variants=variants,
        visible=int(visible.sum()),
    )


def _pack(bits: Tensor) -> Tensor:
    """bool [n, BM, BN] -> int32 [n, BM, ceil(BN / 32)], bit j of a word is column 32 * word + j."""
    n, rows, columns = bits.shape
    words = -(-columns // 32)
    padded = torch.zeros(n, rows, words * 32, dtype=torch.long, device=bits.device)
    padded[..., :columns] = bits
    value = (padded.view(n, rows, words, 32) << torch.arange(32, device=bits.device)).sum(-1)
    return torch.where(value >= 1 << 31, value - (1 << 32), value).int()

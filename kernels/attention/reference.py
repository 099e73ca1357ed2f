"""The oracle: dense softmax attention in float64 under the plan's mask. Written to be read.

out = softmax(scale * q k^T restricted to the visible pairs) v,   lse = log sum exp(scale * q k^T)
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..plan.block_plan import BlockPlan


def unsupported(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> list[str]:
    pairs = q.shape[0] * q.shape[2] * plan.length_q * plan.length_k
    if pairs > 1 << 31:
        return [f"it forms all {pairs:.2g} scores in float64; use it on small inputs only"]
    return []


def forward(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """q (B, S_q, H, D), k and v (B, S_k, H_kv, D) -> out (B, S_q, H, D) in q's dtype, lse (B, H, S_q) fp32."""
    batch, _, heads, _ = q.shape
    masks = torch.stack([plan.dense_mask(v) for v in range(plan.variants)])  # [V, S_q, S_k]
    variant = plan.variant if plan.variant is not None else masks.new_zeros(1, 1, dtype=torch.int)
    mask = masks[variant.expand(batch, heads).long()]  # [B, H, S_q, S_k]

    qd, kd, vd = (x.double().transpose(1, 2) for x in (q, k, v))  # (B, H, S, D)
    kd, vd = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (kd, vd))
    scores = (qd @ kd.mT * scale).masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
    out = (weights @ vd).transpose(1, 2).to(q.dtype).contiguous()
    return out, lse.float() if return_lse else None

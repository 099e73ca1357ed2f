"""The oracle: dense softmax attention in float64 under the plan's mask. Written to be read.

out = softmax(s) v,   lse = log sum exp(s),   s = scale * q k^T + bias, restricted to the visible pairs
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..plan.block_plan import BlockPlan
from .bias import Bias, RelativeBias


def unsupported(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> list[str]:
    pairs = q.shape[0] * q.shape[2] * plan.length_q * plan.length_k
    if pairs > 1 << 31:
        return [f"it forms all {pairs:.2g} scores in float64; use it on small inputs only"]
    return []


def forward(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float, return_lse: bool,
    bias: Bias | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """q (B, S_q, H, D), k and v (B, S_k, H_kv, D) -> out (B, S_q, H, D) in q's dtype, lse (B, H, S_q) fp32."""
    weights, lse = _softmax(q, k, plan, scale, bias)
    out = (weights @ _heads_first(v, q)).transpose(1, 2).to(q.dtype).contiguous()
    return out, lse.float() if return_lse else None


def backward(
    grad: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    out: Tensor | None, lse: Tensor | None, plan: BlockPlan, scale: float, bias: Bias | None = None,
    table_gradient: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of q, k, v and of a relative bias' table, from those of out and lse.

    With p the weights:  dv = p^T do,   ds = p (do v^T - rowsum(p do v^T) + dlse),   dq = scale * ds k,
    dk = scale * ds^T q,   dtable[i] = the sum of ds over the pairs that read table[i]. out and lse are not
    read: the weights are computed again in float64.
    """
    weights, _ = _softmax(q, k, plan, scale, bias)
    kd, vd, grad = _heads_first(k, q), _heads_first(v, q), grad.double().transpose(1, 2)
    d_weights = grad @ vd.mT
    shift = (weights * d_weights).sum(-1, keepdim=True)
    if grad_lse is not None:
        shift = shift - grad_lse.double()[..., None]
    d_scores = weights * (d_weights - shift)  # [B, H, S_q, S_k]
    d_q = scale * d_scores @ kd
    d_k = _sum_of_groups(scale * d_scores.mT @ q.double().transpose(1, 2), k.shape[2])
    d_v = _sum_of_groups(weights.mT @ grad, v.shape[2])
    d_table = None
    if table_gradient and isinstance(bias, RelativeBias):
        d_table = bias.gradient(torch.zeros_like(bias.table, dtype=torch.float64), d_scores)
        d_table = d_table.to(bias.table.dtype)
    d_q, d_k, d_v = (g.transpose(1, 2).to(q.dtype).contiguous() for g in (d_q, d_k, d_v))
    return d_q, d_k, d_v, d_table


def _softmax(
    q: Tensor, k: Tensor, plan: BlockPlan, scale: float, bias: Bias | None
) -> tuple[Tensor, Tensor]:
    """The weights [B, H, S_q, S_k] and the lse [B, H, S_q]; rows that see no key have weights of 0."""
    batch, _, heads, _ = q.shape
    masks = torch.stack([plan.dense_mask(v) for v in range(plan.variants)])  # [V, S_q, S_k]
    variant = plan.variant if plan.variant is not None else masks.new_zeros(1, 1, dtype=torch.int)
    mask = masks[variant.expand(batch, heads).long()]  # [B, H, S_q, S_k]
    scores = q.double().transpose(1, 2) @ _heads_first(k, q).mT * scale
    if bias is not None:
        for tile, (q0, qn) in enumerate(
            zip(plan.q_start.tolist(), plan.q_count.tolist(), strict=True)
        ):
            own = slice(q0, q0 + qn)
            scores[:, :, own] += bias.block(tile, own, slice(None)).double()
    scores = scores.masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(-1)
    return (scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp(), lse


def _heads_first(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values (B, S, H_kv, D) in float64 for every query head: (B, H, S, D)."""
    return x.double().transpose(1, 2).repeat_interleave(q.shape[2] // x.shape[2], dim=1)


def _sum_of_groups(x: Tensor, kv_heads: int) -> Tensor:
    """What `_heads_first` repeats is summed: (B, H, S, D) -> (B, H_kv, S, D)."""
    return x.unflatten(1, (kv_heads, -1)).sum(2)

"""Block-sparse attention in 16 bits, forward, for Hopper (sm_90a): an entry point of `kernel`."""

from __future__ import annotations

import torch
from torch import Tensor

from ...order import move
from ...order.permute import IN_PLACE, Orders
from ...plan.block_plan import BlockPlan
from ..bias import BlockBias
from . import score_bound
from .host import launch, reasons_against


def unsupported(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> list[str]:
    """Every reason why `forward` cannot run on these inputs; empty if it can."""
    reasons = reasons_against(q, plan)
    if q.dtype not in (torch.bfloat16, torch.float16):
        reasons.append(f"dtype must be bfloat16 or float16, got {q.dtype}")
    return reasons


def forward(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float, return_lse: bool,
    bias: BlockBias | None = None, order: Orders = IN_PLACE,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """softmax(scale * q k^T + bias, over the pairs that the plan makes visible) v.

    q: [B, Sq, H, D]; k, v: [B, Sk, Hk, D] with Hk a divisor of H; fp16 or bf16, D up to 256
    (computed as 64, 128 or 256). Strides of 16 bytes and contiguous rows are read in place, others are
    copied. order: of q, k, v and the outputs beside that of the plan; rows of out are written to their places.
    Returns out [B, Sq, H, D] and, if asked for, the natural log-sum-exp, fp32 [B, H, Sq].
    """
    batch, length, heads, dim = q.shape
    if scale <= 0:  # the running maximum is taken before scaling, which needs a positive scale
        q, scale = (-q, -scale) if scale else (torch.zeros_like(q), 1.0)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(batch, heads, length, dtype=torch.float32) if return_lse else None
    if out.numel():
        bounds = q.dtype == torch.bfloat16 and dim <= 128 and bias is None
        all_move = order.queries is not None and order.keys is not None  # squares come along
        if bounds and (all_move or score_bound.pays(plan)):
            q, k, v, most = move.moved_with_squares(q, k, v, *order)
        else:
            q, k, v = move.moved([q, k, v], order.of_all)
            most = None
        rows = None if bias is None else bias.rows
        launch(q, k, v, None, plan, scale, out, lse, rows, order.queries, most)
    return out, lse

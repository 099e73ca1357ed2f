"""The op as torch.compile sees it: one opaque call, tensors and numbers in, tensors out."""

from __future__ import annotations

import torch
from torch import Tensor, library

from ..plan.block_plan import BlockPlan
from .dispatch import run
from .precision import Precision


@library.custom_op("visionfuse::block_sparse_attention", mutates_args=())
def block_sparse_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: list[Tensor],
    numbers: list[int],
    scale: float,
    impl: str,
    return_lse: bool,
    precision: str = "model",
) -> tuple[Tensor, Tensor]:
    """out (B, S_q, H, D) and lse (B, H, S_q), the latter empty unless asked for. impl may be "auto"."""
    blocks = BlockPlan.from_tensors(plan, numbers)
    out, lse = run(impl, q, k, v, blocks, scale, return_lse, Precision.parse(precision))
    return out, q.new_empty(0, dtype=torch.float32) if lse is None else lse


@block_sparse_attention_op.register_fake
def _(q, k, v, plan, numbers, scale, impl, return_lse, precision="model"):
    lse = (q.shape[0], q.shape[2], q.shape[1]) if return_lse else (0,)
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(
        lse, dtype=torch.float32
    )

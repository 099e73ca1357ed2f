"""The op as torch.compile sees it: one opaque call, tensors and numbers in, tensors out."""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor, library

from ..plan.block_plan import BlockPlan

IMPLEMENTATIONS = ("reference", "blocks", "flex", "triton", "gluon_sm90")
_MODULES = {"triton": "triton_forward"}


def implementation(name: str):
    """The module of an implementation: `unsupported(q, k, v, plan)` and `forward(...)`. Imported on first use."""
    return import_module(f".{_MODULES.get(name, name)}", __package__)


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
) -> tuple[Tensor, Tensor]:
    """out (B, S_q, H, D) and lse (B, H, S_q), the latter empty unless asked for."""
    out, lse = implementation(impl).forward(
        q, k, v, BlockPlan.from_tensors(plan, numbers), scale, return_lse
    )
    return out, q.new_empty(0, dtype=torch.float32) if lse is None else lse


@block_sparse_attention_op.register_fake
def _(q, k, v, plan, numbers, scale, impl, return_lse):
    lse = (q.shape[0], q.shape[2], q.shape[1]) if return_lse else (0,)
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(
        lse, dtype=torch.float32
    )

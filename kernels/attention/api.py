"""Block-sparse attention: validate, choose an implementation, call it."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from ..order.permute import IN_PLACE, Orders, take
from ..plan.block_plan import BlockPlan
from . import dispatch
from .bias import Bias
from .dispatch import IMPLEMENTATIONS, UnsupportedError
from .ops import block_sparse_attention_op
from .precision import MODEL, Precision

__all__ = [
    "UnsupportedError",
    "block_sparse_attention",
    "implementations",
    "select_implementation",
    "unsupported_reasons",
]


@overload
def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, *, scale: float | None = None,
    return_lse: Literal[False] = False, impl: str = "auto", precision: str | Precision = MODEL,
    bias: Bias | None = None, order: Orders = IN_PLACE,
) -> Tensor: ...  # fmt: skip
@overload
def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, *, scale: float | None = None,
    return_lse: Literal[True], impl: str = "auto", precision: str | Precision = MODEL,
    bias: Bias | None = None, order: Orders = IN_PLACE,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    impl: str = "auto",
    precision: str | Precision = MODEL,
    bias: Bias | None = None,
    order: Orders = IN_PLACE,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over the pairs that `plan` makes visible.

    q: (B, S_q, H, D); k, v: (B, S_k, H_kv, D) with H_kv dividing H (grouped-query attention). Any
        strides; float16, bfloat16 or float32. Tokens stand in the plan's order, or in one that `order` tells.
    scale: factor of the scores, 1 / sqrt(D) by default.
    return_lse: also return the natural log of the sum of exponentials, (B, H, S_q) float32.
    impl: "auto" picks; a name raises UnsupportedError, with all reasons, where it cannot run.
    precision: a `Precision` or its short name ("fp8", "int8_fp8", ...), "model" by default. Kernels that
        multiply codes round the inputs first; where none runs, "blocks" emulates them, which is slow. The
        lse of FP8 weights is that of the rounded ones, up to 1/16 off.
    bias: a `RelativeBias` or a `BlockBias`, added to the scaled scores.
    order: which query and which key stands at every position of the plan, where tokens have another order: that
        of q, of k and v, and of what is returned. The plan and the bias are in the plan's.

    Returns out (B, S_q, H, D) in q's dtype. Rows that see no key are 0, their lse -inf.
    Differentiable in q, k, v and the table of a RelativeBias. The gradient is that of exact attention in every
    precision: where operands are rounded, the backward computes exact out and lse again (straight-through).
    """
    _check(q, k, v, plan, order)
    if bias is not None:
        bias.check(q, k, plan)
    if not torch.compiler.is_compiling():
        precision = Precision.parse(precision)
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    added = [] if bias is None else bias.to_tensors()
    training = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *added[:1]))
    if impl != "auto":
        dispatch.require_known(impl)
        if training and not torch.compiler.is_compiling():
            if impl in dispatch.DIFFERENTIABLE and precision == MODEL:
                q, k, v = map(take, (q, k, v), order.of_all)
                out, lse = dispatch.run(impl, q, k, v, plan, scale, return_lse, MODEL, bias)
                back = order.back.queries
                out = take(out, back)
                return (out, take(lse, back, dim=2)) if lse is not None else out
            if reasons := dispatch.backward_reasons(impl, q, k, v, plan, bias):
                raise UnsupportedError(dispatch.refusal(impl, reasons, MODEL))
    out, lse = block_sparse_attention_op(
        q, k, v, plan.to_tensors(), plan.scalars(), added, scale, impl,
        return_lse or (training and str(precision) == str(MODEL) and dispatch.needs_lse(impl, q)),
        str(precision), *order,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def implementations() -> tuple[str, ...]:
    """The names of all implementations, whether or not they run here."""
    return IMPLEMENTATIONS


def unsupported_reasons(
    impl: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    precision: str | Precision = MODEL,
    bias: Bias | None = None,
) -> list[str]:
    """Every reason why `impl` cannot run these inputs; empty if it can."""
    return dispatch.unsupported_reasons(impl, q, k, v, plan, Precision.parse(precision), bias)


def select_implementation(
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    precision: str | Precision = MODEL,
) -> tuple[str, list[str]]:
    """The implementation that "auto" takes, and why it did not take a faster one."""
    from ..plan.compress import compress

    q = torch.empty(1, 1, 1, head_dim, device=torch.device(device), dtype=dtype)
    plan = compress(torch.ones(1, 1, dtype=torch.bool, device=q.device))
    return dispatch.fastest(q, q, q, plan, Precision.parse(precision))


def _check(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, order: Orders) -> None:
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        raise ValueError(
            f"Expected q (B, S_q, H, D) and k, v (B, S_k, H_kv, D), got {tuple(q.shape)=}, "
            f"{tuple(k.shape)=}, {tuple(v.shape)=}."
        )
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[2] % k.shape[2]:
        raise ValueError(
            "q, k and v must share batch and head dim, and key heads must divide query heads, got "
            f"{tuple(q.shape)=}, {tuple(k.shape)=}."
        )
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(
            f"q, k and v must share a floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}."
        )
    if (q.shape[1], k.shape[1]) != (plan.length_q, plan.length_k):
        raise ValueError(
            f"The plan is for {plan.length_q} queries and {plan.length_k} keys, got {q.shape[1]} and "
            f"{k.shape[1]}. Build a plan for this token layout."
        )
    if not q.device == k.device == v.device == plan.device:
        raise ValueError(
            f"q, k, v and the plan must be on one device, got {q.device}, {k.device}, {v.device}, "
            f"{plan.device}. Move the plan with plan.to(device)."
        )
    lengths = (plan.length_q, plan.length_k)
    if any(x is not None and x.shape != (n,) for x, n in zip(order, lengths, strict=True)):
        raise ValueError(
            f"The orders of queries and keys must have one token for every position, {lengths}, got "
            f"{[x if x is None else tuple(x.shape) for x in order]}."
        )
    if plan.variant is not None:
        batch, heads = plan.variant.shape
        if batch not in (1, q.shape[0]) or heads not in (1, q.shape[2]):
            raise ValueError(
                f"The plan has variants for (batch, heads) = {(batch, heads)}, the inputs have "
                f"{(q.shape[0], q.shape[2])}."
            )

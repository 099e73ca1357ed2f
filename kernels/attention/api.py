"""Block-sparse attention: validate, choose an implementation, call it."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from ..plan.block_plan import BlockPlan
from .ops import IMPLEMENTATIONS, block_sparse_attention_op, implementation


class UnsupportedError(ValueError):
    """A named implementation cannot run these inputs here; the message lists every reason."""


@overload
def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, *,
    scale: float | None = None, return_lse: Literal[False] = False, impl: str = "auto",
) -> Tensor: ...  # fmt: skip
@overload
def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, *,
    scale: float | None = None, return_lse: Literal[True], impl: str = "auto",
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
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over the pairs that `plan` makes visible.

    q: (B, S_q, H, D); k, v: (B, S_k, H_kv, D) with H_kv dividing H (grouped-query attention). Any
        strides; float16, bfloat16 or float32. Tokens stand in the plan's order.
    scale: factor of the scores, 1 / sqrt(D) by default.
    return_lse: also return the natural log of the sum of exponentials, (B, H, S_q) float32.
    impl: "auto" picks; a name raises UnsupportedError, with all reasons, where it cannot run.

    Returns out (B, S_q, H, D) in q's dtype. Rows that see no key are 0, their lse -inf.
    """
    _check(q, k, v, plan)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    training = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if impl == "auto":
        impl = _PORTABLE
        if q.is_cuda and not training:
            impl = _first_without_reasons(q, k, v, plan)[0]
    else:
        _require_known(impl)
    if not torch.compiler.is_compiling():
        reasons = unsupported_reasons(impl, q, k, v, plan)
        if training and impl in _ON_GPU:
            reasons.append("it has no backward, and an input requires a gradient")
        if reasons:
            raise UnsupportedError(_refusal(impl, reasons))
        if training:
            # The others are plain torch: autograd goes through them, not through the opaque op.
            out, lse = implementation(impl).forward(q, k, v, plan, scale, return_lse)
            return (out, lse) if return_lse else out
    out, lse = block_sparse_attention_op(
        q, k, v, plan.to_tensors(), plan.scalars(), scale, impl, return_lse
    )
    return (out, lse) if return_lse else out


def implementations() -> tuple[str, ...]:
    """The names of all implementations, whether or not they run here."""
    return IMPLEMENTATIONS


def unsupported_reasons(impl: str, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> list[str]:
    """Every reason why `impl` cannot run these inputs; empty if it can."""
    _require_known(impl)
    try:
        module = implementation(impl)
    except ImportError as error:
        return [f"it does not import here: {error}"]
    return module.unsupported(q, k, v, plan)


def select_implementation(
    device: torch.device | str, dtype: torch.dtype, head_dim: int
) -> tuple[str, list[str]]:
    """The implementation that "auto" takes, and why it did not take a faster one."""
    from ..plan.compress import compress

    device = torch.device(device)
    if device.type != "cuda":
        return _PORTABLE, [
            f"{name}: runs on GPUs, the tensors are on {device.type!r}" for name in _ON_GPU
        ]
    q = torch.empty(1, 1, 1, head_dim, device=device, dtype=dtype)
    return _first_without_reasons(
        q, q, q, compress(torch.ones_like(q[0, 0], dtype=torch.bool)[:, :1])
    )


# From the fastest to the slowest.
_ON_GPU = ("gluon_sm90", "triton")
_PORTABLE = "blocks"


def _first_without_reasons(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan
) -> tuple[str, list[str]]:
    reasons = []
    for name in _ON_GPU:
        refused = unsupported_reasons(name, q, k, v, plan)
        if not refused:
            return name, reasons
        reasons += [f"{name}: {reason}" for reason in refused]
    return _PORTABLE, reasons


def _require_known(impl: str) -> None:
    if impl not in IMPLEMENTATIONS:
        raise ValueError(
            f"Unknown implementation {impl!r}. Choose 'auto' or one of {', '.join(IMPLEMENTATIONS)}."
        )


def _refusal(impl: str, reasons: list[str]) -> str:
    lines = "\n".join(f"  - {reason}" for reason in reasons)
    return f"impl={impl!r} cannot run here:\n{lines}\nUse impl='auto' to let visionfuse choose."


def _check(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> None:
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
    if plan.variant is not None:
        batch, heads = plan.variant.shape
        if batch not in (1, q.shape[0]) or heads not in (1, q.shape[2]):
            raise ValueError(
                f"The plan has variants for (batch, heads) = {(batch, heads)}, the inputs have "
                f"{(q.shape[0], q.shape[2])}."
            )

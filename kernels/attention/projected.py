"""Attention over queries and keys as they come from their projections: RMSNorm and rotary embedding are done by the
pass that rounds them, or by one pass before the kernel. `projected_attention`.

A model norms and rotates queries and keys, and writes them, before its attention reads them again to round them. One
pass (`prologue`) does all of it in fp32 and rounds once. Inference only.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, library

from ..plan.block_plan import BlockPlan
from . import dispatch
from . import prologue as fused
from .precision import TILE, Precision
from .prologue import PrologueSpec


class Prelude(NamedTuple):
    """What is done to queries and keys before they meet; the arguments of `prologue`.

    norm_q, norm_k: weights of an RMSNorm, [D] over every head or [H * D] over all heads of a token, in any float
        dtype. cos, sin: [S, D] or [1, S, 1, D], of pairs of neighbouring channels. None: there is none.
    """

    norm_q: Tensor | None = None
    norm_k: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None
    eps: float = 1e-6

    @property
    def options(self) -> dict:
        """Of `prologue` and its `reference`."""
        rotary = None if self.cos is None or self.sin is None else (self.cos, self.sin)
        return {"norm_q": self.norm_q, "norm_k": self.norm_k, "rotary": rotary}

    def applied(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """q and k, normed and rotated, in their dtype: on a GPU by the kernel, elsewhere by PyTorch in fp32."""
        spec = PrologueSpec(eps=self.eps)
        fits = q.is_cuda and 16 <= q.shape[-1] <= fused.MAX_HEAD_DIM
        if fits and not fused.unsupported(q, k, v, spec):
            return fused.prologue(q, k, v, spec, **self.options)[:2]
        exact = torch.promote_types(q.dtype, torch.float32)
        found = fused.reference(q.to(exact), k.to(exact), v, spec, **self.options)
        return found.q.to(q.dtype), found.k.to(k.dtype)


def projected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    prelude: Prelude,
    *,
    scale: float | None = None,
    impl: str = "auto",
    precision: str | Precision = "model",
) -> Tensor:
    """`block_sparse_attention` of q and k that `prelude` has yet to be done to.

    q (B, S, H, D), k and v (B, S, H_kv, D), in the plan's order -> (B, S, H, D) in q's dtype. torch.compile sees one
    opaque op, `visionfuse::projected_attention`. Raises as `block_sparse_attention` and `prologue` do.
    """
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    return projected_attention_op(
        q, k, v, plan.to_tensors(), plan.scalars(), scale, impl, str(precision), *prelude
    )


@library.custom_op("visionfuse::projected_attention", mutates_args=())
def projected_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: list[Tensor],
    numbers: list[int],
    scale: float,
    impl: str,
    precision: str,
    norm_q: Tensor | None,
    norm_k: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
) -> Tensor:
    """out (B, S, H, D) in q's dtype, in memory as its shape says. impl may be "auto"."""
    blocks, formats = BlockPlan.from_tensors(plan, numbers), Precision.parse(precision)
    prelude = Prelude(norm_q, norm_k, cos, sin, eps)
    with torch.autocast(q.device.type, enabled=False):
        if impl == "auto":
            impl = dispatch.fastest(q, k, v, blocks, formats)[0]
        if not rounded_with(impl, formats):
            q, k = prelude.applied(q, k, v)
            return dispatch.run(impl, q, k, v, blocks, scale, False, formats)[0]
        if reasons := dispatch.unsupported_reasons(impl, q, k, v, blocks, formats):
            raise dispatch.UnsupportedError(dispatch.refusal(impl, reasons, formats))
        from . import quantized

        return quantized.forward(impl, q, k, v, blocks, scale, False, formats, prelude=prelude)[0]


@projected_attention_op.register_fake
def _(q, k, v, *rest):
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def rounded_with(impl: str, precision: Precision) -> bool:
    """Whether one pass norms, rotates and rounds. Queries less their mean, and those with a scale by tile, are rounded
    by kernels of their own."""
    by_tile = precision.q_scale == TILE
    ours = not precision.is_model and impl in dispatch.ON_GPU
    return ours and precision.qk != "model" and not precision.smooth_q and not by_tile

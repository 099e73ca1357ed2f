"""Which implementation runs, and in which way: as it is, with rounded operands, or emulated.

An implementation is a module with `unsupported(q, k, v, plan)`, which lists every reason against, and
`forward(q, k, v, plan, scale, return_lse, bias)`. Of precisions it need know nothing: those in
`quantized.NATIVE` have a kernel for rounded operands as well, others are emulated (`emulation`).

Gradients are those of exact attention at the given inputs, in every precision (straight-through). `BACKWARD`
names the module with `backward(grad, grad_lse, q, k, v, out, lse, plan, scale, bias, table_gradient)`.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from ..order.permute import IN_PLACE, Orders, moved, take
from ..plan.block_plan import BlockPlan
from .bias import Bias, BlockBias, RelativeBias
from .precision import MODEL, Precision

IMPLEMENTATIONS = ("reference", "blocks", "flex", "triton", "gluon_sm90")
# From the fastest to the slowest.
ON_GPU = ("gluon_sm90", "triton")
PORTABLE = "blocks"
BACKWARD = {
    "reference": "reference",
    "blocks": "blocks",
    "triton": "triton",
    "gluon_sm90": "triton",
}
# Those that read and write tokens in their own order; for others these are moved before and after.
ORDERED = ("gluon_sm90",)
# Differentiable torch code of others: eager autograd goes through it and not through the opaque op.
DIFFERENTIABLE = ("flex",)
# Biases that an implementation adds to products of (16-bit, 8-bit) operands, where not all.
BIASES = {"gluon_sm90": ((), (BlockBias,))}


class UnsupportedError(ValueError):
    """A named implementation cannot run these inputs here; the message lists every reason."""


def implementation(name: str) -> ModuleType:
    """The module of an implementation, imported on first use."""
    return import_module(f".{name}", __package__)


def is_emulated(impl: str, precision: Precision) -> bool:
    """Whether `impl` rounds the inputs and multiplies them in full precision, which saves no time."""
    return not precision.is_model and impl not in ON_GPU


def unsupported_reasons(
    impl: str, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, precision: Precision,
    bias: Bias | None = None,
) -> list[str]:  # fmt: skip
    """Every reason why `impl` cannot run these inputs in this precision; empty if it can."""
    require_known(impl)
    try:
        module = implementation(impl)
    except ImportError as error:
        return [f"it does not import here: {error}"]
    reasons = []
    kinds = BIASES.get(impl, ((RelativeBias, BlockBias),) * 2)[not precision.is_model]
    if bias is not None and not isinstance(bias, kinds):
        reasons.append(f"its kernel does not add a {type(bias).__name__}")
    if precision.is_model:
        return reasons + module.unsupported(q, k, v, plan)
    if is_emulated(impl, precision):
        from . import emulation

        return reasons + emulation.unsupported(impl, q, k, v, plan, precision)
    from . import quantized

    return reasons + quantized.unsupported(impl, q, k, v, plan, precision, bias)


def fastest(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, precision: Precision, bias: Bias | None = None
) -> tuple[str, list[str]]:
    """The fastest implementation that can run these inputs, and why no faster one can."""
    if not q.is_cuda:
        return PORTABLE, [
            f"{name}: runs on GPUs, the tensors are on {q.device.type!r}" for name in ON_GPU
        ]
    reasons = []
    for name in ON_GPU:
        refused = unsupported_reasons(name, q, k, v, plan, precision, bias)
        if not refused:
            return name, reasons
        reasons += [f"{name}: {reason}" for reason in refused]
    return PORTABLE, reasons


def run(
    impl: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    scale: float,
    return_lse: bool,
    precision: Precision,
    bias: Bias | None = None,
    order: Orders = IN_PLACE,
) -> tuple[Tensor, Tensor | None]:
    """out (B, S_q, H, D) in q's dtype and lse (B, H, S_q) fp32 or None, in the order of q.

    Raises UnsupportedError, with all reasons, where a named implementation cannot run.
    """
    if impl == "auto":
        impl = fastest(q, k, v, plan, precision, bias)[0]
    if reasons := unsupported_reasons(impl, q, k, v, plan, precision, bias):
        raise UnsupportedError(refusal(impl, reasons, precision))
    if order.moves and impl not in ORDERED:
        q, k, v = moved([q, k, v], order.of_all)
        out, lse = run(impl, q, k, v, plan, scale, return_lse, precision, bias)
        back = order.back.queries
        return moved([out], [back])[0], None if lse is None else take(lse, back, dim=2)
    own = {"order": order} if order.moves else {}
    if precision.is_model:
        return implementation(impl).forward(q, k, v, plan, scale, return_lse, bias, **own)
    if is_emulated(impl, precision):
        from . import emulation

        dtype = torch.float64 if impl == "reference" or q.dtype == torch.float64 else torch.float32
        return emulation.forward(
            q, k, v, plan, scale, return_lse, precision, dtype=dtype, bias=bias
        )
    from . import quantized

    return quantized.forward(impl, q, k, v, plan, scale, return_lse, precision, bias, **own)


def needs_lse(impl: str, q: Tensor) -> bool:
    """Whether the backward of `impl` reads the output and the lse of the forward."""
    return impl in ON_GPU or (impl == "auto" and q.is_cuda)


def backward_reasons(
    impl: str, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, bias: Bias | None = None
) -> list[str]:
    """Every reason why `impl` gives no gradients of these inputs; empty if it does."""
    require_known(impl)
    if impl not in BACKWARD:
        return ["it has no backward, and an input requires a gradient"]
    try:
        module = import_module(f".{BACKWARD[impl]}", __package__)
    except ImportError as error:
        return [f"its backward does not import here: {error}"]
    return module.unsupported(q, k, v, plan)


def run_backward(
    impl: str, grad: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    out: Tensor | None, lse: Tensor | None, plan: BlockPlan, scale: float, bias: Bias | None,
    table_gradient: bool, order: Orders = IN_PLACE,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of q, k, v and, if asked for, of a relative bias' table, from those of out and lse.

    out, lse: of exact attention; None: computed again. They are where a forward has rounded its operands.
    """
    if order.moves:
        q, k, v = moved([q, k, v], order.of_all)
        of_out = [x for x in (grad, out) if x is not None]
        grad, *outs = moved(of_out, [order.queries] * len(of_out))
        grad_lse, lse = (x if x is None else take(x, order.queries, dim=2) for x in (grad_lse, lse))
        *found, d_table = run_backward(
            impl, grad, grad_lse, q, k, v, outs[0] if outs else None, lse, plan, scale, bias, table_gradient
        )  # fmt: skip
        d_q, d_k, d_v = moved(found, order.back.of_all)
        return d_q, d_k, d_v, d_table
    if impl == "auto":
        impl = fastest(q, k, v, plan, MODEL, bias)[0]
        if backward_reasons(impl, q, k, v, plan, bias):
            impl = PORTABLE
    elif reasons := backward_reasons(impl, q, k, v, plan, bias):
        raise UnsupportedError(refusal(impl, reasons, MODEL))
    if needs_lse(impl, q) and (out is None or lse is None):
        out, lse = run("auto", q, k, v, plan, scale, True, MODEL, bias)
    module = import_module(f".{BACKWARD[impl]}", __package__)
    return module.backward(grad, grad_lse, q, k, v, out, lse, plan, scale, bias, table_gradient)


def require_known(impl: str) -> None:
    if impl not in IMPLEMENTATIONS:
        raise ValueError(
            f"Unknown implementation {impl!r}. Choose 'auto' or one of {', '.join(IMPLEMENTATIONS)}."
        )


def refusal(impl: str, reasons: list[str], precision: Precision) -> str:
    lines = "\n".join(f"  - {reason}" for reason in reasons)
    what = "" if precision.is_model else f" with precision={str(precision)!r}"
    return (
        f"impl={impl!r}{what} cannot run here:\n{lines}\nUse impl='auto' to let visionfuse choose."
    )

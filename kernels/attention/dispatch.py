"""Which implementation runs, and in which way: as it is, with rounded operands, or emulated.

An implementation is a module with `unsupported(q, k, v, plan)`, which lists every reason against, and
`forward(q, k, v, plan, scale, return_lse)`. Of precisions it need know nothing: those in `quantized.NATIVE`
have a kernel for rounded operands as well, all others get rounded numbers (`quantize.emulate`).
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from ..plan.block_plan import BlockPlan
from .precision import Precision

IMPLEMENTATIONS = ("reference", "blocks", "flex", "triton", "gluon_sm90")
_MODULES = {"triton": "triton_forward"}
# From the fastest to the slowest.
ON_GPU = ("gluon_sm90", "triton")
PORTABLE = "blocks"


class UnsupportedError(ValueError):
    """A named implementation cannot run these inputs here; the message lists every reason."""


def implementation(name: str) -> ModuleType:
    """The module of an implementation, imported on first use."""
    return import_module(f".{_MODULES.get(name, name)}", __package__)


def is_emulated(impl: str, precision: Precision) -> bool:
    """Whether `impl` rounds the inputs and multiplies them in full precision, which saves no time."""
    return not precision.is_model and impl not in ON_GPU


def unsupported_reasons(
    impl: str, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, precision: Precision
) -> list[str]:
    """Every reason why `impl` cannot run these inputs in this precision; empty if it can."""
    require_known(impl)
    try:
        module = implementation(impl)
    except ImportError as error:
        return [f"it does not import here: {error}"]
    if precision.is_model:
        return module.unsupported(q, k, v, plan)
    if is_emulated(impl, precision):
        from . import quantize

        return quantize.unsupported(module, q, k, v, plan, precision)
    from . import quantized

    return quantized.unsupported(impl, q, k, v, plan, precision)


def fastest(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, precision: Precision
) -> tuple[str, list[str]]:
    """The fastest implementation that can run these inputs, and why no faster one can."""
    if not q.is_cuda:
        return PORTABLE, [
            f"{name}: runs on GPUs, the tensors are on {q.device.type!r}" for name in ON_GPU
        ]
    reasons = []
    for name in ON_GPU:
        refused = unsupported_reasons(name, q, k, v, plan, precision)
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
) -> tuple[Tensor, Tensor | None]:
    """out (B, S_q, H, D) in q's dtype and lse (B, H, S_q) fp32 or None.

    Raises UnsupportedError, with all reasons, where a named implementation cannot run.
    """
    if impl == "auto":
        impl = fastest(q, k, v, plan, precision)[0]
    if reasons := unsupported_reasons(impl, q, k, v, plan, precision):
        raise UnsupportedError(refusal(impl, reasons, precision))
    module = implementation(impl)
    if precision.is_model:
        return module.forward(q, k, v, plan, scale, return_lse)
    if is_emulated(impl, precision):
        from . import quantize

        dtype = torch.float64 if impl == "reference" or q.dtype == torch.float64 else torch.float32
        return quantize.emulate(module, q, k, v, plan, scale, return_lse, precision, dtype=dtype)
    from . import quantized

    return quantized.forward(impl, q, k, v, plan, scale, return_lse, precision)


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

"""Linear layers of KANs with switch activations: validate, choose an implementation, call it."""

from __future__ import annotations

from torch import Tensor

from ..rational.api import UnsupportedError
from .ops import IMPLEMENTATIONS, check, rswaf_linear_op


def rswaf_linear(
    x: Tensor,
    weight: Tensor,
    low: float = -2.0,
    high: float = 2.0,
    width: float = 0.33,
    *,
    impl: str = "auto",
) -> Tensor:
    """y_o = sum over channels c and centres i of weight[o, c * count + i] * phi_i(x_c).

    phi_i(x) = 1 - tanh((x - g_i) / width)^2, `count` centres g_i evenly from low to high: the reflectional
    switch activation of FasterKAN (Delis, 2024), which MedViTV2 uses (Manzari et al., arXiv 2502.13693). The
    basis, count times as large as x, is computed where it is multiplied and never written.

    x: (..., channels), floating. weight: (outputs, channels * count). The result (..., outputs), like the
    products, has the dtype of the weight (sums are in float32), under autocast that of autocast.
    impl: "auto" takes Triton on a GPU and plain PyTorch, some rows at a time, elsewhere; "reference" is the
    formula. A name raises UnsupportedError, with all reasons, where it cannot run.

    Centres and width are numbers, not trained. Gradients are sums in a fixed order: equal inputs, equal bits.
    """
    if impl != "auto" and (reasons := unsupported_reasons(impl, x, weight)):
        lines = "\n".join(f"  - {reason}" for reason in reasons)
        raise UnsupportedError(
            f"impl={impl!r} cannot run here:\n{lines}\nUse impl='auto' to let visionfuse choose."
        )
    if impl == "reference":
        from . import reference

        check(x, weight, low, high, width)
        return reference.forward(x, weight, low, high, width)
    return rswaf_linear_op(x, weight, low, high, width, impl)


def unsupported_reasons(impl: str, x: Tensor, weight: Tensor) -> list[str]:
    """Every reason why `impl` cannot run on these; empty if it can."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(
            f"Unknown implementation {impl!r}. Choose 'auto' or one of {', '.join(IMPLEMENTATIONS)}."
        )
    if impl != "triton":
        return []
    try:
        from . import triton_rswaf
    except ImportError as error:
        return [f"it does not import here: {error}"]
    return triton_rswaf.unsupported(x, weight)

"""Rational activations of KANs: validate, choose an implementation, call it."""

from __future__ import annotations

import torch
from torch import Tensor

from .ops import IMPLEMENTATIONS, check, rational_op

NOISE = 0.1  # version "D" in training: coefficients of the numerator times 0.9 ... 1.1


class UnsupportedError(ValueError):
    """A named implementation cannot run these inputs here; the message lists every reason."""


def rational(
    x: Tensor,
    numerator: Tensor,
    denominator: Tensor,
    version: str = "A",
    *,
    channel_dim: int = -1,
    out_dtype: torch.dtype | None = None,
    training: bool = False,
    impl: str = "auto",
) -> Tensor:
    """P(x) / Q(x), elementwise, with coefficients for every group of channels.

    P(x) = a_0 + a_1 x + ... + a_m x^m, and with sums over i from 1 to n
    version "A":  Q = 1 + sum |b_i| |x|^i       of GR-KAN (Yang & Wang, arXiv 2409.10594) and its checkpoints
    version "B":  Q = 1 + |sum b_i x^i|         safe Padé units (Molina et al., arXiv 1907.06732)
    version "C":  Q = 0.1 + |sum b_i x^(i-1)|
    version "D":  as B; with `training` every a_i is multiplied by noise from U(0.9, 1.1)

    x: any shape and any memory order (NCHW with channel_dim=1, channels last with -1); float16, bfloat16,
        float32 or float64. Arithmetic is in float32, in float64 for float64.
    numerator: (groups or 1, m + 1); denominator: (groups or 1, n); a single vector is shared by all. 1
        stands for coefficients that all groups share. Groups are equal runs of channels.
    out_dtype: of the result; x's by default, autocast's under autocast. Gradients have the dtype of what
        they are of.
    impl: "auto" takes Triton on a GPU and plain PyTorch elsewhere; a name raises UnsupportedError, with all
        reasons, where it cannot run.

    Derivatives of |v| at v = +0 are 1, at -0 they are -1: a denominator that starts at 0 does learn.
    Coefficient gradients are sums in a fixed order: equal inputs give equal bits.
    """
    numerator, denominator = torch.atleast_2d(numerator), torch.atleast_2d(denominator)
    if version == "D":
        version = "B"
        if training:
            noise = torch.empty_like(numerator).uniform_(1 - NOISE, 1 + NOISE)
            numerator = numerator * noise
    if impl != "auto":
        if reasons := unsupported_reasons(impl, x):
            lines = "\n".join(f"  - {reason}" for reason in reasons)
            raise UnsupportedError(
                f"impl={impl!r} cannot run here:\n{lines}\nUse impl='auto' to let visionfuse choose."
            )
        if impl == "reference":
            from . import reference

            check(x, numerator, denominator, version, channel_dim)
            out = reference.forward(x, numerator, denominator, version, channel_dim)
            return out.to(out_dtype or x.dtype)
    return rational_op(x, numerator, denominator, version, channel_dim, out_dtype, impl)


def implementations() -> tuple[str, ...]:
    """The names of all implementations, whether or not they run here."""
    return IMPLEMENTATIONS


def unsupported_reasons(impl: str, x: Tensor) -> list[str]:
    """Every reason why `impl` cannot run on x; empty if it can."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(
            f"Unknown implementation {impl!r}. Choose 'auto' or one of {', '.join(IMPLEMENTATIONS)}."
        )
    if impl != "triton":
        return []
    try:
        from . import triton_forward
    except ImportError as error:
        return [f"it does not import here: {error}"]
    return triton_forward.unsupported(x)

"""The rational activation as it is defined: plain PyTorch, any floating dtype, autograd for its gradients."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(
    x: Tensor, numerator: Tensor, denominator: Tensor, version: str = "A", channel_dim: int = -1
) -> Tensor:
    """P(x) / Q(x), see `api.rational`; in the dtype that x and the coefficients promote to.

    numerator: (groups or 1, m + 1). denominator: (groups or 1, n).
    """
    groups = max(numerator.shape[0], denominator.shape[0])
    grouped = x.movedim(channel_dim, -1).unflatten(-1, (groups, -1))  # [..., groups, channels]
    a, b = numerator.unsqueeze(1), denominator.unsqueeze(1)  # [groups or 1, 1, terms]
    p = _powers(grouped, a, first=0)
    if version == "A":
        q = 1 + _powers(magnitude(grouped), magnitude(b), first=1)
    elif version == "B":
        q = 1 + magnitude(_powers(grouped, b, first=1))
    elif version == "C":
        q = 0.1 + magnitude(_powers(grouped, b, first=0))
    else:
        raise ValueError(f"Unknown version {version!r}. Choose 'A', 'B' or 'C'.")
    return (p / q).flatten(-2).movedim(-1, channel_dim)


def magnitude(v: Tensor) -> Tensor:
    """|v| whose derivative is 1 at +0, so that a coefficient that starts at 0 can move; abs has 0 there."""
    return torch.where(torch.signbit(v), -v, v)


def _powers(x: Tensor, coefficients: Tensor, *, first: int) -> Tensor:
    """Sum of coefficients[..., i] * x ** (first + i)."""
    total = torch.zeros_like(x)
    for i, c in enumerate(coefficients.unbind(-1)):
        total = total + c * x ** (first + i)
    return total

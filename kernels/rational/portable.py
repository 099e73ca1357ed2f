"""The rational activation and its gradients by Horner's rule in plain PyTorch: CPU, MPS, anything."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

OFFSET = {"A": 1.0, "B": 1.0, "C": 0.1}


class Terms(NamedTuple):
    """P / Q and what its derivatives need: Q = D(u) or offset + |D(u)|.

    p, p_slope, d_slope: P, its derivative, that of D. u: what the powers of D are of. turn: +-1, the
    derivative of Q is turn * d_slope.
    """

    p: Tensor
    p_slope: Tensor
    q: Tensor
    d_slope: Tensor
    u: Tensor
    turn: Tensor


def forward(
    x: Tensor, numerator: Tensor, denominator: Tensor, version: str, channel_dim: int,
    out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    grouped, a, b = _grouped(x, numerator, denominator, channel_dim)
    p = _polynomial(grouped, a.unbind(-1))
    if version == "A":
        q = _polynomial(grouped.abs(), (torch.ones_like(b[..., 0]), *b.abs().unbind(-1)))
    else:
        q = _polynomial(grouped, _terms(b, version)).abs_().add_(OFFSET[version])
    return _like(p.div_(q), x, channel_dim, out_dtype)


def backward(
    grad: Tensor, x: Tensor, numerator: Tensor, denominator: Tensor, version: str, channel_dim: int,
    need_x: bool, need_coefficients: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of x, numerator and denominator; None where not needed."""
    grouped, a, b = _grouped(x, numerator, denominator, channel_dim)
    grad = _grouped(grad, numerator, denominator, channel_dim)[0]
    t = _evaluate(grouped, a, b, version)
    value = t.p / t.q
    r = grad / t.q
    dx = da = db = None
    if need_x:
        dx = _like(r * (t.p_slope - t.turn * t.d_slope * value), x, channel_dim, x.dtype)
    if need_coefficients:
        da = _moments(r, grouped, range(numerator.shape[-1]), numerator)
        first = 0 if version == "C" else 1
        orders = range(first, first + denominator.shape[-1])
        weight = r * value if version == "A" else r * value * t.turn
        db = -_moments(weight, t.u, orders, denominator)
        if version == "A":
            db = db * _sign(denominator)
        da, db = da.to(numerator.dtype), db.to(denominator.dtype)
    return dx, da, db


def _grouped(x: Tensor, numerator: Tensor, denominator: Tensor, channel_dim: int):
    """x [..., groups, channels] and coefficients [groups or 1, 1, terms], in float32 or float64."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    groups = max(numerator.shape[0], denominator.shape[0])
    grouped = x.movedim(channel_dim, -1).unflatten(-1, (groups, x.shape[channel_dim] // groups))
    return grouped.to(compute), numerator.to(compute)[:, None], denominator.to(compute)[:, None]


def _like(grouped: Tensor, x: Tensor, channel_dim: int, dtype: torch.dtype) -> Tensor:
    """Back from groups, in the memory order of x."""
    out = torch.empty_like(x, dtype=dtype)
    return out.copy_(grouped.flatten(-2).movedim(-1, channel_dim))


def _evaluate(x: Tensor, a: Tensor, b: Tensor, version: str) -> Terms:
    p, p_slope = _horner(x, a.unbind(-1))
    if version == "A":
        u = x.abs()
        q, d_slope = _horner(u, (torch.ones_like(b[..., 0]), *b.abs().unbind(-1)))
        return Terms(p, p_slope, q, d_slope, u, _sign(x))
    d, d_slope = _horner(x, _terms(b, version))
    return Terms(p, p_slope, OFFSET[version] + d.abs(), d_slope, x, _sign(d))


def _terms(b: Tensor, version: str) -> tuple[Tensor, ...]:
    return b.unbind(-1) if version == "C" else (torch.zeros_like(b[..., 0]), *b.unbind(-1))


def _sign(v: Tensor) -> Tensor:
    return torch.copysign(torch.ones_like(v), v)


def _polynomial(x: Tensor, coefficients: tuple[Tensor, ...]) -> Tensor:
    """Lowest coefficient first; a fresh tensor."""
    value = coefficients[-1].expand(x.shape).clone()
    for c in reversed(coefficients[:-1]):
        value.mul_(x).add_(c)
    return value


def _horner(x: Tensor, coefficients: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """The polynomial, lowest coefficient first, and its derivative; both are fresh tensors."""
    value = coefficients[-1].expand(x.shape).clone()
    slope = torch.zeros_like(x)
    for c in reversed(coefficients[:-1]):
        slope.mul_(x).add_(value)
        value.mul_(x).add_(c)
    return value, slope


def _moments(weight: Tensor, u: Tensor, orders: range, coefficients: Tensor) -> Tensor:
    """Sums of weight * u ** order over all elements that share a coefficient: (groups or 1, orders)."""
    over = [d for d in range(u.dim()) if d != u.dim() - 2]  # everything but the groups
    sums = [(weight * u**order).sum(over) for order in orders]
    stacked = torch.stack(sums, -1)  # [groups, orders]
    return stacked if coefficients.shape[0] == stacked.shape[0] else stacked.sum(0, keepdim=True)

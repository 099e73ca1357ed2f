"""Fit rationals of version A to known activations: `python -m visionfuse.kernels.rational.fit`.

Each fit starts from least squares at many denominators, by Levenberg and Marquardt's method, and then moves
weight to where the error is largest (Lawson 1961), which lowers the largest error. Everything is in float64
and from fixed seeds: the same table comes out on the same machine.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .coefficients import Fit

INTERVAL = (-3.0, 3.0)  # of the published tables: activations after a normalisation
DEGREES = (5, 4)
POINTS, STARTS, STEPS, ROUNDS = 1201, 24, 60, 120

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "mish": F.mish,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "squared_relu": lambda x: F.relu(x).square(),
    "elu": F.elu,
    "selu": F.selu,
    "hard_swish": F.hardswish,
    "hard_sigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softplus": F.softplus,
    "geglu": lambda x: x * F.gelu(x),
    "swishglu": lambda x: x * F.silu(x),
}


def fit(
    function: Callable[[Tensor], Tensor],
    *,
    interval: tuple[float, float] = INTERVAL,
    degrees: tuple[int, int] = DEGREES,
    seed: int = 0,
) -> Fit:
    """Coefficients whose largest error on the interval is small; `degrees` are m of P and n of Q."""
    low, high = interval
    spread = torch.cos(torch.linspace(math.pi, 0, POINTS, dtype=torch.float64))  # dense at the ends
    x = torch.cat(
        [(low + high) / 2 + (high - low) / 2 * spread, torch.zeros(1, dtype=torch.float64)]
    )
    y = function(x)
    # In units of the interval the powers are of one size, and the equations well conditioned.
    scale = max(abs(low), abs(high))
    z = x / scale
    generator = torch.Generator().manual_seed(seed)
    best: tuple[float, Tensor, Tensor] | None = None
    for start in range(STARTS):
        b = torch.rand(degrees[1], generator=generator, dtype=torch.float64) * 4.0 ** (start % 4)
        if start % 2:
            b[::2] = 0.0  # even denominators: of functions that are smooth at 0
        even = bool(start % 2)
        found = _minimax(z, y, degrees[0], b, even)
        if best is None or found[0] < best[0]:
            best = found
    assert best is not None
    error, a, b = best
    a, b = (
        c * scale ** -torch.arange(first, first + len(c), dtype=torch.float64)
        for c, first in ((a, 0), (b, 1))
    )
    return Fit(
        numerator=tuple(a.tolist()), denominator=tuple(b.tolist()), max_error=error, gain=gain(function)
    )  # fmt: skip


def gain(function: Callable[[Tensor], Tensor]) -> float:
    """1 / E[f(x)^2] for x from N(0, 1)."""
    x = torch.linspace(-12, 12, 48001, dtype=torch.float64)
    density = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
    return 1 / torch.trapezoid(function(x).square() * density, x).item()


def _minimax(
    z: Tensor, y: Tensor, m: int, b: Tensor, even: bool
) -> tuple[float, Tensor, Tensor]:  # fmt: skip
    """(largest error, numerator, denominator) by reweighted least squares from this denominator on."""
    weight = torch.ones_like(z)
    best = (math.inf, torch.zeros(m + 1, dtype=z.dtype), b)
    for _ in range(ROUNDS):
        a, b, error = _least_squares(z, y, weight, m, b, even, STEPS if _ == 0 else 6)
        largest = error.abs().max().item()
        if not math.isfinite(largest):
            break
        if largest < best[0]:
            best = (largest, a, b)
        elif _ > 0 and largest > 4 * best[0]:
            break
        weight = weight * (error.abs() / max(largest, 1e-300) + 1e-3).sqrt()
        weight = weight / weight.mean()
    return best


def _least_squares(
    z: Tensor, y: Tensor, weight: Tensor, m: int, b: Tensor, even: bool, steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Levenberg-Marquardt over the denominator; the best numerator for it is a linear problem."""
    powers = torch.stack([z**i for i in range(m + 1)], -1)  # [points, m + 1]
    moduli = torch.stack([z.abs() ** j for j in range(1, len(b) + 1)], -1)
    free = torch.arange(len(b)) % 2 == 1 if even else torch.ones(len(b), dtype=torch.bool)

    def at(b: Tensor):
        q = 1 + moduli @ b.abs()
        basis = weight[:, None] * powers / q[:, None]
        orthogonal, triangle = torch.linalg.qr(basis)
        a = torch.linalg.solve_triangular(
            triangle, (orthogonal.mT @ (weight * y))[:, None], upper=True
        )[:, 0]
        return a, q, orthogonal, weight * (powers @ a / q - y)

    a, q, orthogonal, residual = at(b)
    cost, damping = residual.square().sum(), 1e-3
    for _ in range(steps):
        # The derivative by b outside of what the numerator can follow (Kaufman 1975).
        slope = (
            -(weight * (powers @ a) / q.square())[:, None] * moduli * torch.where(b < 0, -1.0, 1.0)
        )
        slope = (slope - orthogonal @ (orthogonal.mT @ slope))[:, free]
        normal = slope.mT @ slope
        for _ in range(8):
            step = torch.zeros_like(b)
            damped = normal + damping * (normal.diagonal() + 1e-14).diag()
            step[free] = torch.linalg.solve(damped, -slope.mT @ residual)
            trial = at(b + step)
            new = trial[3].square().sum()
            if new < cost:
                break
            damping *= 8
        else:
            break
        gained = (cost - new) / cost
        (a, q, orthogonal, residual), b, cost = trial, b + step, new
        damping = max(damping / 10, 1e-12)
        if gained < 1e-9:
            break
    return a, b.abs(), powers @ a / q - y


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("init.json"))
    parser.add_argument("names", nargs="*", help="activations, all by default")
    arguments = parser.parse_args()
    rows = {}
    if arguments.names and arguments.out.is_file():
        rows = json.loads(arguments.out.read_text(encoding="utf-8"))["functions"]
    for name in arguments.names or FUNCTIONS:
        found = Fit(numerator=(0, 1, 0, 0, 0, 0), denominator=(0, 0, 0, 0), max_error=0.0, gain=1.0)
        if name != "identity":
            found = fit(FUNCTIONS[name])
        print(f"{name}: largest error {found.max_error:.2e}, gain {found.gain:.5f}")
        rows[name] = {
            "numerator": found.numerator, "denominator": found.denominator,
            "max_error": float(f"{found.max_error:.3g}"), "gain": round(found.gain, 6),
        }  # fmt: skip
    table = {"version": "A", "interval": INTERVAL, "functions": rows}
    arguments.out.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

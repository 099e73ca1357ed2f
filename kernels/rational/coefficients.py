"""Coefficients that imitate known activations, from `init.json`, which `fit` writes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A rational of version A in place of an activation f.

    max_error: of |P/Q - f| on the interval of the fit. gain: 1 / E[f(x)^2] for x from N(0, 1); weights from
    N(0, gain / fan_in) after the activation keep the variance (Yang & Wang, arXiv 2409.10594, section 4.4).
    """

    numerator: tuple[float, ...]
    denominator: tuple[float, ...]
    max_error: float
    gain: float


@cache
def table() -> dict[str, Fit]:
    """All fits by the name of the activation."""
    text = files(__package__).joinpath("init.json").read_text(encoding="utf-8")
    return {
        name: Fit(
            numerator=tuple(row["numerator"]), denominator=tuple(row["denominator"]),
            max_error=row["max_error"], gain=row["gain"],
        )
        for name, row in json.loads(text)["functions"].items()
    }  # fmt: skip


def coefficients(name: str) -> Fit:
    """The fit to an activation, by its name in lower case: "gelu", "silu", "relu", ..."""
    fits = table()
    if name not in fits:
        raise ValueError(f"No coefficients for {name!r}. Choose one of {', '.join(fits)}.")
    return fits[name]

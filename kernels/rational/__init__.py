"""Rational activations: one op, several implementations, coefficients that imitate known activations."""

from .api import UnsupportedError, implementations, rational, unsupported_reasons
from .coefficients import Fit, coefficients

__all__ = [
    "Fit",
    "UnsupportedError",
    "coefficients",
    "implementations",
    "rational",
    "unsupported_reasons",
]

"""Block-sparse attention: one op, several implementations."""

from .api import (
    UnsupportedError,
    block_sparse_attention,
    implementations,
    select_implementation,
    unsupported_reasons,
)
from .precision import Precision

__all__ = [
    "Precision",
    "UnsupportedError",
    "block_sparse_attention",
    "implementations",
    "select_implementation",
    "unsupported_reasons",
]

"""Block-sparse attention: one op, several implementations."""

from .api import (
    UnsupportedError,
    block_sparse_attention,
    implementations,
    select_implementation,
    unsupported_reasons,
)
from .bias import BlockBias, RelativeBias
from .precision import Precision

__all__ = [
    "BlockBias",
    "Precision",
    "RelativeBias",
    "UnsupportedError",
    "block_sparse_attention",
    "implementations",
    "select_implementation",
    "unsupported_reasons",
]

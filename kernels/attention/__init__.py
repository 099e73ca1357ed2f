"""Block-sparse attention: one op, several implementations."""

from .api import (
    UnsupportedError,
    block_sparse_attention,
    implementations,
    select_implementation,
    unsupported_reasons,
)

__all__ = [
    "UnsupportedError",
    "block_sparse_attention",
    "implementations",
    "select_implementation",
    "unsupported_reasons",
]

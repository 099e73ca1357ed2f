"""Block-sparse attention, forward and backward, in portable Triton: NVIDIA sm_80 and newer, AMD, the interpreter."""

from .backward_host import backward
from .host import (
    TRITON_EIGHT_BIT,
    forward,
    forward_quantized,
    unsupported,
    unsupported_quantized,
)

__all__ = [
    "TRITON_EIGHT_BIT",
    "backward",
    "forward",
    "forward_quantized",
    "unsupported",
    "unsupported_quantized",
]

"""Neighborhood attention for the diffusion video decoder of LTX-2, where diffusers takes FlexAttention or NATTEN.

    decoder.set_attn_processor(NeighborhoodProcessor())        # LTX2VideoDiffusionDecoderModel

FlexAttention's block mask takes 167 GiB at 69x64x96 tokens (diffusers' own figure), NATTEN's kernels come from
the Hub. Here the plan is built once per grid and window and takes what its lists take.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .api import neighborhood_attention


class NeighborhoodProcessor:
    """An attention processor for diffusers' `LTX2VideoVaeNeighborhoodAttention`.

    precision, impl: as in `neighborhood_attention`.
    """

    def __init__(self, precision: str = "model", impl: str = "auto") -> None:
        self.precision, self.impl = precision, impl

    def __call__(self, attn: Any, hidden_states: Tensor, block_mask: Any = None) -> Tensor:
        """hidden_states: (B, T, H, W, C), as the result. block_mask: diffusers passes None."""
        q, k, v = attn.project_qkv(hidden_states)  # (B, T, H, W, heads, D), q scaled already
        out = neighborhood_attention(
            q, k, v, tuple(attn.kernel_size), scale=1.0, precision=self.precision, impl=self.impl
        )
        return attn.to_out[0](out.flatten(-2))

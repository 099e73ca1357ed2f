"""Stable Diffusion 3 and 3.5: joint attention over one image grid, then text; 3.5 medium has further layers
over the image alone."""

from __future__ import annotations

from ..kernels.plan import Segment, TokenLayout
from . import SITES, Arguments, Model, Site
from .order import patch_grid


def layout(model: Model, arguments: Arguments, memo: dict) -> TokenLayout:
    patch = model.config.patch_size
    grid = patch_grid(arguments["hidden_states"], (patch, patch))
    text = arguments["encoder_hidden_states"].shape[1]
    return TokenLayout.joint(text=text, grids=[grid], text_first=False)


def levels(model: Model, layout: TokenLayout) -> tuple[TokenLayout, ...]:
    alone = any(block.attn2 is not None for block in model.transformer_blocks)
    return (TokenLayout((Segment("grid", layout.segments[0].shape),)),) if alone else ()


SITES["SD3Transformer2DModel"] = Site(
    grid_axes=2,
    grid_name="rows, columns",
    layers=lambda model: [
        attention
        for block in model.transformer_blocks
        for attention in (block.attn, block.attn2)
        if attention is not None
    ],
    others="IP-Adapter and ControlNet attention",
    layout=layout,
    levels=levels,
    row_only=lambda model: (
        "positions are added inside the model, where the image is cut into patches"
    ),
)

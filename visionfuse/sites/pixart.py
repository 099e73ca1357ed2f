"""PixArt-alpha and Sigma: self-attention over one image grid; text meets it in cross attention."""

from __future__ import annotations

from ..kernels.plan import TokenLayout
from . import SITES, Arguments, Model, Site
from .order import patch_grid


def layout(model: Model, arguments: Arguments, memo: dict) -> TokenLayout:
    patch = model.config.patch_size
    return TokenLayout.joint(grids=[patch_grid(arguments["hidden_states"], (patch, patch))])


SITES["PixArtTransformer2DModel"] = Site(
    grid_axes=2,
    grid_name="rows, columns",
    layers=lambda model: [block.attn1 for block in model.transformer_blocks],
    others="cross attention to the text",
    layout=layout,
    row_only=lambda model: (
        "positions are added inside the model, where the image is cut into patches"
    ),
)

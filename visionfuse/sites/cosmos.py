"""Cosmos 1, 2 and 2.5: self-attention over one video grid; text meets it in cross attention."""

from __future__ import annotations

from ..kernels.plan import TokenLayout
from . import SITES, Arguments, Model, Site
from .order import patch_grid


def layout(model: Model, arguments: Arguments, memo: dict) -> TokenLayout:
    return TokenLayout.joint(
        grids=[patch_grid(arguments["hidden_states"], model.config.patch_size)]
    )


SITES["CosmosTransformer3DModel"] = Site(
    grid_axes=3,
    grid_name="frames, rows, columns",
    layers=lambda model: [block.attn1 for block in model.transformer_blocks],
    others="cross attention to the text",
    layout=layout,
    row_only=lambda model: (
        "positions are added between the layers, and time steps may go by frames"
    ),
)

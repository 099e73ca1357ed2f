"""SkyReels-V2: Wan's layers; with diffusion forcing every frame has a time step of its own."""

from __future__ import annotations

from ..kernels.plan import TokenLayout
from . import SITES, Arguments, Model, Site
from .order import patch_grid


def layout(model: Model, arguments: Arguments, memo: dict) -> TokenLayout:
    return TokenLayout.joint(
        grids=[patch_grid(arguments["hidden_states"], model.config.patch_size)]
    )


SITES["SkyReelsV2Transformer3DModel"] = Site(
    grid_axes=3,
    grid_name="frames, rows, columns",
    layers=lambda model: [block.attn1 for block in model.blocks],
    others="cross attention to the text",
    layout=layout,
    row_only=lambda model: "time steps and causal masks go by frames",
)

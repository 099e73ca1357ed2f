"""Stable Diffusion 1.5, 2 and XL: a UNet whose levels attend at several resolutions, text by cross attention."""

from __future__ import annotations

from typing import Any

from ..kernels.plan import TokenLayout
from . import SITES, Arguments, Model, Site, Unsupported

WIDEST = 128  # channels of a head; the last levels of SD 1.5 have 160, which few kernels take


def layers(model: Model) -> list[Any]:
    """`attn1` of every transformer block, as they run: down, middle, up."""
    stages = (*model.down_blocks, *([model.mid_block] if model.mid_block else ()), *model.up_blocks)
    blocks = (module for stage in stages for module in stage.modules())
    return [
        block.attn1
        for block in blocks
        if type(block).__name__ == "BasicTransformerBlock"
        and not block.only_cross_attention
        and _head_dim(block.attn1) <= WIDEST
    ]


def _head_dim(attention: Any) -> int:
    return attention.inner_dim // attention.heads


def layout(model: Model, arguments: Arguments, memo: dict) -> TokenLayout | Unsupported:
    grid, down = tuple(arguments["sample"].shape[-2:]), model.down_blocks
    for stage in down:
        if getattr(stage, "has_cross_attention", False):
            return TokenLayout.joint(grids=[grid])
        grid = _halved(grid) if stage.downsamplers else grid
    return Unsupported("no attention on the way down")


def levels(model: Model, layout: TokenLayout) -> tuple[TokenLayout, ...]:
    """Grids after every downsampling: convolutions with stride 2 round up."""
    grid, found, started = layout.segments[0].shape, [], False
    for stage in model.down_blocks:
        started = started or getattr(stage, "has_cross_attention", False)
        if started and stage.downsamplers:
            grid = _halved(grid)
            found.append(TokenLayout.joint(grids=[grid]))
    return tuple(found)


def _halved(grid: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(-(-n // 2) for n in grid)


SITES["UNet2DConditionModel"] = Site(
    grid_axes=2,
    grid_name="rows, columns",
    layers=layers,
    others=f"cross attention to the text, and heads of more than {WIDEST} channels",
    head_dim=lambda model: max(map(_head_dim, layers(model)), default=WIDEST),
    layout=layout,
    levels=levels,
    tokens=lambda arguments: arguments["sample"],
    row_only=lambda model: "convolutions between the layers need the rows of the image",
)

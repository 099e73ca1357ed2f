"""LTX-Video and LTX-2: self-attention over one video grid, whose sizes are arguments; text meets it in cross
attention, and so does the sound of LTX-2."""

from __future__ import annotations

from math import prod

from torch import Tensor

from ..kernels.plan import TokenLayout
from . import SITES, Arguments, Model, Site
from .order import map_output, rope_in_order, set_rope, take

SIZES = ("num_frames", "height", "width")


def layout(model: Model, arguments: Arguments, memo: dict) -> TokenLayout:
    sizes, tokens = [arguments.get(name) for name in SIZES], arguments["hidden_states"].shape[1]
    grid = tuple(int(n) for n in sizes if n is not None)
    if len(grid) < len(SIZES) or prod(grid) != tokens:
        # Frames that condition the video stand before it, named by coordinates: no grid, like text.
        return TokenLayout.joint(text=tokens, grids=[])
    return TokenLayout.joint(grids=[grid])


def permute(model: Model, arguments: Arguments, order: Tensor, memo: dict) -> Arguments:
    tokens = arguments["hidden_states"]
    names = (*SIZES, "rope_interpolation_scale", "video_coords")
    given = {name: arguments.get(name) for name in names}
    tables = lambda: tuple(take(x, 1, order) for x in model.rope.rope(tokens, **given))
    set_rope(memo, order, None, tables)
    arguments = {**arguments, "hidden_states": take(tokens, 1, order)}
    if arguments["timestep"].ndim == 2 and arguments["timestep"].shape[1] == len(order):
        arguments["timestep"] = take(arguments["timestep"], 1, order)  # one per token
    return arguments


SITES["LTXVideoTransformer3DModel"] = Site(
    grid_axes=3,
    grid_name="frames, rows, columns",
    layers=lambda model: [block.attn1 for block in model.transformer_blocks],
    others="cross attention to the text",
    layout=layout,
    permute=permute,
    restore=lambda model, output, inverse: map_output(output, lambda x: take(x, 1, inverse)),
    inside=rope_in_order("rope"),
)


SITES["LTX2VideoTransformer3DModel"] = Site(
    grid_axes=3,
    grid_name="frames, rows, columns",
    layers=lambda model: [block.attn1 for block in model.transformer_blocks],
    others="attention of the sound, and cross attention between sound, video and text",
    layout=layout,
    row_only=lambda model: "time steps and positions go by tokens in many places",
)

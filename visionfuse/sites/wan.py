"""Wan 2.1, 2.2 and VACE: self-attention over one video grid of patches; text meets it in cross attention.

VACE runs blocks over a control video of the same size first."""

from __future__ import annotations

from torch import Tensor

from ..kernels.plan import TokenLayout
from . import SITES, Arguments, Deferral, Model, Site, Unsupported
from .order import map_output, patch_grid, permute_patches, rope_in_order, set_rope, take


def layout(model: Model, arguments: Arguments, memo: dict) -> TokenLayout | Unsupported:
    grid = patch_grid(arguments["hidden_states"], model.config.patch_size)
    control = arguments.get("control_hidden_states")
    if control is not None and patch_grid(control, model.config.patch_size) != grid:
        return Unsupported("the control video has another size")
    return TokenLayout.joint(grids=[grid])


def permute(model: Model, arguments: Arguments, order: Tensor, memo: dict) -> Arguments:
    latent = arguments["hidden_states"]
    tables = lambda: tuple(take(x, 1, order).to(latent.device) for x in model.rope.rope(latent))
    set_rope(memo, order, None, tables)
    arguments = dict(arguments)
    for name in ("hidden_states", "control_hidden_states"):
        if arguments.get(name) is not None:
            arguments[name] = permute_patches(arguments[name], model.config.patch_size, order)
    if arguments["timestep"].ndim == 2:  # Wan 2.2 TI2V has a time step per token
        arguments["timestep"] = take(arguments["timestep"], 1, order)
    return arguments


def restore(model: Model, output, inverse: Tensor):
    return map_output(output, lambda x: permute_patches(x, model.config.patch_size, inverse))


SITES["WanTransformer3DModel"] = SITES["WanVACETransformer3DModel"] = Site(
    grid_axes=3,
    grid_name="frames, rows, columns",
    layers=lambda model: [
        block.attn1 for block in (*getattr(model, "vace_blocks", ()), *model.blocks)
    ],
    others="cross attention to the text",
    layout=layout,
    permute=permute,
    restore=restore,
    inside=rope_in_order("rope"),
    deferrals={"WanAttnProcessor": Deferral("rotary_emb", across_heads=True)},
)

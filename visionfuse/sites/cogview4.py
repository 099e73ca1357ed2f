"""CogView4: joint attention over text, then one image grid."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..kernels.plan import TokenLayout
from . import SITES, Arguments, Model, Site
from .order import map_output, patch_grid, permute_patches, rope_in_order, set_rope, take


def _patch(model: Model) -> tuple[int, int]:
    return (model.config.patch_size, model.config.patch_size)


def layout(model: Model, arguments: Arguments, memo: dict) -> TokenLayout:
    grid = patch_grid(arguments["hidden_states"], _patch(model))
    return TokenLayout.joint(text=arguments["encoder_hidden_states"].shape[1], grids=[grid])


def permute(model: Model, arguments: Arguments, order: Tensor, memo: dict) -> Arguments:
    arguments, latent = dict(arguments), arguments["hidden_states"]
    if arguments.get("image_rotary_emb") is not None:
        arguments["image_rotary_emb"] = tuple(
            take(x, 0, order) for x in arguments["image_rotary_emb"]
        )
    tables = lambda: tuple(take(x, 0, order) for x in model.rope.rope(latent))
    set_rope(memo, order, None, tables)
    arguments["hidden_states"] = permute_patches(latent, _patch(model), order)
    return arguments


def restore(model: Model, output: Any, inverse: Tensor) -> Any:
    return map_output(output, lambda x: permute_patches(x, _patch(model), inverse))


SITES["CogView4Transformer2DModel"] = Site(
    grid_axes=2,
    grid_name="rows, columns",
    layers=lambda model: [block.attn1 for block in model.transformer_blocks],
    others="nothing",
    layout=layout,
    permute=permute,
    restore=restore,
    inside=rope_in_order("rope"),
)

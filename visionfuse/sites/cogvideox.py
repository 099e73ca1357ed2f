"""CogVideoX 1.0 and 1.5: joint attention over text, then one video grid."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..kernels.plan import TokenLayout
from . import SITES, Arguments, Model, Site
from .order import map_output, patch_grid, permute_patches, take


def _patch(model: Model) -> tuple[int, int, int]:
    size = model.config.patch_size
    return (model.config.patch_size_t or 1, size, size)


def _permuted(model: Model, x: Tensor, order: Tensor) -> Tensor:
    """x (B, F, C, H, W): frames come before channels."""
    return permute_patches(x.transpose(1, 2), _patch(model), order).transpose(1, 2)


def layout(model: Model, arguments: Arguments, memo: dict) -> TokenLayout:
    grid = patch_grid(arguments["hidden_states"].transpose(1, 2), _patch(model))
    return TokenLayout.joint(text=arguments["encoder_hidden_states"].shape[1], grids=[grid])


def permute(model: Model, arguments: Arguments, order: Tensor, memo: dict) -> Arguments:
    return {
        **arguments,
        "hidden_states": _permuted(model, arguments["hidden_states"], order),
        "image_rotary_emb": tuple(take(x, 0, order) for x in arguments["image_rotary_emb"]),
    }


def restore(model: Model, output: Any, inverse: Tensor) -> Any:
    return map_output(output, lambda x: _permuted(model, x, inverse))


def row_only(model: Model) -> str:
    embed = model.patch_embed
    added = embed.use_positional_embeddings or embed.use_learned_positional_embeddings
    return (
        "positions are added inside the model, where the video is cut into patches" if added else ""
    )


SITES["CogVideoXTransformer3DModel"] = Site(
    grid_axes=3,
    grid_name="frames, rows, columns",
    layers=lambda model: [block.attn1 for block in model.transformer_blocks],
    others="nothing",
    layout=layout,
    row_only=row_only,
    permute=permute,
    restore=restore,
)

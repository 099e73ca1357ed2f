"""HunyuanVideo 1.0 and 1.5: joint attention over one video grid, then text, of which the padding comes last."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.plan import TokenLayout
from ..kernels.plan.keys import KeyRanges
from . import SITES, Arguments, Deferral, Model, Site, once
from .order import map_output, patch_grid, permute_patches, rope_in_order, set_rope, take


def _patch(model: Model) -> tuple[int, int, int]:
    size = model.config.patch_size
    return (model.config.patch_size_t, size, size)


def layout(model: Model, arguments: Arguments, memo: dict) -> TokenLayout:
    names = ("encoder_hidden_states", "encoder_hidden_states_2", "image_embeds")
    text = sum(arguments[name].shape[1] for name in names if arguments.get(name) is not None)
    grid = patch_grid(arguments["hidden_states"], _patch(model))
    return TokenLayout.joint(text=text, grids=[grid], text_first=False)


def keys(model: Model, arguments: Arguments, memo: dict) -> KeyRanges | None:
    """The model sorts the text of version 1.5 itself: what is valid comes first there, too."""
    valid = [0] * len(arguments["hidden_states"])
    for name in ("encoder_attention_mask", "encoder_attention_mask_2"):
        if arguments.get(name) is not None:
            counts = once(memo, arguments[name], lambda mask: mask.bool().sum(1).tolist())
            valid = [a + b for a, b in zip(valid, counts, strict=True)]
    image = arguments.get("image_embeds")
    if image is not None and once(memo, image, lambda x: bool(torch.any(x != 0))):
        valid = [n + image.shape[1] for n in valid]
    whole = layout(model, arguments, memo)
    grid = whole.segments[0].length
    if all(grid + n == whole.length for n in valid):
        return None
    return tuple(((0, grid + n),) for n in valid)


def permute(model: Model, arguments: Arguments, order: Tensor, memo: dict) -> Arguments:
    latent = arguments["hidden_states"]
    set_rope(
        memo, order, None, lambda: tuple(take(table, 0, order) for table in model.rope.rope(latent))
    )
    return {**arguments, "hidden_states": permute_patches(latent, _patch(model), order)}


def restore(model: Model, output: Any, inverse: Tensor) -> Any:
    return map_output(output, lambda x: permute_patches(x, _patch(model), inverse))


def row_only(model: Model) -> str:
    replaced = getattr(model.config, "image_condition_type", None) == "token_replace"
    return "the tokens of the first frame must stay first (token_replace)" if replaced else ""


def all_tables(rotary: tuple[Tensor, Tensor], text: Tensor | None) -> tuple[Tensor, Tensor]:
    """Text, behind the video, is not rotated."""
    rest = (0, 0, 0, 0 if text is None else text.shape[1])
    cos, sin = rotary
    return F.pad(cos, rest, value=1.0), F.pad(sin, rest)


SITES["HunyuanVideoTransformer3DModel"] = SITES["HunyuanVideo15Transformer3DModel"] = Site(
    grid_axes=3,
    grid_name="frames, rows, columns",
    layers=lambda model: [
        block.attn
        for block in (*model.transformer_blocks, *getattr(model, "single_transformer_blocks", ()))
    ],
    others="the refiner of the text",
    layout=layout,
    keys=keys,
    row_only=row_only,
    permute=permute,
    restore=restore,
    inside=rope_in_order("rope"),
    deferrals=dict.fromkeys(
        ("HunyuanVideoAttnProcessor2_0", "HunyuanVideo15AttnProcessor2_0"),
        Deferral("image_rotary_emb", all_tables),
    ),
)

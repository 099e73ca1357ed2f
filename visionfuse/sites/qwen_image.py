"""Qwen-Image, Edit and Layered: text, which may be padded, then one or more image grids, named by `img_shapes`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.plan import TokenLayout
from ..kernels.plan.keys import KeyRanges, key_ranges
from . import SITES, Arguments, Deferral, Model, Site, Unsupported, once
from .order import map_output, rope_in_order, set_rope, take


def layout(model: Model, arguments: Arguments, memo: dict) -> TokenLayout | Unsupported:
    shapes = arguments.get("img_shapes")
    shapes = shapes[0] if shapes and isinstance(shapes[0], list) else (shapes or [])[:1]
    if not shapes or any(frames != 1 for frames, _, _ in shapes):
        return Unsupported(f"img_shapes name no images: {arguments.get('img_shapes')}")
    grids = [(height, width) for _, height, width in shapes]
    return TokenLayout.joint(text=arguments["encoder_hidden_states"].shape[1], grids=grids)


def keys(model: Model, arguments: Arguments, memo: dict) -> KeyRanges | None:
    mask = arguments.get("encoder_hidden_states_mask")
    text = None if mask is None else once(memo, mask, key_ranges)
    if mask is None or text is None:
        return None
    start = mask.shape[1]
    images = (start, start + arguments["hidden_states"].shape[1])
    return tuple((*row, images) for row in text)


def permute(model: Model, arguments: Arguments, order: Tensor, memo: dict) -> Arguments:
    tokens, text = arguments["hidden_states"], arguments["encoder_hidden_states"].shape[1]

    def tables():
        images, words = model.pos_embed.rope(
            arguments["img_shapes"], max_txt_seq_len=text, device=tokens.device
        )
        return take(images, 0, order), words

    set_rope(memo, order, text, tables)
    arguments = {**arguments, "hidden_states": take(tokens, 1, order)}
    if arguments.get("controlnet_block_samples") is not None:
        arguments["controlnet_block_samples"] = [
            take(x, 1, order) for x in arguments["controlnet_block_samples"]
        ]
    return arguments


def all_tables(rotary: tuple[Tensor, Tensor], text: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of complex numbers, one for a pair of channels, of images and of text, which stands first."""
    images, words = rotary
    pairs = torch.view_as_real(torch.cat((words, images))).repeat_interleave(2, 1)
    return pairs[..., 0], pairs[..., 1]


SITES["QwenImageTransformer2DModel"] = Site(
    grid_axes=2,
    grid_name="rows, columns",
    layers=lambda model: [block.attn for block in model.transformer_blocks],
    others="ControlNet attention",
    layout=layout,
    keys=keys,
    permute=permute,
    restore=lambda model, output, inverse: map_output(output, lambda x: take(x, 1, inverse)),
    inside=rope_in_order("pos_embed"),
    deferrals={
        "QwenDoubleStreamAttnProcessor2_0": Deferral("image_rotary_emb", all_tables),
    },
)

"""HunyuanImage 2.1: joint attention over one image grid, then text: with a second text what is valid comes
first, otherwise as the mask says."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..kernels.plan import TokenLayout
from ..kernels.plan.keys import KeyRanges, key_ranges
from . import SITES, Arguments, Model, Site, Unsupported, once
from .order import map_output, patch_grid, permute_patches, rope_in_order, set_rope, take

SECOND = ("encoder_hidden_states_2", "encoder_attention_mask_2")


def layout(model: Model, arguments: Arguments, memo: dict) -> TokenLayout | Unsupported:
    patch = tuple(model.config.patch_size)
    if arguments["hidden_states"].ndim != 4 or len(patch) != 2:
        return Unsupported("frames, as the refiner has them")
    grid = patch_grid(arguments["hidden_states"], patch)
    text = arguments["encoder_hidden_states"].shape[1]
    if _second(model, arguments):
        text += arguments[SECOND[0]].shape[1]
    return TokenLayout.joint(text=text, grids=[grid], text_first=False)


def _second(model: Model, arguments: Arguments) -> bool:
    return model.context_embedder_2 is not None and arguments.get(SECOND[0]) is not None


def keys(model: Model, arguments: Arguments, memo: dict) -> KeyRanges | None:
    whole, mask = layout(model, arguments, memo), arguments["encoder_attention_mask"]
    assert isinstance(whole, TokenLayout)
    grid = whole.segments[0].length
    if not _second(model, arguments):
        text = once(memo, mask, key_ranges)
        if text is None:
            return None
        return tuple(((0, grid), *((a + grid, b + grid) for a, b in row)) for row in text)
    counts = [
        once(memo, m, lambda m: m.bool().sum(1).tolist()) for m in (mask, arguments[SECOND[1]])
    ]
    ends = [grid + a + b for a, b in zip(*counts, strict=True)]
    return None if set(ends) == {whole.length} else tuple(((0, end),) for end in ends)


def permute(model: Model, arguments: Arguments, order: Tensor, memo: dict) -> Arguments:
    latent = arguments["hidden_states"]
    tables = lambda: tuple(take(table, 0, order) for table in model.rope.rope(latent))
    set_rope(memo, order, None, tables)
    moved = permute_patches(latent, tuple(model.config.patch_size), order)
    return {**arguments, "hidden_states": moved}


def restore(model: Model, output: Any, inverse: Tensor) -> Any:
    patch = tuple(model.config.patch_size)
    return map_output(output, lambda x: permute_patches(x, patch, inverse))


SITES["HunyuanImageTransformer2DModel"] = Site(
    grid_axes=2,
    grid_name="rows, columns",
    layers=lambda model: [
        block.attn for block in (*model.transformer_blocks, *model.single_transformer_blocks)
    ],
    others="the refiner of the text",
    layout=layout,
    keys=keys,
    permute=permute,
    restore=restore,
    inside=rope_in_order("rope"),
)

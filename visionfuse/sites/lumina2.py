"""Lumina Image 2: joint attention over text, as long as it really is, then one image grid."""

from __future__ import annotations

from ..kernels.plan import TokenLayout
from ..kernels.plan.keys import KeyRanges
from . import SITES, Arguments, Model, Site, once
from .order import patch_grid


def _lengths(arguments: Arguments, memo: dict) -> list[int]:
    return once(memo, arguments["encoder_attention_mask"], lambda mask: mask.sum(1).tolist())


def layout(model: Model, arguments: Arguments, memo: dict) -> TokenLayout:
    patch, lengths = model.config.patch_size, _lengths(arguments, memo)
    grid = patch_grid(arguments["hidden_states"], (patch, patch))
    if len(set(lengths)) > 1:  # the grid lies elsewhere in every sequence of the batch
        return TokenLayout.joint(text=max(lengths) + grid[0] * grid[1], grids=[])
    return TokenLayout.joint(text=lengths[0], grids=[grid])


def keys(model: Model, arguments: Arguments, memo: dict) -> KeyRanges | None:
    lengths = _lengths(arguments, memo)
    if len(set(lengths)) == 1:
        return None
    image = layout(model, arguments, memo).length - max(lengths)
    return tuple(((0, n + image),) for n in lengths)


SITES["Lumina2Transformer2DModel"] = Site(
    grid_axes=2,
    grid_name="rows, columns",
    layers=lambda model: [block.attn for block in model.layers],
    others="the refiners of image and text, two layers each",
    head_dim=lambda model: model.config.hidden_size // model.config.num_attention_heads,
    layout=layout,
    keys=keys,
    row_only=lambda model: (
        "positions are made inside the model, where the image is cut into patches"
    ),
)

"""Z-Image: one image grid, filled up to a multiple of 32 tokens, then text, filled up likewise; the shorter
sequences of a batch are padded at their end."""

from __future__ import annotations

from torch import Tensor

from ..kernels.plan import Segment, TokenLayout
from ..kernels.plan.keys import KeyRanges
from . import SITES, Arguments, Model, Site, Unsupported

FILLED = 32  # SEQ_MULTI_OF of the model; what fills up is learned and attended like text


def layout(model: Model, arguments: Arguments, memo: dict) -> TokenLayout | Unsupported:
    images, lengths = arguments["x"], _lengths(arguments)
    if lengths is None:
        return Unsupported("several images in one sequence (Omni)")
    if len({image.shape for image in images}) > 1:
        return Unsupported("the images of the batch differ in size")
    _, frames, rows, columns = images[0].shape
    patch, patch_t = arguments.get("patch_size", 2), arguments.get("f_patch_size", 1)
    if frames != patch_t:
        return Unsupported(f"{frames} frames, where images have {patch_t}")
    grid = (rows // patch, columns // patch)
    rest = max(lengths) - grid[0] * grid[1]
    return TokenLayout((Segment("grid", grid), Segment("text", (rest,))))


def _lengths(arguments: Arguments) -> list[int] | None:
    """Tokens of every batch entry without the padding of the batch, from shapes alone; None for Omni."""
    images = arguments["x"]
    if isinstance(images[0], list):
        return None
    patch, patch_t = arguments.get("patch_size", 2), arguments.get("f_patch_size", 1)
    filled = lambda n: -(-n // FILLED) * FILLED
    return [
        filled((f // patch_t) * (h // patch) * (w // patch)) + filled(len(text))
        for (_, f, h, w), text in zip(
            (x.shape for x in images), arguments["cap_feats"], strict=True
        )
    ]


def keys(model: Model, arguments: Arguments, memo: dict) -> KeyRanges | None:
    lengths = _lengths(arguments)
    if lengths is None or len(set(lengths)) == 1:
        return None
    return tuple(((0, n),) for n in lengths)


def tokens(arguments: Arguments) -> Tensor:
    first = arguments["x"][0]
    return first[-1] if isinstance(first, list) else first


SITES["ZImageTransformer2DModel"] = Site(
    grid_axes=2,
    grid_name="rows, columns",
    layers=lambda model: [block.attention for block in model.layers],
    others="the refiners of image and text, two layers each",
    head_dim=lambda model: model.config.dim // model.config.n_heads,
    layout=layout,
    keys=keys,
    tokens=tokens,
    row_only=lambda model: (
        "positions are made inside the model, where the images are cut into patches"
    ),
)

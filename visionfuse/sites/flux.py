"""FLUX.1 and FLUX.2: joint attention over text, then one or more image grids, named by `img_ids` (image, row,
column; FLUX.2 adds a number for text, which is 0 here).

Kontext and FLUX.2 append reference images as further grids; Fill and Control add channels, Redux adds text.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.plan import TokenLayout
from . import SITES, Arguments, Deferral, Model, Site, Unsupported, once
from .order import map_output, take

MAX_GRIDS = 16
GUIDED = "_visionfuse_guidance"  # of a model that carries a small image (`visionfuse.scale_dit`)
RESIDUALS = ("controlnet_block_samples", "controlnet_single_block_samples")


def layout(model: Model, arguments: Arguments, memo: dict) -> TokenLayout | Unsupported:
    if (arguments.get("joint_attention_kwargs") or {}).get("attention_mask") is not None:
        return Unsupported("an attention mask was given in joint_attention_kwargs")
    if arguments.get("kv_cache_mode") is not None:
        return Unsupported("reference images from a cache of keys and values")
    ids, tokens = arguments.get("img_ids"), arguments["hidden_states"].shape[1]
    if (stream := vars(model).get(GUIDED)) is not None and stream.guidance.image_tokens == tokens:
        return stream.layout(arguments["encoder_hidden_states"].shape[1])
    if ids is None:
        return Unsupported("there are no img_ids")
    grids = once(memo, ids, parse_ids)
    if isinstance(grids, Unsupported):
        return grids
    if sum(h * w for h, w in grids) != tokens:
        return Unsupported(f"img_ids name {grids} tokens, but there are {tokens} image tokens")
    return TokenLayout.joint(text=arguments["encoder_hidden_states"].shape[1], grids=grids)


def parse_ids(ids: Tensor) -> list[tuple[int, int]] | Unsupported:
    """The row-major grids (rows, columns) that ids [S, 3 or 4] count out exactly, one after the other.

    Raises ValueError for NaN and infinite ids.
    """
    ids = (ids[0] if ids.ndim == 3 else ids).detach().to("cpu", torch.float64)
    if ids.ndim != 2 or ids.shape[1] not in (3, 4) or not len(ids):
        return Unsupported(f"img_ids have the shape {tuple(ids.shape)} instead of (tokens, 3 or 4)")
    if not bool(ids.isfinite().all()):
        bad = int((~ids.isfinite()).any(1).sum())
        raise ValueError(
            f"img_ids of {bad} of {len(ids)} image tokens are NaN or infinite. "
            "Pass the ids of pipe._prepare_latent_image_ids, or none at all."
        )
    next_column = torch.tensor([0.0, 0.0, 1.0, 0.0], dtype=ids.dtype)[: ids.shape[1]]
    next_row = next_column.roll(-1)
    in_row = (ids.diff(dim=0) == next_column).all(1)
    starts = torch.cat([torch.tensor([True]), ~in_row]).nonzero()[:, 0]
    widths = torch.cat([starts, torch.tensor([len(ids)])]).diff()
    first = ids[starts]  # [rows, 3]
    below = (first.diff(dim=0) == next_row).all(1)
    below &= widths.diff() == 0
    tops = torch.cat([torch.tensor([True]), ~below]).nonzero()[:, 0]
    heights = torch.cat([tops, torch.tensor([len(starts)])]).diff()
    grids = list(zip(heights.tolist(), widths[tops].tolist(), strict=True))
    if len(grids) > MAX_GRIDS:
        wide = " (bfloat16 holds whole numbers only up to 256)" if float(ids.max()) >= 256 else ""
        return Unsupported(f"img_ids do not count out a grid of rows and columns{wide}")
    return grids


def permute(model: Model, arguments: Arguments, order: Tensor, memo: dict) -> Arguments:
    arguments = dict(arguments)
    arguments["hidden_states"] = take(arguments["hidden_states"], 1, order)
    arguments["img_ids"] = take(arguments["img_ids"], -2, order)
    for name in RESIDUALS:
        if arguments.get(name) is not None:
            arguments[name] = [take(x, 1, order) for x in arguments[name]]
    return arguments


def restore(model: Model, output, inverse: Tensor):
    return map_output(output, lambda x: take(x, 1, inverse))


SITES["FluxTransformer2DModel"] = SITES["Flux2Transformer2DModel"] = Site(
    grid_axes=2,
    grid_name="rows, columns",
    layers=lambda model: [
        block.attn for block in (*model.transformer_blocks, *model.single_transformer_blocks)
    ],
    others="IP-Adapter and ControlNet attention",
    layout=layout,
    permute=permute,
    restore=restore,
    deferrals=dict.fromkeys(
        ("FluxAttnProcessor", "Flux2AttnProcessor", "Flux2ParallelSelfAttnProcessor"),
        Deferral("image_rotary_emb"),
    ),
)

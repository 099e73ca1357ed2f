"""FLUX.1: joint attention over text, then one or more image grids, named by `img_ids` (image, row, column).

Kontext appends reference images as further grids; Fill and Control add channels, Redux adds text.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.plan import TokenLayout
from . import SITES, Arguments, Model, Site, Unsupported, map_output, take

MAX_GRIDS = 16
RESIDUALS = ("controlnet_block_samples", "controlnet_single_block_samples")


def layout(model: Model, arguments: Arguments, memo: dict) -> TokenLayout | Unsupported:
    if (arguments.get("joint_attention_kwargs") or {}).get("attention_mask") is not None:
        return Unsupported("an attention mask was given in joint_attention_kwargs")
    ids, tokens = arguments.get("img_ids"), arguments["hidden_states"].shape[1]
    if ids is None:
        return Unsupported("there are no img_ids")
    # Reading ids waits for the GPU: once per pipeline call. The memo holds the tensor itself, since
    # the address of a freed one may belong to the ids of another resolution.
    if memo.get("ids") is not ids:
        memo["ids"], memo["grids"] = ids, parse_ids(ids)
    grids = memo["grids"]
    if isinstance(grids, Unsupported):
        return grids
    if sum(h * w for h, w in grids) != tokens:
        return Unsupported(f"img_ids name {grids} tokens, but there are {tokens} image tokens")
    return TokenLayout.joint(text=arguments["encoder_hidden_states"].shape[1], grids=grids)


def parse_ids(ids: Tensor) -> list[tuple[int, int]] | Unsupported:
    """The row-major grids (rows, columns) that ids [S, 3] count out exactly, one after the other.

    Raises ValueError for NaN and infinite ids.
    """
    ids = (ids[0] if ids.ndim == 3 else ids).detach().to("cpu", torch.float64)
    if ids.ndim != 2 or ids.shape[1] != 3 or not len(ids):
        return Unsupported(f"img_ids have the shape {tuple(ids.shape)} instead of (tokens, 3)")
    if not bool(ids.isfinite().all()):
        bad = int((~ids.isfinite()).any(1).sum())
        raise ValueError(
            f"img_ids of {bad} of {len(ids)} image tokens are NaN or infinite. "
            "Pass the ids of pipe._prepare_latent_image_ids, or none at all."
        )
    step = ids.diff(dim=0)
    in_row = (step == torch.tensor([0.0, 0.0, 1.0], dtype=ids.dtype)).all(1)
    starts = torch.cat([torch.tensor([True]), ~in_row]).nonzero()[:, 0]
    widths = torch.cat([starts, torch.tensor([len(ids)])]).diff()
    first = ids[starts]  # [rows, 3]
    below = (first.diff(dim=0) == torch.tensor([0.0, 1.0, 0.0], dtype=ids.dtype)).all(1)
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


SITES["FluxTransformer2DModel"] = Site(
    grid_axes=2,
    grid_name="rows, columns",
    layers=lambda model: [
        block.attn for block in (*model.transformer_blocks, *model.single_transformer_blocks)
    ],
    others="IP-Adapter and ControlNet attention",
    head_dim=lambda model: model.config.attention_head_dim,
    layout=layout,
    permute=permute,
    restore=restore,
)

"""Wan 2.1 and 2.2: self-attention over one video grid of patches; text meets it in cross attention."""

from __future__ import annotations

from contextlib import ExitStack

from torch import Tensor, nn

from ..context import ACTIVE
from ..kernels.plan import TokenLayout
from . import SITES, Arguments, Model, Site, map_output, take


def layout(model: Model, arguments: Arguments, memo: dict) -> TokenLayout:
    return TokenLayout.joint(grids=[_grid(arguments["hidden_states"], model.config.patch_size)])


def permute(model: Model, arguments: Arguments, order: Tensor, memo: dict) -> Arguments:
    # The rotary tables depend on the grid alone: once per order, and outside of compiled graphs.
    if memo.get("order") is not order:
        latent = arguments["hidden_states"]
        tables = (take(table, 1, order).to(latent.device) for table in model.rope.rope(latent))
        memo["order"], memo["rope"] = order, tuple(tables)
    ACTIVE.rope = memo["rope"]
    # The patch embedding is a convolution whose stride is its kernel, so permuting patches of the
    # latent permutes tokens, and the latent has 64 numbers a token where the model has thousands.
    arguments = dict(arguments)
    arguments["hidden_states"] = permute_patches(
        arguments["hidden_states"], model.config.patch_size, order
    )
    if arguments["timestep"].ndim == 2:  # Wan 2.2 TI2V has a time step per token
        arguments["timestep"] = take(arguments["timestep"], 1, order)
    return arguments


def restore(model: Model, output, inverse: Tensor):
    return map_output(output, lambda x: permute_patches(x, model.config.patch_size, inverse))


def inside(model: Model, stack: ExitStack) -> None:
    stack.callback(setattr, model, "rope", model.rope)
    model.rope = OrderedRope(model.rope)


class OrderedRope(nn.Module):
    """Rotary tables (1, S, 1, D) that follow their tokens; the model's own when nothing moved.

    A module and not a hook, because compiled graphs are guarded by the types of submodules but not
    by hooks: a graph of the stock model would run on permuted tokens with tables that are not.
    """

    def __init__(self, rope: nn.Module):
        super().__init__()
        self.rope = rope

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, ...]:
        return self.rope(hidden_states) if ACTIVE.rope is None else ACTIVE.rope


def _grid(latent: Tensor, patch: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n // p for n, p in zip(latent.shape[2:], patch, strict=True))


def permute_patches(x: Tensor, patch: tuple[int, ...], order: Tensor) -> Tensor:
    """x (B, C, F, H, W) with its patches, counted row-major, in `order`. Incomplete patches are cut."""
    (b, c), (t, h, w), (pt, ph, pw) = x.shape[:2], _grid(x, patch), patch
    x = x[:, :, : t * pt, : h * ph, : w * pw].reshape(b, c, t, pt, h, ph, w, pw)
    tokens = take(x.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(b, t * h * w, -1), 1, order)
    x = tokens.reshape(b, t, h, w, c, pt, ph, pw).permute(0, 4, 1, 5, 2, 6, 3, 7)
    return x.reshape(b, c, t * pt, h * ph, w * pw)


SITES["WanTransformer3DModel"] = Site(
    grid_axes=3,
    grid_name="frames, rows, columns",
    layers=lambda model: [block.attn1 for block in model.blocks],
    others="cross attention to the text",
    head_dim=lambda model: model.config.attention_head_dim,
    layout=layout,
    permute=permute,
    restore=restore,
    inside=inside,
)

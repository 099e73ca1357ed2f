"""Vision transformers of timm with a recipe; `enable` and `disable` take pipelines as well.

    model = timm.create_model("vit_large_patch16_dinov3", pretrained=True, dynamic_img_size=True)
    visionfuse.enable(model, "sage")              # every pair, rounded
    visionfuse.enable(model, "gna", window=24)    # neighborhoods on the grid of patches
    visionfuse.disable(model)

The attention modules of the blocks are routed (see `routing`) until `disable`: all ways through a model, its
training, checkpointing and torch.compile stay as they are. Class and register tokens see everything and are
seen by everything. A denoising schedule has no meaning here; dense_layers do.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import index
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import patching, routing
from .kernels.plan import Dense, Local, Neighborhood, TileWindow
from .neighborhood import neighborhood_attention
from .recipe import Recipe
from .sage import sage_attention

if TYPE_CHECKING:
    from .reporting import Report

STEPS = ("dense_start", "dense_steps", "min_steps")
SUPPORTED = ("VisionTransformer", "Eva", "NaFlexVit")
_KEY = "_visionfuse"


def enable(
    model: Any, recipe: str | Recipe = "auto", *, impl: str = "auto", **options: Any
) -> None:
    """Run the attention of a timm model or of a diffusers pipeline by a recipe.

    model: a `VisionTransformer`, `Eva` (DINOv3 too) or `NaFlexVit` of timm, or a pipeline, for which this is
        `enable_visionfuse`.
    recipe: "auto", "dense", "sage" or "gna" with its options, or a `Recipe`. "auto" leaves a timm model as it
        is: no exact kernel is known to be faster at its lengths.
    impl: the attention implementation, "auto" or a name of `visionfuse.kernels.attention`.

    Calling it again replaces the recipe. Copies and pickles of an enabled timm model run its own attention.
    Raises ValueError or TypeError, without any change, for models, recipes and options that cannot work.
    """
    if not isinstance(model, nn.Module):
        return patching.enable_visionfuse(model, recipe, impl=impl, **options)
    if steps := [name for name in STEPS if name in options]:
        raise ValueError(
            f"{', '.join(steps)} name steps of a denoising run, which {type(model).__name__} has not. Use "
            "dense_layers= to keep layers dense."
        )
    recipe = patching.resolve(recipe, options)
    patching.check_implementation(impl)
    layers = _check(model, recipe, impl)
    disable(model)
    object.__setattr__(model, _KEY, Enabled(model, recipe, impl, layers))


def disable(model: Any) -> None:
    """Undo `enable`: the model or pipeline is exactly as before. Harmless if it was not enabled."""
    if not isinstance(model, nn.Module):
        return patching.disable_visionfuse(model)
    enabled = vars(model).pop(_KEY, None)
    if enabled is not None:
        enabled.undo()


def report(model: nn.Module) -> Report:
    """What `enable` does to a timm model: layers, grids so far, and what ran its own attention and why.

    `visionfuse.report` comes here. Raises TypeError for other modules.
    """
    from .reporting import Report, describe_variant

    if not _is_known(model):
        patching.get(model)  # tells what is expected
    enabled, name = vars(model).get(_KEY), type(model).__name__
    if enabled is None:
        summary = "visionfuse is not enabled; call visionfuse.enable(model)"
        return Report(pipeline=name, recipe=None, summary=summary)
    recipe = enabled.recipe
    parts = [f"recipe {recipe.name!r}: {describe_variant(recipe.plan, recipe.precision)}"]
    if not enabled.layers:
        parts = [f"recipe {recipe.name!r}: the model's own attention, exact and unchanged"]
    else:
        parts.append(f"{len(enabled.layers)} layers follow it")
        grids = ", ".join(f"{rows}x{columns}" for rows, columns in enabled.grids.values())
        parts.append(f"grids so far: {grids or 'none'}; {enabled.prefix} class and register tokens")
    parts += [f"own attention: {reason} ({count}x)" for reason, count in enabled.notes.items()]
    return Report(pipeline=name, recipe=recipe, summary="; ".join(parts))


def _is_known(model: Any) -> bool:
    return bool({cls.__name__ for cls in type(model).__mro__}.intersection(SUPPORTED))


def _check(model: nn.Module, recipe: Recipe, impl: str) -> list[nn.Module]:
    """The attention modules to route."""
    if not _is_known(model):
        raise ValueError(
            f"{type(model).__name__} is not supported: of timm's models {', '.join(SUPPORTED)} are. Others attend "
            "in windows, with tables of biases or between pooled tokens (Swin, BEiT, MViT), where there is "
            "little to gain. Of diffusers pass the pipeline, not its transformer."
        )
    if recipe.schedule.phases:
        raise ValueError(
            "The recipe has phases of a denoising run; a vision transformer has no steps."
        )
    if isinstance(recipe.plan, Local | TileWindow):
        raise ValueError(
            "Tile windows and local attention are for denoisers; for a vision transformer choose 'gna' or 'sage'."
        )
    if not recipe.changes_numbers and impl == "auto":
        return []
    layers = [getattr(block, "attn", block) for block in model.blocks]  # pyright: ignore
    reasons = list(dict.fromkeys(filter(None, map(routing.refusal, layers))))
    if reasons:
        raise ValueError(f"{type(model).__name__} cannot be routed: {'; '.join(reasons)}.")
    local = isinstance(recipe.plan, Neighborhood)
    dropped = getattr(getattr(model, "patch_drop", None), "prob", 0)
    if local and dropped:
        raise ValueError(
            f"Patches are dropped (patch_drop_rate={dropped}), which leaves no grid for a neighborhood."
        )
    dense = set(recipe.schedule.layers(len(layers)))
    return [layer for i, layer in enumerate(layers) if i not in dense]


class Enabled:
    """What an enabled model carries.

    grids: rows and columns of the forwards so far, by their number of patches.
    notes: reasons why a call ran the model's own attention, with counts (in a compiled graph: of traces).
    """

    def __init__(self, model: Any, recipe: Recipe, impl: str, layers: list[nn.Module]):
        self.model, self.recipe, self.impl, self.layers = model, recipe, impl, layers
        self.precision = str(recipe.precision)
        self.prefix = int(model.num_prefix_tokens)
        self.grids: dict[int, tuple[int, int]] = {}
        self.notes: dict[str, int] = {}
        self.hook = None
        if not layers:
            return
        sdpa = _sdpa(self.everywhere if isinstance(recipe.plan, Dense) else self.nearby)
        subclasses = {cls: routing.rebound(cls, sdpa) for cls in set(map(type, layers))}
        for layer in layers:
            routing.become(layer, subclasses.__getitem__)
        patches = model.patch_embed if hasattr(model, "patch_embed") else model.embeds
        self.hook = patches.register_forward_pre_hook(self.see)
        if hasattr(model, "_forward_embeds"):  # NaFlexVit
            self.own_embeds = model._forward_embeds
            model._forward_embeds = self.embeds

    def undo(self) -> None:
        for layer in self.layers:
            routing.restore(layer)
        if self.hook is not None:
            self.hook.remove()
        vars(self.model).pop("_forward_embeds", None)

    def see(self, patches: Any, inputs: tuple) -> None:
        """The grid of this forward, from the size of its images."""
        if inputs and inputs[0].ndim == 4:
            rows, columns = map(index, patches.dynamic_feat_size(inputs[0].shape[-2:]))
            known = self.grids.get(rows * columns)
            if (
                known not in (None, (rows, columns))
                and self.checkpointing
                and torch.is_grad_enabled()
            ):
                raise ValueError(
                    f"Grids {known} and {(rows, columns)} have as many patches: when checkpoints are computed again "
                    "nobody could tell them apart. Turn off grad_checkpointing, or use crops of one shape."
                )
            self.grids[rows * columns] = (rows, columns)

    @property
    def checkpointing(self) -> bool:
        return bool(getattr(self.model, "grad_checkpointing", False))

    def embeds(self, x: Any, patch_coord: Any, patch_valid: Any, attn_mask: Any) -> dict[str, Any]:
        """NaFlexVit's own, but padding is told by keys, (B, 1, 1, S), instead of by pairs."""
        out = self.own_embeds(
            x, patch_coord=patch_coord, patch_valid=patch_valid, attn_mask=attn_mask
        )
        if attn_mask is None and out["patch_valid"] is not None:
            valid = F.pad(out["patch_valid"].bool(), (self.prefix, 0), value=True)
            out["attn_mask"] = valid[:, None, None, :]
        return out

    def everywhere(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale) -> Any:
        if mask is not None and mask.dtype != torch.bool:
            return self.note("an attention mask of numbers was given")
        return sage_attention(
            q, k, v, sm_scale=scale, attn_mask=mask, precision=self.precision, impl=self.impl
        )

    def nearby(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale) -> Any:
        if mask is not None:
            return self.note("an attention mask was given, padding for example")
        grid = self.grids.get(index(q.shape[-2]) - self.prefix)
        if grid is None:
            return self.note("patches without a grid (NaFlex), or fewer than a grid has")
        rule = self.on_grid(grid)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, S, H, D)
        (q, more_q), (k, more_k), (v, more_v) = (
            (x[:, self.prefix :].unflatten(1, grid), x[:, : self.prefix]) for x in (q, k, v)
        )
        extra = {"extra_kv": (more_k, more_v), "extra_q": more_q} if self.prefix else {}
        out = neighborhood_attention(
            q, k, v, *rule, scale=scale, precision=self.precision, impl=self.impl, **extra
        )
        if self.prefix:
            out = torch.cat([out[1], out[0].flatten(1, 2)], 1)
        else:
            out = out.flatten(1, 2)
        return out.transpose(1, 2)

    @torch.compiler.assume_constant_result
    def on_grid(self, grid: tuple[int, int]) -> tuple[tuple, ...]:
        """window, stride, dilation and causal of the recipe on this grid."""
        rule: Any = self.recipe.plan
        found = rule.resolve(grid)
        return found.window, found.stride, found.dilation, found.causal

    @torch.compiler.assume_constant_result
    def note(self, reason: str) -> None:
        self.notes[reason] = self.notes.get(reason, 0) + 1


def _sdpa(attend: Callable[..., Any]) -> Callable[..., Tensor]:
    """A function as F.scaled_dot_product_attention that asks `attend` first, where it can."""

    def scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=None,
        dropout_p=0.0,
        is_causal=False,
        scale=None,
        enable_gqa=False,
    ):
        if not dropout_p and not is_causal and query.shape[-2] == key.shape[-2]:
            out = attend(query, key, value, attn_mask, scale)
            if out is not None:
                return out
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )

    return scaled_dot_product_attention

"""enable_visionfuse and disable_visionfuse: check everything, then change, then undo exactly.

What changes: an entry `_visionfuse` in the pipeline's own `__dict__`, and a wrapper around `__call__`
of its class that does nothing for pipelines without that entry, and goes when the last one is
disabled. Models and processors are only touched while an enabled pipeline runs (see `session`).
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch

from .exact import has_faster_kernels
from .kernels.attention import implementations
from .kernels.plan import Neighborhood
from .recipe import Recipe
from .recipes import build
from .session import Ran, Session, refusal, refusals
from .sites import SITES, Denoiser, denoisers

_KEY = "_visionfuse"


class Enabled:
    """What an enabled pipeline carries. Pickles and copies with it, without the record of its runs."""

    def __init__(self, pipe: Any, recipe: Recipe, impl: str):
        self.recipe, self.impl, self.pipe_class = recipe, impl, type(pipe)
        self._start()

    def _start(self) -> None:
        self.ran: dict[str, Ran] = {}
        _ENABLED.add(self)
        _wrap_call(self.pipe_class)
        # A pipeline may also be dropped without disable_visionfuse.
        weakref.finalize(self, _unwrap_call, self.pipe_class).atexit = False

    def __getstate__(self) -> dict:
        return {"recipe": self.recipe.to_dict(), "impl": self.impl, "pipe_class": self.pipe_class}

    def __setstate__(self, state: dict) -> None:
        self.recipe, self.impl = Recipe.from_dict(state["recipe"]), state["impl"]
        self.pipe_class = state["pipe_class"]
        self._start()

    @property
    def changes_attention(self) -> bool:
        """False where the model's own attention is the answer: an exact plan in the model's precision, no
        named implementation, and no GPU for which a faster exact kernel is known."""
        return self.recipe.changes_numbers or self.impl != "auto" or has_faster_kernels()


def enable_visionfuse(
    pipe: Any, recipe: str | Recipe = "auto", *, impl: str = "auto", **options
) -> None:
    """Run the denoisers of this pipeline by a recipe from its next call on.

    recipe: a name ("auto", "dense", "gna", "sage") with its options, or a `Recipe`. "auto" never drops a
        token and never changes a linear layer.
    impl: the attention implementation, "auto" or a name of `visionfuse.kernels.attention`.
    options: of the named recipe, for example window, density, stride, dense_steps, precision.

    Only this object changes; another pipeline of the same class stays as it is, even where it shares
    the transformer. Calling it again replaces the recipe. Raises ValueError or TypeError, without any
    change, where the recipe, an option or the implementation cannot work.
    """
    before = get(pipe)
    recipe = resolve(recipe, options)
    _check_pipe(pipe, recipe, impl)
    vars(pipe)[_KEY] = Enabled(pipe, recipe, impl)
    if before is not None:
        _ENABLED.discard(before)


def disable_visionfuse(pipe: Any) -> None:
    """Undo `enable_visionfuse`: the pipeline is exactly as before. Harmless if it was not enabled."""
    enabled = get(pipe)
    if enabled is not None:
        del vars(pipe)[_KEY]
        _ENABLED.discard(enabled)
        _unwrap_call(type(pipe))


def get(pipe: Any) -> Enabled | None:
    """The record of an enabled pipeline, None for any other."""
    if not hasattr(pipe, "components") or not hasattr(pipe, "__dict__"):
        raise TypeError(
            f"Expected a diffusers pipeline, got {type(pipe).__name__}. "
            "Pass the pipeline itself, not its transformer."
        )
    return vars(pipe).get(_KEY)


def resolve(recipe: str | Recipe, options: dict) -> Recipe:
    if isinstance(recipe, str):
        return build(recipe, **options)
    if not isinstance(recipe, Recipe):
        raise TypeError(f"recipe must be a name or a Recipe, got {type(recipe).__name__}.")
    if options:
        raise TypeError(
            f"Options go with a recipe's name; a Recipe object already holds them, got "
            f"{', '.join(f'{k}={v!r}' for k, v in options.items())}. Use dataclasses.replace."
        )
    return recipe


def check_implementation(impl: str) -> None:
    if impl != "auto" and impl not in implementations():
        raise ValueError(
            f"Unknown implementation {impl!r}. Choose 'auto' or one of "
            f"{', '.join(implementations())}."
        )


def _check_pipe(pipe: Any, recipe: Recipe, impl: str) -> None:
    check_implementation(impl)
    found = list(denoisers(pipe))
    if not recipe.changes_numbers and impl == "auto":
        return
    if not found:
        models = sorted({type(m).__name__ for m in pipe.components.values()
                         if isinstance(m, torch.nn.Module)})  # fmt: skip
        raise ValueError(
            f"visionfuse knows no denoiser of {type(pipe).__name__}: it has "
            f"{', '.join(models) or 'no models'}, supported are {', '.join(SITES)}. "
            "Use enable_visionfuse() without a recipe, which keeps the model's own attention."
        )
    for denoiser in found:
        _check_denoiser(denoiser, recipe, impl)


def _check_denoiser(denoiser: Denoiser, recipe: Recipe, impl: str) -> None:
    """What can be known before the grid is."""
    site, model = denoiser.site, denoiser.model
    recipe.schedule.check_layers(len(site.layers(model)))
    where = f"{denoiser.name} ({type(model).__name__}) has a grid of {site.grid_axes} axes"
    tile = recipe.order.tile
    if tile is not None and len(tile) != site.grid_axes:
        raise ValueError(f"Order tile={tile} does not fit: {where} ({site.grid_name}).")
    for way in recipe.ways:
        if isinstance(way.plan, Neighborhood):
            _check_neighborhood(way.plan, site.grid_axes, f"{where} ({site.grid_name})")
    if impl != "auto":
        devices = {torch.device(p.device) for p in model.parameters()} or {torch.device("cpu")}
        devices = {d for d in devices if d.type != "meta"}
        if torch.cuda.is_available():
            devices.add(torch.device("cuda"))
        dtype = getattr(model, "dtype", torch.float32)
        for precision in {way.precision for way in recipe.ways}:
            reasons = {
                str(d): refusals(impl, d, dtype, site.head_dim(model), precision) for d in devices
            }
            if reasons and all(reasons.values()):
                raise ValueError(refusal(impl, reasons, precision))


def _check_neighborhood(plan: Neighborhood, axes: int, where: str) -> None:
    for name in ("window", "stride", "dilation", "causal"):
        value = getattr(plan, name)
        if isinstance(value, tuple) and len(value) != axes:
            raise ValueError(f"{name}={value} has {len(value)} values, but {where}.")

    def per_axis(value):
        return value if isinstance(value, tuple) else (value,) * axes

    # On the smallest grid that the window fits, only mistakes of the options themselves remain.
    grid = tuple(
        max((w or s or 1) * d, 1)
        for w, s, d in zip(
            per_axis(plan.window), per_axis(plan.stride), per_axis(plan.dilation), strict=True
        )
    )
    plan.resolve(grid)


# -- the wrapper around __call__ of a pipeline's class ---------------------------------------------

_ENABLED: weakref.WeakSet[Enabled] = weakref.WeakSet()


def _call_owner(cls: type) -> type:
    return next(c for c in cls.__mro__ if "__call__" in vars(c))


def _wrap_call(cls: type) -> None:
    owner = _call_owner(cls)
    original = vars(owner)["__call__"]
    if getattr(original, _KEY, False):
        return

    @functools.wraps(original)
    def __call__(self, *args, **kwargs):
        enabled = vars(self).get(_KEY)
        if enabled is None or not enabled.changes_attention:
            return original(self, *args, **kwargs)
        with Session(self, enabled.recipe, enabled.impl, enabled.ran):
            return original(self, *args, **kwargs)

    setattr(__call__, _KEY, True)
    owner.__call__ = __call__


def _unwrap_call(cls: type) -> None:
    owner = _call_owner(cls)
    wrapper = vars(owner)["__call__"]
    in_use = any(_call_owner(enabled.pipe_class) is owner for enabled in _ENABLED)
    if not in_use and vars(wrapper).get(_KEY):
        owner.__call__ = wrapper.__wrapped__

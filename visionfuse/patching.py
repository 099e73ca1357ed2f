"""enable_visionfuse and disable_visionfuse: check everything, then change, then undo exactly.

What changes: an entry `_visionfuse` in the pipeline's own `__dict__`, and a wrapper around `__call__`
of its class that does nothing for pipelines without that entry, and goes when the last one is
disabled. Models and processors are only touched while an enabled pipeline runs (see `session`), but
for what is asked of the whole model: rounded linear layers and compiled blocks stay until it is disabled.
"""

from __future__ import annotations

import functools
import weakref
from contextlib import ExitStack
from typing import Any

import torch

from .choice import refusal, refusals
from .compiled import Compiled, compile_blocks, room_for_graphs
from .exact import has_faster_kernels
from .kernels.attention import implementations
from .kernels.plan import Dense
from .linears import Linears, Rounded, round_linears
from .recipe import Recipe
from .recipes import build
from .session import Ran, Session
from .sites import SITES, Denoiser, denoisers

_KEY = "_visionfuse"


class Enabled:
    """What an enabled pipeline carries. Pickles and copies with it, without the record of its runs and without
    compiled graphs.

    linear, compile, fuse: what was asked for. rounded, compiled: what that changed in the denoisers themselves, by
        their names.
    """

    def __init__(
        self, pipe: Any, recipe: Recipe, impl: str, linear: Linears | None, compile: dict | None,
        fuse: bool | None = None,
    ):  # fmt: skip
        self.recipe, self.impl, self.pipe_class = recipe, impl, type(pipe)
        self.linear, self.compile, self.fuse = linear, compile, fuse
        self.rounded: dict[str, Rounded] = {}
        self.compiled: dict[str, Compiled] = {}
        self._start()

    def _start(self) -> None:
        self.ran: dict[str, Ran] = {}
        _ENABLED.add(self)
        _wrap_call(self.pipe_class)
        # A pipeline may also be dropped without disable_visionfuse.
        weakref.finalize(self, _unwrap_call, self.pipe_class).atexit = False

    def __getstate__(self) -> dict:
        return {
            "recipe": self.recipe.to_dict(),
            "impl": self.impl,
            "pipe_class": self.pipe_class,
            "linear": self.linear,
            "fuse": self.fuse,
            "rounded": self.rounded,
        }

    def __setstate__(self, state: dict) -> None:
        self.recipe, self.impl = Recipe.from_dict(state["recipe"]), state["impl"]
        self.pipe_class, self.linear, self.compile = state["pipe_class"], state["linear"], None
        self.fuse, self.rounded, self.compiled = state["fuse"], state["rounded"], {}
        self._start()

    def change_models(self, pipe: Any, before: Enabled | None) -> None:
        """As asked; what `before` did already for the same wishes stays."""
        if before is not None and (before.linear, before.compile) == (self.linear, self.compile):
            self.rounded, self.compiled = before.rounded, before.compiled
            before.rounded, before.compiled = {}, {}
        if before is not None:
            before.undo()
        for denoiser in denoisers(pipe):  # a compiled graph is of the weights as they then are
            if self.linear is not None and denoiser.name not in self.rounded:
                self.rounded[denoiser.name] = round_linears(denoiser, self.linear)
            if self.compile is not None and denoiser.name not in self.compiled:
                rounded = self.rounded.get(denoiser.name)
                self.compiled[denoiser.name] = compile_blocks(denoiser, self.compile, rounded)

    def undo(self) -> None:
        """The models are as they were."""
        for change in (*self.compiled.values(), *self.rounded.values()):
            change.undo()
        _ENABLED.discard(self)

    @property
    def changes_attention(self) -> bool:
        """False where the model's own attention is the answer: an exact plan in the model's precision, no
        named implementation, and no GPU for which a faster exact kernel is known."""
        return self.recipe.changes_numbers or self.impl != "auto" or has_faster_kernels()


def enable_visionfuse(
    pipe: Any,
    recipe: str | Recipe = "auto",
    *,
    impl: str = "auto",
    compile: bool | dict[str, Any] = False,
    linear: str | Linears | None = None,
    fuse: bool | None = None,
    **options,
) -> None:
    """Run the denoisers of this pipeline by a recipe from its next call on.

    recipe: a name ("auto", "dense", "gna", "sta", "fps", "sage") with its options, or a `Recipe`. "auto" never drops a
        token and never changes a linear layer.
    impl: the attention implementation, "auto" or a name of `visionfuse.kernels.attention`.
    compile: True to compile the repeated blocks, or options of torch.compile for that; see `compiled`.
    linear: "fp8" or "int8" to round large linear layers, or `Linears` to choose them; see `linears`. None: those of
        the recipe, if it names any.
    fuse: whether queries and keys are normed and rotated by the pass that rounds them, where processors are known; see
        `deferred`. None: where a kernel rounds them and it pays.
    options: of the named recipe, for example window, density, stride, dense_steps, precision.

    Only this object changes; another pipeline of the same class stays as it is, even where it shares the
    transformer, unless linear or compile change the transformer itself. Calling it again replaces
    everything; what linear and compile did stays where they are the same. Raises ValueError or TypeError, without any change, where the recipe, an option or the
    implementation cannot work. A linear layer or a block that cannot take part stays as it is; the report
    says why.
    """
    before = get(pipe)
    recipe = resolve(recipe, options)
    linears = Linears.of(recipe.linear if linear is None else linear)
    compile_options = {} if compile is True else compile or None
    _check_pipe(pipe, recipe, impl, whole=linears is not None or compile_options is not None)
    vars(pipe)[_KEY] = enabled = Enabled(pipe, recipe, impl, linears, compile_options, fuse)
    enabled.change_models(pipe, before)


def disable_visionfuse(pipe: Any) -> None:
    """Undo `enable_visionfuse`: the pipeline is exactly as before. Harmless if it was not enabled."""
    enabled = get(pipe)
    if enabled is not None:
        del vars(pipe)[_KEY]
        enabled.undo()
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


def _check_pipe(pipe: Any, recipe: Recipe, impl: str, *, whole: bool) -> None:
    """whole: more than attention is asked for."""
    check_implementation(impl)
    found = list(denoisers(pipe))
    if not recipe.changes_numbers and impl == "auto" and not whole:
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
        if not isinstance(way.plan, Dense):
            way.plan.check_axes(site.grid_axes, f"{where} ({site.grid_name})")
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
        if enabled is None:
            return original(self, *args, **kwargs)
        with ExitStack() as stack:
            if enabled.compiled:
                stack.enter_context(room_for_graphs())
            if enabled.changes_attention:
                session = Session(self, enabled.recipe, enabled.impl, enabled.ran, enabled.fuse)
                stack.enter_context(session)
            for compiled in enabled.compiled.values():
                stack.enter_context(compiled.during_call())
            return original(self, *args, **kwargs)

    setattr(__call__, _KEY, True)
    owner.__call__ = __call__


def _unwrap_call(cls: type) -> None:
    owner = _call_owner(cls)
    wrapper = vars(owner)["__call__"]
    in_use = any(_call_owner(enabled.pipe_class) is owner for enabled in _ENABLED)
    if not in_use and vars(wrapper).get(_KEY):
        owner.__call__ = wrapper.__wrapped__

"""Named recipes. A new one is a function with keyword options, registered under its name.

>>> build("gna", window=(80, 80), stride=(16, 16), dense_steps=9).plan.window
(80, 80)
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from dataclasses import replace

from . import presets
from .kernels.order import Order
from .kernels.order.curves import OrderKind
from .kernels.plan import Dense, Local, Neighborhood, TileWindow
from .recipe import Precision, Recipe, Variant
from .schedule import STOCK, Phase, Schedule

RECIPES: dict[str, Callable[..., Recipe]] = {}

# Defaults of "gna". The share of dense steps is the paper's for FLUX (9 of 28); the density keeps a
# recipe independent of the resolution.
GNA_DENSITY = 0.3
GNA_DENSE_START = 9 / 28
# Of "sta": the paper's window without search is 3x3x3 tiles, a tenth of its grid; it looked for wider ones by head
# where the model is not trained for them, after 12 of 50 dense steps.
STA_DENSITY = 0.3
STA_DENSE_START = 12 / 50
# Of "fps". The paper gives neither windows of its phases nor where they end; its speed-ups, 7.09 with windows and
# 1.84 without, are those of a mean density of 26%, and these have 28%. Scales get finer as windows get wider.
FPS_WINDOWS = {"coarse": 0.09, "fine": 0.5, "medium": 0.25}
FPS_PRECISIONS = {"coarse": "fp8_tile", "fine": "fp8", "medium": "fp8+q_warp"}
FPS_ALPHAS = (0.3, 0.6)
# Of "scale_dit": a rule, and the order of the tokens along which its blocks are cut.
LOCAL_RULES = {
    "columns": (Local(), Order()),
    "hilbert": (Local(), Order(kind="hilbert")),
    "released": (Local(guidance="linear"), Order(kind="tiled")),
    "token": (Local(block=None), Order()),
}


def named(name: str) -> Callable[[Callable[..., Recipe]], Callable[..., Recipe]]:
    """Register a function that returns a Recipe, or raises ValueError, from keyword options."""

    def add(function: Callable[..., Recipe]) -> Callable[..., Recipe]:
        RECIPES[name] = function
        return function

    return add


def build(name: str, **options) -> Recipe:
    """The recipe `name` with `options`; errors name the choices."""
    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"Unknown recipe {name!r}.{hint} Available: {', '.join(RECIPES)}.")
    known = options_of(name)
    unknown = [option for option in options if option not in known]
    if unknown:
        close = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise TypeError(
            f"The recipe {name!r} has no option {', '.join(map(repr, unknown))}.{hint} "
            f"Options: {', '.join(known) or 'none'}, and impl."
        )
    return replace(RECIPES[name](**options), name=name)


def options_of(name: str) -> list[str]:
    """The options of a named recipe."""
    return list(inspect.signature(RECIPES[name]).parameters)


@named("auto")
def auto(*, precision: str | Precision = "model") -> Recipe:
    """The fastest attention that is exact: every token meets every other, in the model's format.

    precision: another format for all layers and steps, for example "fp8"; see `Precision`.
    """
    return _every_pair(Precision.parse(precision))


@named("dense")
def dense(*, precision: str | Precision = "model") -> Recipe:
    """Exact attention. With impl= it runs in an implementation of visionfuse, for comparison.

    precision: another format for all layers and steps, for example "fp8"; see `Precision`.
    """
    return _every_pair(Precision.parse(precision))


@named("gna")
def gna(
    *,
    window: int | tuple[int | None, ...] | None = None,
    density: float | None = None,
    stride: int | tuple[int, ...] | None = None,
    dilation: int | tuple[int, ...] = 1,
    causal: bool | tuple[bool, ...] = False,
    order: OrderKind | Order = "auto",
    precision: str | Precision = "model",
    dense_start: float | None = None,
    dense_steps: int | None = None,
    dense_layers: int | tuple[int, ...] = (),
    min_steps: int | None = None,
    preset: str | None = None,
) -> Recipe:
    """Generalized neighborhood attention (arXiv 2504.16922).

    window: keys per axis; or density: share of the grid that a query sees (default 0.3), which
        follows the resolution. stride, dilation, causal: as in `Neighborhood`; without a stride the
        windows move by up to 16 tokens, so that whole blocks share one.
    dense_start, dense_steps: the part of the run that stays dense, 9/28 of it by default.
    min_steps: shorter runs stay dense; 9, or 0 when dense_start or dense_steps asks for a plan.
    precision: the format of the steps that follow the plan, "fp8" or "int8_fp8" for example; the dense
        ones are exact, in the model's own attention or in a kernel that is known to be faster.
    preset: a name of `visionfuse.presets`, such as "FLUX.1 4K": its window and stride where neither window
        nor density is given, and its dense_start. "Simulated" ones are fast by prediction; what they do to a picture was not measured.

    The paper's setting for FLUX at 4096 x 4096 is window=(80, 80), stride=(16, 16), dense_steps=9.
    """
    if preset is not None:
        found = presets.named(preset)
        if density is None and window is None:
            window = found.window
            stride = found.stride if stride is None else stride
        if dense_start is None and dense_steps is None:
            dense_start = found.dense_start
            min_steps = Schedule().min_steps if min_steps is None else min_steps
    if window is not None and density is not None:
        raise ValueError(
            f"Give either window or density, got window={window} and density={density}."
        )
    if window is None and density is None:
        density = GNA_DENSITY
    return Recipe(
        order=order if isinstance(order, Order) else Order(kind=order),
        plan=Neighborhood(
            window=window, density=density, stride=stride, dilation=dilation, causal=causal
        ),
        precision=Precision.parse(precision),
        schedule=_dense_first(GNA_DENSE_START, dense_start, dense_steps, dense_layers, min_steps),
    )


@named("sta")
def sta(
    *,
    window: int | tuple[int | None, ...] | None = None,
    density: float | None = None,
    heads: tuple[int | tuple[int | None, ...], ...] = (),
    tile: int | tuple[int, ...] | None = None,
    precision: str | Precision = "model",
    dense_start: float | None = None,
    dense_steps: int | None = None,
    dense_layers: int | tuple[int, ...] = (),
    min_steps: int | None = None,
) -> Recipe:
    """Sliding tile attention (arXiv 2502.04507), on any grid.

    window: tiles per axis; or heads: the window of every head; or density: share of the grid that a query
        sees (default 0.3). tile: tokens per axis; see `TileWindow`.
    precision: of the steps that follow the windows, "fp8_tile" for example.
    dense_start, dense_steps: the part of the run that stays dense, 12/50 of it by default. min_steps: as in "gna".
    """
    if window is None and density is None and not heads:
        density = STA_DENSITY
    return Recipe(
        plan=TileWindow(window=window, density=density, heads=heads, tile=tile),
        precision=Precision.parse(precision),
        schedule=_dense_first(STA_DENSE_START, dense_start, dense_steps, dense_layers, min_steps),
    )


FpsWindow = float | int | tuple[int | tuple[int | None, ...] | None, ...] | None


@named("fps")
def fps(
    *,
    coarse: FpsWindow = FPS_WINDOWS["coarse"],
    fine: FpsWindow = FPS_WINDOWS["fine"],
    medium: FpsWindow = FPS_WINDOWS["medium"],
    tile: int | tuple[int, ...] | None = None,
    alpha1: float = FPS_ALPHAS[0],
    alpha2: float = FPS_ALPHAS[1],
    precision: str | Precision | tuple[str | Precision, ...] | None = None,
    dense_start: float = 0.0,
    dense_layers: int | tuple[int, ...] = (),
    min_steps: int | None = None,
) -> Recipe:
    """FPSAttention (arXiv 2506.04648): windows of tiles and 8 bits together, in three phases of the run. Made for
    models that were trained for it.

    coarse, fine, medium: what a query sees in each phase: tiles per axis, or a share of the grid as a number below 1;
        None is every pair, and a window for every head its own. tile: tokens per axis, see `TileWindow`.
    alpha1, alpha2: shares of the run at which the coarse and the fine phase end; equal ones leave the fine phase out.
    precision: one for all phases, or one for each; by default FP8 with scales by tile, query, and 16 queries.
    dense_start: share of the run, from its first step, that stays dense, as in "gna"; part of the coarse phase.
    min_steps: shorter runs keep the model's own attention; 9, or 0 where alpha1, alpha2 or dense_start is another one.
    """
    windows = {"coarse": coarse, "fine": fine, "medium": medium}
    formats = tuple(FPS_PRECISIONS.values()) if precision is None else precision
    formats = formats if isinstance(formats, (tuple, list)) else (formats,) * 3
    if len(formats) != len(windows):
        raise ValueError(
            f"fps has three phases, {', '.join(windows)}: precision is one for all or one for each, got {precision!r}."
        )
    if not 0 <= alpha1 <= alpha2 <= 1 or not 0 <= dense_start <= 1:
        raise ValueError(
            "fps needs 0 <= alpha1 <= alpha2 <= 1, the shares of the run at which its coarse and its fine phase end, "
            f"and dense_start in [0, 1], got alpha1={alpha1}, alpha2={alpha2}, dense_start={dense_start}."
        )
    asked = (alpha1, alpha2) != FPS_ALPHAS or dense_start > 0
    return Recipe(
        variants=tuple(
            Variant(name=name, plan=_tile_window(window, tile), precision=Precision.parse(own))
            for (name, window), own in zip(windows.items(), formats, strict=True)
        ),
        schedule=Schedule(
            phases=phases_until({STOCK: dense_start, "coarse": alpha1, "fine": alpha2, "medium": 1.0}),
            dense_layers=dense_layers,
            min_steps=(0 if asked else Schedule().min_steps) if min_steps is None else min_steps,
        ),
    )  # fmt: skip


def phases_until(ends: dict[str, float]) -> tuple[Phase, ...]:
    """By variant the share of the run at which it ends, one after the other; those that begin there are left out."""
    phases: list[Phase] = []
    for name, end in ends.items():
        if end > (phases[-1].until if phases else 0.0):
            phases.append(Phase(until=end, variant=name))
    return tuple(phases)


def _tile_window(window: FpsWindow, tile: int | tuple[int, ...] | None) -> Dense | TileWindow:
    if window is None:
        return Dense()
    if isinstance(window, float):
        return TileWindow(density=window, tile=tile)
    if isinstance(window, tuple) and isinstance(window[0], tuple):
        return TileWindow(heads=window, tile=tile)  # pyright: ignore[reportArgumentType]
    return TileWindow(window=window, tile=tile)  # pyright: ignore[reportArgumentType]


def _dense_first(
    default: float, start: float | None, steps: int | None, layers: int | tuple[int, ...],
    min_steps: int | None,
) -> Schedule:  # fmt: skip
    """Dense at first, for the share `default` unless a share or a number of steps is asked for."""
    if start is not None and steps is not None:
        raise ValueError(
            f"Give either dense_start (a share of the run) or dense_steps (a number of steps), got "
            f"dense_start={start} and dense_steps={steps}."
        )
    if min_steps is None:
        min_steps = Schedule().min_steps if start is None and steps is None else 0
    return Schedule(
        dense_start=default if start is None else start, dense_steps=steps, dense_layers=layers,
        min_steps=min_steps,
    )  # fmt: skip


@named("scale_dit")
def scale_dit(
    *,
    rule: str = "columns",
    window: int | tuple[int, ...] = 16,
    block: tuple[int, int] | None = None,
    guidance: str | None = None,
    precision: str | Precision = "model",
    dense_layers: int | tuple[int, ...] = (),
) -> Recipe:
    """Local attention of the second stage of a large image (Scale-DiT, arXiv 2510.16325), in all steps.

    A token sees text, the tokens around it up to half a window, and the guidance, where there is one
    (`visionfuse.scale_dit`).
    rule: as in the public code blocks of 128 queries and 64 keys that meet anywhere meet whole, cut along columns
        half a window wide ("columns", which visits least), along a Hilbert curve in windows ("hilbert"), or along the
        windows of the public code, with its quirks ("released"); "token": no blocks, the rule itself.
    window: tokens per axis. block: (queries, keys) of other blocks. guidance: "windows" around one's own, or those
        numbered one lower and higher, as in the public code ("linear"). precision: as in "gna".
    """
    if rule not in LOCAL_RULES:
        raise ValueError(f"Unknown rule {rule!r}. Choose one of {', '.join(LOCAL_RULES)}.")
    plan, order = LOCAL_RULES[rule]
    given = {n: x for n, x in (("block", block), ("guidance", guidance)) if x is not None}
    return Recipe(
        order=order,
        plan=replace(plan, window=window, **given),
        precision=Precision.parse(precision),
        schedule=Schedule(min_steps=0, dense_layers=dense_layers),
    )


@named("sage")
def sage(
    *,
    qk: str = "int8",
    pv: str = "fp8",
    smooth_k: bool = True,
    smooth_q: bool = False,
    smooth_v: bool = False,
    q_scale: str = "token",
    k_scale: str | None = None,
) -> Recipe:
    """SageAttention2 (arXiv 2411.10958) as it runs on Hopper: every pair, INT8 queries and keys that lost
    their mean, FP8 weights and values, in every step and layer.

    qk: "int8", "int4" or "fp8"; pv: "fp8", "fp16" or "model"; k_scale: by default "thread" with integers and "block"
        with FP8, whose steps follow the numbers; the rest as in `Precision`. INT4 is multiplied as
        INT8 on Hopper, which has no INT4: it shows the quality of 4 bits and is no faster.
    """
    return _every_pair(
        Precision(
            qk=qk, pv=pv, smooth_k=smooth_k, smooth_q=smooth_q, smooth_v=smooth_v,
            q_scale=q_scale, k_scale=k_scale or ("block" if qk == "fp8" else "thread"),
        )
    )  # fmt: skip


def _every_pair(precision: Precision) -> Recipe:
    return Recipe(
        plan=Dense(),
        order=Order(kind="row"),
        precision=precision,
        schedule=Schedule(min_steps=0),
    )

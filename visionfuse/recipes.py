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
from .kernels.plan import Dense, Neighborhood
from .recipe import Precision, Recipe
from .schedule import Schedule

RECIPES: dict[str, Callable[..., Recipe]] = {}

# Defaults of "gna". The share of dense steps is the paper's for FLUX (9 of 28); the density keeps a
# recipe independent of the resolution.
GNA_DENSITY = 0.3
GNA_DENSE_START = 9 / 28


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
        ones stay the model's own attention.
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
    if dense_start is not None and dense_steps is not None:
        raise ValueError(
            f"Give either dense_start (a share of the run) or dense_steps (a number of steps), got "
            f"dense_start={dense_start} and dense_steps={dense_steps}."
        )
    asked = dense_start is not None or dense_steps is not None
    if min_steps is None:
        min_steps = 0 if asked else Schedule().min_steps
    return Recipe(
        order=order if isinstance(order, Order) else Order(kind=order),
        plan=Neighborhood(
            window=window, density=density, stride=stride, dilation=dilation, causal=causal
        ),
        precision=Precision.parse(precision),
        schedule=Schedule(
            dense_start=GNA_DENSE_START if dense_start is None else dense_start,
            dense_steps=dense_steps,
            dense_layers=dense_layers,
            min_steps=min_steps,
        ),
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
    k_scale: str = "block",
) -> Recipe:
    """SageAttention2 (arXiv 2411.10958) as it runs on Hopper: every pair, INT8 queries and keys that lost
    their mean, FP8 weights and values, in every step and layer.

    qk: "int8", "int4" or "fp8"; pv: "fp8", "fp16" or "model"; the rest as in `Precision`. INT4 is multiplied as
        INT8 on Hopper, which has no INT4: it shows the quality of 4 bits and is no faster.
    """
    return _every_pair(
        Precision(
            qk=qk, pv=pv, smooth_k=smooth_k, smooth_q=smooth_q, smooth_v=smooth_v,
            q_scale=q_scale, k_scale=k_scale,
        )
    )  # fmt: skip


def _every_pair(precision: Precision) -> Recipe:
    return Recipe(
        plan=Dense(),
        order=Order(kind="row"),
        precision=precision,
        schedule=Schedule(min_steps=0),
    )

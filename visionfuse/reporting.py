"""What an enabled pipeline runs where, what that should bring, and what was left alone and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from .kernels.attention.dispatch import is_emulated
from .kernels.attention.precision import Precision
from .kernels.order import Order
from .kernels.plan import Dense, Neighborhood, TokenLayout
from .patching import get
from .recipe import Recipe
from .session import Ran
from .sites import SITES, Denoiser, denoisers


@dataclass(frozen=True, kw_only=True)
class DenoiserReport:
    """One denoiser. What depends on the token grid is None until the first call.

    layers, routed: self-attention layers of the model, and how many of them follow the plan.
    density, visited_density: share of the (query, key) pairs that the plan shows, and that the
        kernel multiplies because they lie in visited blocks.
    gain: expected speed-up of self-attention over the whole run, if time follows visited pairs.
    precision: what the plan runs in, and how; precision_reasons: why not in the recipe's, if so.
    phases: which steps of the last run were dense and which followed the plan.
    calls: forwards so far, by kind. notes: reasons for the model's own attention, with counts.
    """

    name: str
    model: str
    layers: int
    routed: int
    others: str
    layout: TokenLayout | None = None
    order: Order | None = None
    density: float | None = None
    visited_density: float | None = None
    full_share: float | None = None
    gain: float | None = None
    impl: str | None = None
    impl_reasons: tuple[str, ...] = ()
    precision: str | None = None
    precision_reasons: tuple[str, ...] = ()
    phases: tuple[str, ...] = ()
    calls: dict[str, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)

    def lines(self) -> Iterator[tuple[str, str]]:
        yield "self-attention", f"{self.routed} of {self.layers} layers follow the plan"
        if self.layout is not None:
            yield "tokens", _tokens(self.layout)
        if self.order is not None:
            yield "order", _order(self.order)
        if self.density is not None:
            yield (
                "density",
                (
                    f"{self.density:.1%} of the pairs visible, {self.visited_density:.1%} visited, "
                    f"{self.full_share:.0%} of those in blocks without a mask"
                ),
            )
        if self.phases:
            yield "last run", ", ".join(self.phases)
        if self.gain is not None:
            yield (
                "expected",
                f"{self.gain:.2f}x for self-attention over the run, from visited pairs",
            )
        if self.precision is not None:
            yield "precision", self.precision
        for reason in self.precision_reasons:
            yield "precision refused", reason
        if self.impl is not None:
            yield "implementation", self.impl
        for reason in self.impl_reasons:
            yield "not chosen", reason
        if any(self.calls.values()):
            counts = ", ".join(f"{n} {kind}" for kind, n in self.calls.items())
            yield "forwards so far", counts
        for reason, count in self.notes.items():
            yield "own attention", f"{reason} ({count}x)"
        yield "left alone", self.others


@dataclass(frozen=True, kw_only=True)
class Report:
    """`str(report)` is plain text; rich prints a table."""

    pipeline: str
    recipe: Recipe | None
    summary: str
    denoisers: tuple[DenoiserReport, ...] = ()

    def __str__(self) -> str:
        out = [f"{self.pipeline}: {self.summary}"]
        for denoiser in self.denoisers:
            out.append(f"  {denoiser.name} ({denoiser.model})")
            out += [f"    {label:<20}{text}" for label, text in denoiser.lines()]
        return "\n".join(out)

    def __rich__(self):
        from rich.table import Table

        table = Table(title=f"{self.pipeline}: {self.summary}", show_header=False)
        for denoiser in self.denoisers:
            table.add_row(f"[bold]{denoiser.name}", f"[bold]{denoiser.model}")
            for row in denoiser.lines():
                table.add_row(*row)
            table.add_section()
        return table


def report(pipe: Any) -> Report:
    """What `enable_visionfuse` does to this pipeline. Grids, densities and gains follow its first call."""
    enabled = get(pipe)
    found = list(denoisers(pipe))
    if enabled is None:
        return Report(
            pipeline=type(pipe).__name__,
            recipe=None,
            summary="visionfuse is not enabled; call pipe.enable_visionfuse()",
        )
    if not enabled.changes_attention or not found:
        names = ", ".join(f"{d.name} ({type(d.model).__name__})" for d in found)
        return Report(
            pipeline=type(pipe).__name__,
            recipe=enabled.recipe,
            summary=(
                f"recipe {enabled.recipe.name!r}: the model's own attention, exact and unchanged"
                + (f", in {names}" if found else f"; supported are {', '.join(SITES)}")
                + ". PyTorch picks its kernel (cuDNN on Hopper); no faster exact one is known here"
            ),
        )
    return Report(
        pipeline=type(pipe).__name__,
        recipe=enabled.recipe,
        summary=f"recipe {enabled.recipe.name!r}: {describe(enabled.recipe)}",
        denoisers=tuple(
            _denoiser(d, enabled.recipe, enabled.ran.get(d.name, Ran())) for d in found
        ),
    )


def _denoiser(denoiser: Denoiser, recipe: Recipe, ran: Ran) -> DenoiserReport:
    layers = denoiser.site.layers(denoiser.model)
    dense = set(recipe.schedule.layers(len(layers)))
    notes = dict(ran.notes)
    fixed = sum(not hasattr(layer.processor, "_attention_backend") for layer in layers)
    if fixed:
        notes["layers whose processor chooses no attention backend"] = fixed
    routed = sum(
        i not in dense and hasattr(layer.processor, "_attention_backend")
        for i, layer in enumerate(layers)
    )
    plan = ran.plan
    phases = recipe.schedule.phases(ran.steps) if ran.steps else ()
    return DenoiserReport(
        name=denoiser.name,
        model=type(denoiser.model).__name__,
        layers=len(layers),
        routed=routed,
        others=denoiser.site.others,
        layout=ran.layout,
        order=plan.order if plan else None,
        density=plan.blocks.density if plan else None,
        visited_density=plan.blocks.visited_density if plan else None,
        full_share=plan.blocks.full_share if plan else None,
        gain=_gain(phases, plan.blocks.visited_density, routed / len(layers)) if plan else None,
        impl=ran.impl,
        impl_reasons=tuple(ran.impl_reasons),
        precision=_precision(recipe, ran),
        precision_reasons=tuple(ran.precision_reasons),
        phases=tuple(map(str, phases)),
        calls=dict(ran.calls),
        notes=notes,
    )


def describe(recipe: Recipe) -> str:
    """A recipe in words: which pairs, in which formats, when."""
    formats = "" if recipe.precision.is_model else f", {_formats(recipe.precision)}"
    return f"{_plan(recipe)}{formats}; {recipe.schedule}"


def _formats(precision: Precision) -> str:
    """Which formats, and which means are taken off: "queries and keys int8 less the mean of keys"."""
    means = [
        name for name, taken in (("keys", precision.smooth_k), ("queries", precision.smooth_q),
                                 ("values", precision.smooth_v)) if taken
    ]  # fmt: skip
    own = "in the model's own format"
    qk = own if precision.qk == "model" else f"in {precision.qk}"
    pv = own if precision.pv == "model" else f"in {precision.pv}"
    less = f", less the mean of {' and '.join(means)}" if means else ""
    return f"queries and keys {qk}, weights and values {pv}{less} ({precision})"


def _precision(recipe: Recipe, ran: Ran) -> str | None:
    """In what the plan runs, and whether that is faster; None where there is nothing to tell."""
    if ran.precision is None or (ran.precision.is_model and recipe.precision.is_model):
        return None
    if ran.precision.is_model:
        return "the model's own"
    if is_emulated(ran.impl or "blocks", ran.precision):
        return (
            f"{ran.precision}, emulated: rounded numbers, multiplied in full precision. It shows the quality "
            "and is slower than the model's own"
        )
    return f"{ran.precision}, multiplied as such by {ran.impl}"


def _gain(phases, visited: float, share: float) -> float | None:
    steps = sum(p.end - p.start for p in phases)
    if not steps:
        return None
    planned = share * sum(p.end - p.start for p in phases if p.kind == "plan") / steps
    return 1 / (1 - planned + planned * visited)


def _tokens(layout: TokenLayout) -> str:
    parts = [f"{s.kind} {'x'.join(map(str, s.shape))}" for s in layout.segments]
    return f"{' + '.join(parts)} = {layout.length}"


def _order(order: Order) -> str:
    if order.tile is None:
        return order.kind
    inner = f", inside them {'x'.join(map(str, order.subtile))}" if order.subtile else ""
    return f"{order.kind}, {'x'.join(map(str, order.tile))}{inner}"


def _plan(recipe: Recipe) -> str:
    plan = recipe.plan
    if isinstance(plan, Dense):
        return "every token meets every other"
    assert isinstance(plan, Neighborhood)
    reach = f"window {plan.window}" if plan.window is not None else f"density {plan.density}"
    more = "".join(
        f", {name} {value}" for name, value, default in (
            ("stride", plan.stride, 1), ("dilation", plan.dilation, 1), ("causal", plan.causal, False)
        ) if value != default
    )  # fmt: skip
    return f"neighborhood attention, {reach}{more}"

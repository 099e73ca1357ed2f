"""What an enabled pipeline runs where, what that should bring, and what was left alone and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

from torch import nn

from . import routing
from .choice import Choice
from .kernels.attention.dispatch import is_emulated
from .kernels.attention.precision import Precision
from .kernels.order import Order
from .kernels.plan import Dense, Local, Neighborhood, TileWindow, TokenLayout
from .patching import Enabled, get
from .recipe import Plan, Recipe, Variant
from .schedule import STOCK, Span
from .session import Ran, Way
from .sites import SITES, Denoiser, denoisers

MANY = 6  # variants or phases; more are counted, not listed, unless `verbose`
VERBOSE = "report(pipe, verbose=True) lists them"


@dataclass(frozen=True, kw_only=True)
class VariantReport:
    """One variant of the recipe.

    density, visited_density: share of the (query, key) pairs that its plan shows, and that the kernel
        multiplies because they lie in visited blocks. full_share: of these, in blocks without a mask.
    precision: what it runs in, and how; precision_reasons: why not in the recipe's, if so. caveat: what one
        should know about it.
    reason: why the model's own attention runs instead, if so.
    """

    name: str
    what: str
    density: float | None = None
    visited_density: float | None = None
    full_share: float | None = None
    impl: str | None = None
    impl_reasons: tuple[str, ...] = ()
    precision: str | None = None
    precision_reasons: tuple[str, ...] = ()
    caveat: str = ""
    reason: str = ""

    def lines(self) -> Iterator[tuple[str, str]]:
        if self.density is not None:
            yield (
                "density",
                (
                    f"{self.density:.1%} of the pairs visible, {self.visited_density:.1%} visited, "
                    f"{self.full_share:.0%} of those in blocks without a mask"
                ),
            )
        if self.precision is not None:
            yield "precision", self.precision
        if self.caveat:
            yield "note", self.caveat
        for reason in self.precision_reasons:
            yield "precision refused", reason
        if self.impl is not None:
            yield "implementation", self.impl
        for reason in self.impl_reasons:
            yield "not chosen", reason


@dataclass(frozen=True, kw_only=True)
class DenoiserReport:
    """One denoiser. What depends on the token grid is None, or empty, until the first call.

    layers, routed: self-attention layers of the model, and how many of them follow a plan.
    variants: of the recipe, those that its schedule names. What they have is here too, of the first.
    gain: expected speed-up of self-attention over the whole run, if time follows visited pairs.
    phases: which steps of the last run were dense and which followed what.
    dense: where dense layers ran, if not in the model's own attention.
    calls: forwards so far, by kind. notes: reasons for the model's own attention, with counts.
    """

    name: str
    model: str
    layers: int
    routed: int
    others: str
    layout: TokenLayout | None = None
    order: Order | None = None
    variants: tuple[VariantReport, ...] = ()
    gain: float | None = None
    phases: tuple[str, ...] = ()
    dense: str = ""
    calls: dict[str, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)

    @property
    def _first(self) -> VariantReport:
        nothing = VariantReport(name="", what="")
        with_plan = (v for v in self.variants if v.density is not None)
        return next(with_plan, self.variants[0] if self.variants else nothing)

    @property
    def density(self) -> float | None:
        return self._first.density

    @property
    def visited_density(self) -> float | None:
        return self._first.visited_density

    @property
    def full_share(self) -> float | None:
        return self._first.full_share

    @property
    def impl(self) -> str | None:
        return self._first.impl

    @property
    def impl_reasons(self) -> tuple[str, ...]:
        return self._first.impl_reasons

    @property
    def precision(self) -> str | None:
        return self._first.precision

    @property
    def precision_reasons(self) -> tuple[str, ...]:
        return self._first.precision_reasons

    def lines(self, verbose: bool = False) -> Iterator[tuple[str, str]]:
        yield "self-attention", f"{self.routed} of {self.layers} layers follow the plan"
        if self.layout is not None:
            yield "tokens", _tokens(self.layout)
        if self.order is not None:
            yield "order", _order(self.order)
        if len(self.variants) <= 1:
            if self.phases:
                yield "last run", ", ".join(self.phases)
        elif verbose or len(self.variants) <= MANY:
            for phase in self.phases:
                yield "last run", phase
        elif self.phases:
            yield "last run", f"{len(self.phases)} phases; {VERBOSE}"
        if self.dense:
            yield "dense layers", f"exact, in {self.dense}, which is faster here"
        if self.gain is not None:
            yield (
                "expected",
                f"{self.gain:.2f}x for self-attention over the run, from visited pairs",
            )
        yield from _of_variants(self.variants, verbose)
        if any(self.calls.values()):
            counts = ", ".join(f"{n} {kind}" for kind, n in self.calls.items())
            yield "forwards so far", counts
        for reason, count in self.notes.items():
            yield "own attention", f"{reason} ({count}x)"
        yield "left alone", self.others


def _of_variants(variants: Sequence[VariantReport], verbose: bool) -> Iterator[tuple[str, str]]:
    """Of each what it is and has alone, then what all have."""
    own = [tuple(variant.lines()) for variant in variants]
    shared = [line for line in own[0] if all(line in lines for lines in own)] if own else []
    if verbose or len(variants) <= MANY:
        for variant, lines in zip(variants, own, strict=True):
            if len(variants) > 1:
                yield variant.name, variant.reason or variant.what
            yield from (line for line in lines if line not in shared)
    else:
        for precision in dict.fromkeys(variant.precision for variant in variants):
            same = [variant for variant in variants if variant.precision == precision]
            formats = precision or "the model's own format"
            yield "variants", f"{len(same)} in {formats}{_reach(same)}"
        yield "", VERBOSE
        for reason in dict.fromkeys(variant.reason for variant in variants if variant.reason):
            yield "own attention", reason
    yield from shared


def _reach(variants: Sequence[VariantReport]) -> str:
    shares = [v.visited_density for v in variants if v.visited_density is not None]
    if not shares:
        return ""
    return f": {min(shares):.1%} to {max(shares):.1%} of the pairs visited, {mean(shares):.1%} on average"


@dataclass(frozen=True, kw_only=True)
class Report:
    """`str(report)` is plain text; rich prints a table.

    changes: what was done to the denoisers besides their attention, as (where, what). verbose: all variants and
        phases of a long recipe are listed, not counted.
    """

    pipeline: str
    recipe: Recipe | None
    summary: str
    denoisers: tuple[DenoiserReport, ...] = ()
    changes: tuple[tuple[str, str], ...] = ()
    verbose: bool = False

    def __str__(self) -> str:
        out = [f"{self.pipeline}: {self.summary}"]
        out += [f"  {where}: {what}" for where, what in self.changes]
        for denoiser in self.denoisers:
            out.append(f"  {denoiser.name} ({denoiser.model})")
            out += [f"    {label:<20}{text}" for label, text in denoiser.lines(self.verbose)]
        return "\n".join(out)

    def __rich__(self):
        from rich.table import Table

        table = Table(title=f"{self.pipeline}: {self.summary}", show_header=False)
        for row in self.changes:
            table.add_row(*row)
        for denoiser in self.denoisers:
            table.add_row(f"[bold]{denoiser.name}", f"[bold]{denoiser.model}")
            for row in denoiser.lines(self.verbose):
                table.add_row(*row)
            table.add_section()
        return table


def report(pipe: Any, *, verbose: bool = False) -> Report:
    """What `enable_visionfuse` does to this pipeline, or `visionfuse.enable` to a model of timm. Grids, densities
    and gains follow the first call. verbose: every variant and phase of a recipe with many."""
    if isinstance(pipe, nn.Module):
        from . import vision

        return vision.report(pipe)
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
            changes=_changes(enabled),
        )
    return Report(
        pipeline=type(pipe).__name__,
        recipe=enabled.recipe,
        summary=f"recipe {enabled.recipe.name!r}: {describe(enabled.recipe)}",
        denoisers=tuple(
            _denoiser(d, enabled.recipe, enabled.ran.get(d.name, Ran())) for d in found
        ),
        changes=_changes(enabled),
        verbose=verbose,
    )


def _changes(enabled: Enabled) -> tuple[tuple[str, str], ...]:
    """What compile=, linear= and fuse= did, and what they left alone and why."""
    deferred = {name: ran.deferrals for name, ran in enabled.ran.items() if ran.deferrals}
    kinds = {"linear layers": enabled.rounded, "compiled": enabled.compiled, "fused": deferred}
    return tuple(
        (f"{name}, {kind}", line)
        for kind, made in kinds.items()
        for name, change in made.items()
        for line in change.lines()
    )


def _denoiser(denoiser: Denoiser, recipe: Recipe, ran: Ran) -> DenoiserReport:
    layers = denoiser.site.layers(denoiser.model)
    notes = dict(ran.notes)
    refusals = [routing.refusal(layer.processor) for layer in layers]
    for reason in filter(None, refusals):
        notes[reason] = notes.get(reason, 0) + 1
    # Of every part of a run, what each layer is to do; without a run, of the recipe's phases.
    spans = recipe.schedule.spans(ran.steps or 1000)
    asked = [recipe.schedule.by_layer(span, len(layers)) for span in spans]
    follows = [any(names[i] != STOCK for names in asked) for i in range(len(layers))]
    return DenoiserReport(
        name=denoiser.name,
        model=type(denoiser.model).__name__,
        layers=len(layers),
        routed=sum(f and not refusal for f, refusal in zip(follows, refusals, strict=True)),
        others=denoiser.site.others,
        layout=ran.layout,
        order=ran.plan.order if ran.plan else None,
        variants=tuple(
            _variant(way, ran.ways.get(way.name))
            for way in recipe.ways
            if way.name in recipe.schedule.names
        ),
        gain=_gain(spans, asked, refusals, ran) if ran.plan and ran.steps else None,
        phases=tuple(map(str, spans)) if ran.steps else (),
        dense=ran.dense,
        calls=dict(ran.calls),
        notes=notes,
    )


def _variant(variant: Variant, way: Way | None) -> VariantReport:
    what = describe_variant(variant.plan, variant.precision)
    if way is None:
        return VariantReport(name=variant.name, what=what)
    blocks = way.plan.blocks if way.plan else None
    exact = isinstance(variant.plan, Dense) and way.choice.precision.is_model
    unused = exact and bool(way.reason)  # its implementation was never to run
    return VariantReport(
        name=variant.name,
        what=what,
        density=blocks.density if blocks else None,
        visited_density=blocks.visited_density if blocks else None,
        full_share=blocks.full_share if blocks else None,
        impl=None if unused else way.choice.impl,
        impl_reasons=() if unused else tuple(way.choice.impl_reasons),
        precision=_precision(variant.precision, way.choice),
        precision_reasons=tuple(way.choice.precision_reasons),
        caveat=way.choice.precision.caveat,
        reason=way.reason,
    )


def describe(recipe: Recipe) -> str:
    """A recipe in words: which pairs, in which formats, when."""
    if recipe.schedule.phases:
        names = [name for name in recipe.schedule.names if name != STOCK]
        listed = f" ({', '.join(names)})" if len(names) <= MANY else ""
        return f"{len(names)} variants{listed} in {recipe.schedule}"
    return f"{describe_variant(recipe.plan, recipe.precision)}; {recipe.schedule}"


def describe_variant(plan: Plan, precision: Precision) -> str:
    return _plan(plan) + ("" if precision.is_model else f", {_formats(precision)}")


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


def _precision(asked: Precision, choice: Choice) -> str | None:
    """In what a variant runs, and whether that is faster; None where there is nothing to tell."""
    if choice.precision.is_model:
        return None if asked.is_model else "the model's own"
    if is_emulated(choice.impl, choice.precision):
        return (
            f"{choice.precision}, emulated: rounded numbers, multiplied in full precision. It shows the quality "
            "and is slower than the model's own"
        )
    return f"{choice.precision}, multiplied as such by {choice.impl}"


def _gain(spans: tuple[Span, ...], asked: list[tuple[str, ...]], refusals, ran: Ran) -> float:
    """Mean share of the pairs that is visited, over all steps and layers, inverted."""
    shares = {
        name: way.plan.blocks.visited_density
        for name, way in ran.ways.items()
        if way.plan and not way.reason
    }
    visited = steps = 0.0
    for span, names in zip(spans, asked, strict=True):
        layers = [
            1.0 if refusal else shares.get(name, 1.0)
            for name, refusal in zip(names, refusals, strict=True)
        ]
        visited += (span.end - span.start) * sum(layers) / len(layers)
        steps += span.end - span.start
    return steps / visited


def _tokens(layout: TokenLayout) -> str:
    parts = [f"{s.kind} {'x'.join(map(str, s.shape))}" for s in layout.segments]
    return f"{' + '.join(parts)} = {layout.length}"


def _order(order: Order) -> str:
    if order.tile is None:
        return order.kind
    inner = f", inside them {'x'.join(map(str, order.subtile))}" if order.subtile else ""
    return f"{order.kind}, {'x'.join(map(str, order.tile))}{inner}"


def _plan(plan: Plan) -> str:
    if isinstance(plan, Dense):
        return "every token meets every other"
    if isinstance(plan, Local):
        return f"local attention in windows of {plan.window}, and all text"
    if isinstance(plan, TileWindow):
        reach = f"density {plan.density}" if plan.density is not None else f"{plan.window} tiles"
        if plan.heads:
            reach = f"of every head its own, of {len(set(plan.heads))} kinds"
        return f"windows of tiles, {reach}" + (f", of {plan.tile} tokens" if plan.tile else "")
    assert isinstance(plan, Neighborhood)
    reach = f"window {plan.window}" if plan.window is not None else f"density {plan.density}"
    more = "".join(
        f", {name} {value}" for name, value, default in (
            ("stride", plan.stride, 1), ("dilation", plan.dilation, 1), ("causal", plan.causal, False)
        ) if value != default
    )  # fmt: skip
    return f"neighborhood attention, {reach}{more}"

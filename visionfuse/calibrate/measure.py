"""What candidates would have changed: measured beside the model's own attention, in one stock run.

Every attention call runs stock, and its result goes on; each candidate then attends to the same queries, keys
and values, as it would run in a recipe: in the order that all candidates share, by the kernels of this machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..bench.timing import time_in_turns
from ..context import ACTIVE, Routed
from ..kernels.attention import block_sparse_attention
from ..kernels.plan import AttentionPlan, TokenLayout
from ..recipe import Recipe, Variant
from ..schedule import STOCK, Phase, Schedule
from ..session import Decision, Ran, Routing, Session

TIMED_SECONDS = 0.03  # for each candidate and class of blocks, on a GPU


class Errors:
    """Means over calls, prompts and, of one call, all of `heads`. rel_l1, cosine: [candidates, layers, steps]."""

    def __init__(self, candidates: int, layers: int, steps: int):
        self.rel_l1 = np.zeros((candidates, layers, steps))
        self.cosine = np.zeros((candidates, layers, steps))
        self.calls = np.zeros((candidates, layers, steps))

    def add(self, at: tuple[int, int, int], got: Tensor, own: Tensor) -> None:
        """One call: got, own (B, S, H, D)."""
        got, own = got.float(), own.float()
        self.rel_l1[at] += float((got - own).abs().sum() / own.abs().sum())
        self.cosine[at] += float(F.cosine_similarity(got.flatten(), own.flatten(), dim=0))
        self.calls[at] += 1

    def to_dict(self) -> dict[str, Any]:
        return {name: array.tolist() for name, array in vars(self).items()}

    @classmethod
    def merged(cls, parts: list[dict[str, Any]]) -> Errors:
        out = cls(0, 0, 0)
        for name in vars(out):
            setattr(out, name, np.sum([part[name] for part in parts], axis=0))
        measured = out.calls > 0
        for array in (out.rel_l1, out.cosine):
            array[measured] /= out.calls[measured]
            array[~measured] = np.nan
        return out


def all_of(candidates: tuple[Variant, ...]) -> Recipe:
    """A recipe whose schedule names every candidate and leaves all layers as they are."""
    layers = tuple((candidate.name, ()) for candidate in candidates)
    return Recipe(
        variants=candidates,
        schedule=Schedule(phases=(Phase(variant=STOCK, layers=layers),), min_steps=0),
    )


class Measuring(Routing):
    """A routing in which all layers run stock, in the model's order, and candidates beside them."""

    lead: AttentionPlan
    candidates: tuple[Routed | None, ...] = ()

    def attach(self, changes) -> None:
        super().attach(changes)
        self.layer = 0
        for index, layer in enumerate(self.site.layers(self.model)):
            hook = layer.register_forward_pre_hook(lambda *_, index=index: self.enter(index))
            changes.callback(hook.remove)

    def enter(self, layer: int) -> None:
        self.layer = layer

    def decision(self, span, lead, layout, arguments) -> Decision:
        made = super().decision(span, lead, layout, arguments)
        # Without the recipe's own plan, which nothing names.
        self.lead, self.candidates = lead, made.variants[1 : len(self.recipe.ways)]
        now = self.now()
        self.step = now.step if now else 0
        name = self.recipe.ways[0].name
        # Routed, so that calls can be seen, to a variant that is the model's own attention.
        return Decision(names=tuple(name if routable else STOCK for routable in self.routable))

    def exact_way(self, layout, arguments) -> None:
        """Layers are measured against the model's own attention."""

    def before(self, args, kwargs):
        self.candidates = ()
        out = super().before(args, kwargs)
        ACTIVE.probe = self.probe if self.candidates else None
        return out

    def probe(self, q: Tensor, k: Tensor, v: Tensor, own: Tensor, scale, masked: bool) -> None:
        session = self.session
        assert isinstance(session, MeasuringSession)
        if q.shape[1] != k.shape[1] or q.shape[1] != self.lead.blocks.length_q:
            return  # cross attention, or another resolution than the recipe's plans
        if self.lead.permutation is not None:
            q, k, v, own = (x.index_select(1, self.lead.permutation) for x in (q, k, v, own))
        session.see(self.layer, self.step, self.lead.layout, (q, k, v), own, scale, self.candidates)


class MeasuringSession(Session):
    """Around one stock run: fills `errors`, `shapes` and, of the layers `timed`, `times`.

    every: only each so many-th step, the first included. heads: so many of them at most, evenly spaced.
    batch: so many times the inputs of the run are what is timed.
    shapes: {layer: (batch, heads, head_dim)}. times: {layer: {candidate or "stock": ms}}.
    """

    routing = Measuring

    def __init__(
        self,
        pipe: Any,
        candidates: tuple[Variant, ...],
        steps: int,
        *,
        impl: str = "auto",
        every: int = 1,
        heads: int | None = None,
        timed: frozenset[int] = frozenset(),
        batch: int = 1,
    ):
        super().__init__(pipe, all_of(candidates), impl, {}, fuse=False)
        self.names = [candidate.name for candidate in candidates]
        self.steps, self.every, self.heads, self.timed = steps, every, heads, timed
        self.batch = batch
        self.errors: Errors | None = None
        self.layout: TokenLayout | None = None
        self.shapes: dict[int, tuple[int, int, int]] = {}
        self.times: dict[int, dict[str, float]] = {}

    @torch.no_grad()
    def see(self, layer, step, layout, qkv, own, scale, candidates) -> None:
        """One attention call that ran stock; tokens in the order that the candidates share."""
        self.layout = layout
        self.shapes[layer] = (qkv[0].shape[0], qkv[0].shape[2], qkv[0].shape[3])
        if self.errors is None:
            layers = len(self.routings[0].processors)
            self.errors = Errors(len(self.names), layers, self.steps)
        if step % self.every:
            return
        if layer in self.timed and layer not in self.times and step:  # the first step warms up
            self.times[layer] = self.time(
                [x.repeat(self.batch, 1, 1, 1) for x in qkv], scale, candidates
            )
        kept = _spread(qkv[0].shape[2], self.heads)
        if kept is not None and qkv[1].shape[2] == qkv[0].shape[2]:
            qkv, own = [x[:, :, kept] for x in qkv], own[:, :, kept]
        for index, chosen in enumerate(candidates):
            if chosen is not None:
                self.errors.add((index, layer, step), attention_of(qkv, scale, chosen)(), own)

    def time(self, qkv: Sequence[Tensor], scale: float | None, candidates) -> dict[str, float]:
        """Milliseconds of the model's own attention and of every candidate, in turns."""
        calls: dict[str, Callable[[], Tensor]] = {STOCK: partial(_stock, *qkv, scale)}
        for name, chosen in zip(self.names, candidates, strict=True):
            if chosen is not None:
                calls[name] = attention_of(qkv, scale, chosen)
        timing = time_in_turns({**calls}, device=qkv[0].device, seconds=TIMED_SECONDS)
        return {name: found.ms for name, found in timing.items()}

    @property
    def ways(self):
        """What became of the candidates on this machine, by name."""
        return next(iter(self.ran.values()), Ran()).ways


def attention_of(qkv, scale: float | None, chosen: Routed) -> Callable[[], Tensor]:
    q, k, v = qkv
    return lambda: block_sparse_attention(
        q, k, v, chosen.plans[0], scale=scale, impl=chosen.impl, precision=chosen.precision
    )


def _stock(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def _spread(heads: int, wanted: int | None) -> list[int] | None:
    if wanted is None or wanted >= heads:
        return None
    return [i * heads // wanted for i in range(wanted)]


def block_classes(model: Any, layers: list[Any]) -> tuple[str, ...]:
    """Of every attention layer the class of the block it stands in: "FluxTransformerBlock" and so on."""
    owner = {id(child): type(m).__name__ for m in model.modules() for child in m.children()}
    return tuple(owner.get(id(layer), type(layer).__name__) for layer in layers)


def psnr(a: Tensor, b: Tensor) -> float:
    """Of pictures in 0..1, in dB; inf if they are equal."""
    error = float((a.float() - b.float()).square().mean())
    return float("inf") if error == 0 else -10 * float(np.log10(error))

"""Schedule: which variant of a recipe runs when, by step and by layer.

Steps are counted from the first step that a call really runs, so image-to-image with strength 0.5
and 28 steps is a run of 14. The count comes from the scheduler, which every pipeline drives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from itertools import pairwise
from types import MethodType
from typing import Any, NamedTuple

STOCK = "stock"  # the variant that is the model's own attention
PLAN = "plan"  # the variant that is a recipe's own plan and precision
SHOWN = 4  # exceptions of a span that are named, if there are no more


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """A part of the run and what it runs.

    until: the share of the run at which it ends, in (0, 1]; the first phase starts at 0.
    variant: of all its layers, a name of the recipe's, or "stock".
    layers: exceptions, ((variant, layers), ...) or a mapping, where layers are numbers in the order in which
        the layers run; negative ones count from the end.
    """

    until: float = 1.0
    variant: str = PLAN
    layers: tuple[tuple[str, tuple[int, ...]], ...] = ()

    def __post_init__(self):
        pairs = self.layers.items() if isinstance(self.layers, Mapping) else self.layers
        layers = tuple((name, tuple(int(i) for i in own)) for name, own in pairs)
        object.__setattr__(self, "layers", layers)
        if not 0 < self.until <= 1:
            raise ValueError(
                f"until is the share of the run at which a phase ends, in (0, 1], got {self.until}."
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The variants that run in this phase."""
        return tuple(dict.fromkeys([self.variant, *(name for name, _ in self.layers)]))

    def to_dict(self) -> dict[str, Any]:
        layers = {name: list(own) for name, own in self.layers}
        return {"until": self.until, "variant": self.variant, "layers": layers}


class Span(NamedTuple):
    """Steps start <= step < end run `variant`, but for the layers that `layers` names."""

    variant: str
    start: int
    end: int
    layers: tuple[tuple[str, tuple[int, ...]], ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys([self.variant, *(name for name, _ in self.layers)]))

    def __str__(self) -> str:
        span = (
            f"step {self.start}"
            if self.end == self.start + 1
            else f"steps {self.start}-{self.end - 1}"
        )
        out = f"{span} {'dense' if self.variant == STOCK else self.variant}"
        if len(self.layers) > SHOWN:
            return f"{out} and {len(self.layers)} others by layer"
        for name, own in self.layers:
            what = "dense" if name == STOCK else name
            out += f", {what} in layer{'s' * (len(own) > 1)} {_ranges(own)}"
        return out


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """When the plan of a recipe applies; everywhere else the model's own attention runs.

    dense_start: share of the run, from its first step, that stays dense, in [0, 1].
    dense_steps: the same as a number of steps; wins over dense_start.
    dense_layers: layers that always stay dense: a number n means the first n, a tuple names them
        (negative ones count from the end). Layers are counted in the order in which they run.
    min_steps: a shorter run stays dense altogether; distilled few-step models have no step to spare.
    phases: instead of dense_start and dense_steps, the parts of the run and what each of them runs.
    """

    dense_start: float = 0.0
    dense_steps: int | None = None
    dense_layers: int | tuple[int, ...] = ()
    min_steps: int = 9
    phases: tuple[Phase, ...] = ()

    def __post_init__(self):
        for name in ("dense_layers", "phases"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if not 0 <= self.dense_start <= 1:
            raise ValueError(
                f"dense_start is a share of the run and must lie in [0, 1], got {self.dense_start}. "
                "Use dense_steps= for a number of steps."
            )
        if self.dense_steps is not None and self.dense_steps < 0:
            raise ValueError(f"dense_steps must be 0 or more, got {self.dense_steps}.")
        if self.min_steps < 0:
            raise ValueError(f"min_steps must be 0 or more, got {self.min_steps}.")
        if isinstance(self.dense_layers, int) and self.dense_layers < 0:
            raise ValueError(
                f"dense_layers must be 0 or more, got {self.dense_layers}. "
                "Use a tuple such as (-1,) to name the last layer."
            )
        if self.phases and (self.dense_start or self.dense_steps is not None):
            raise ValueError(
                "A schedule has either phases or dense_start and dense_steps; a first phase of the variant "
                f'"{STOCK}" says the same.'
            )
        ends = [phase.until for phase in self.phases]
        if ends and (ends[-1] != 1 or any(a >= b for a, b in pairwise(ends))):
            raise ValueError(f"Phases must end one after the other and the last at 1, got {ends}.")

    def spans(self, steps: int) -> tuple[Span, ...]:
        """What a run of `steps` runs, from its first step to its last. Empty phases are left out."""
        if steps < self.min_steps:
            spans = [Span(STOCK, 0, steps)]
        elif self.phases:
            ends = [0, *(round(phase.until * steps) for phase in self.phases)]
            spans = [
                Span(phase.variant, start, end, phase.layers)
                for phase, (start, end) in zip(self.phases, pairwise(ends), strict=True)
            ]
        else:
            first = (
                round(self.dense_start * steps) if self.dense_steps is None else self.dense_steps
            )
            first = min(first, steps)
            spans = [Span(STOCK, 0, first), Span(PLAN, first, steps)]
        return tuple(span for span in spans if span.start < span.end)

    @property
    def names(self) -> tuple[str, ...]:
        """The variants it names."""
        found = [name for phase in self.phases for name in phase.names]
        return tuple(dict.fromkeys(found or [STOCK, PLAN]))

    def first_step(self, steps: int) -> int:
        """The first step of a run of `steps` that is not dense in all layers; `steps` if all are."""
        return next((s.start for s in self.spans(steps) if s.names != (STOCK,)), steps)

    def layers(self, count: int) -> tuple[int, ...]:
        """The layers of a model with `count` layers that stay dense, sorted."""
        if isinstance(self.dense_layers, int):
            return tuple(range(min(self.dense_layers, count)))
        return _resolved(self.dense_layers, count, "dense_layers")

    def by_layer(self, span: Span, count: int) -> tuple[str, ...]:
        """The variant of each of `count` layers. Raises ValueError for layers the model does not have."""
        names = [span.variant] * count
        for name, own in (*span.layers, (STOCK, self.layers(count))):
            for layer in _resolved(own, count, f"A phase's layers of {name!r}"):
                names[layer] = name
        return tuple(names)

    def check_layers(self, count: int) -> None:
        """Raise ValueError where the schedule names a layer that a model with `count` layers has not."""
        self.layers(count)
        for phase in self.phases:
            self.by_layer(Span(phase.variant, 0, 1, phase.layers), count)

    def to_dict(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in type(self).__slots__}
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        return values | {"phases": [phase.to_dict() for phase in self.phases]}

    def __str__(self) -> str:
        parts = []
        if self.phases:
            parts.append(f"{len(self.phases)} phases")
        if self.dense_steps is not None and self.dense_steps > 0:
            parts.append(f"the first {self.dense_steps} steps dense")
        elif self.dense_steps is None and self.dense_start > 0:
            parts.append(f"the first {self.dense_start:.0%} of the run dense")
        if self.dense_layers not in ((), 0):
            parts.append(f"layers {self.dense_layers} dense")
        if self.min_steps > 1:
            parts.append(f"runs of fewer than {self.min_steps} steps dense")
        return ", ".join(parts) or "in every step and layer"


def _resolved(layers: tuple[int, ...], count: int, what: str) -> tuple[int, ...]:
    wrong = [i for i in layers if not -count <= i < count]
    if wrong:
        raise ValueError(
            f"{what}={layers} names layers {wrong}, but the model has {count} "
            f"self-attention layers. Choose from 0 to {count - 1}."
        )
    return tuple(sorted({i % count for i in layers}))


def _ranges(numbers: tuple[int, ...]) -> str:
    """(0, 1, 2, 5) -> "0-2 5"."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return " ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


class Moment(NamedTuple):
    """The step that runs now, counted from the first of this run, and the length of the run."""

    step: int
    steps: int


_COUNTED = "_visionfuse_steps"


def moment(scheduler: Any) -> Moment | None:
    """Where a scheduler is; None if it does not say (no `step_index` and not counted, or no timesteps yet).

    `step_index` is None until the first `scheduler.step`, and every model call of a step, with both
    branches of classifier-free guidance, sees the same value. No GPU synchronisation.
    """
    timesteps = getattr(scheduler, "timesteps", None)
    if timesteps is None:
        return None
    if not hasattr(scheduler, "step_index"):
        counted = vars(scheduler).get(_COUNTED)
        if counted is None:
            return None
        return Moment(counted[1] if counted[0] is timesteps else 0, len(timesteps))
    begin = getattr(scheduler, "begin_index", None) or 0
    index = scheduler.step_index
    return Moment((begin if index is None else index) - begin, len(timesteps) - begin)


def count_steps(scheduler: Any) -> Callable[[], None]:
    """Count the steps of a scheduler that has no `step_index` (DDIM, PNDM), for `moment`. Returns the undoing.

    Other timesteps, or the same set anew, start from 0.
    """
    stock = getattr(type(scheduler), "step", None)
    if stock is None or hasattr(scheduler, "step_index") or "step" in vars(scheduler):
        return lambda: None

    @wraps(stock)  # pipelines ask for its signature
    def step(self, *args, **kwargs):
        out = stock(self, *args, **kwargs)
        timesteps, count = vars(self).get(_COUNTED, (None, 0))
        same = timesteps is self.timesteps
        vars(self)[_COUNTED] = (self.timesteps, count + 1 if same else 1)
        return out

    # A bound method and no closure over the scheduler: pipelines that copy theirs would step the original.
    scheduler.step = MethodType(step, scheduler)
    vars(scheduler)[_COUNTED] = (None, 0)

    def undo() -> None:
        del scheduler.step
        vars(scheduler).pop(_COUNTED, None)

    return undo

"""Schedule: when a recipe's plan applies, by step and by layer.

Steps are counted from the first step that a call really runs, so image-to-image with strength 0.5
and 28 steps is a run of 14. The count comes from the scheduler, which every pipeline drives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple


class Phase(NamedTuple):
    """Steps start <= step < end run `kind`, "dense" or "plan"."""

    kind: str
    start: int
    end: int

    def __str__(self) -> str:
        span = (
            f"step {self.start}"
            if self.end == self.start + 1
            else f"steps {self.start}-{self.end - 1}"
        )
        return f"{span} {self.kind}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """When the plan of a recipe applies; everywhere else the model's own attention runs.

    dense_start: share of the run, from its first step, that stays dense, in [0, 1].
    dense_steps: the same as a number of steps; wins over dense_start.
    dense_layers: layers that always stay dense: a number n means the first n, a tuple names them
        (negative ones count from the end). Layers are counted in the order in which they run.
    min_steps: a shorter run stays dense altogether; distilled few-step models have no step to spare.
    """

    dense_start: float = 0.0
    dense_steps: int | None = None
    dense_layers: int | tuple[int, ...] = ()
    min_steps: int = 9

    def __post_init__(self):
        if isinstance(self.dense_layers, list):
            object.__setattr__(self, "dense_layers", tuple(self.dense_layers))
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

    def first_step(self, steps: int) -> int:
        """The first step of a run of `steps` that follows the plan; `steps` if none does."""
        if steps < self.min_steps:
            return steps
        dense = round(self.dense_start * steps) if self.dense_steps is None else self.dense_steps
        return min(dense, steps)

    def phases(self, steps: int) -> tuple[Phase, ...]:
        first = self.first_step(steps)
        phases = (Phase("dense", 0, first), Phase("plan", first, steps))
        return tuple(phase for phase in phases if phase.start < phase.end)

    def layers(self, count: int) -> tuple[int, ...]:
        """The layers of a model with `count` layers that stay dense, sorted."""
        if isinstance(self.dense_layers, int):
            return tuple(range(min(self.dense_layers, count)))
        wrong = [i for i in self.dense_layers if not -count <= i < count]
        if wrong:
            raise ValueError(
                f"dense_layers={self.dense_layers} names layers {wrong}, but the model has {count} "
                f"self-attention layers. Choose from 0 to {count - 1}."
            )
        return tuple(sorted({i % count for i in self.dense_layers}))

    def __str__(self) -> str:
        parts = []
        if self.dense_steps is not None and self.dense_steps > 0:
            parts.append(f"the first {self.dense_steps} steps dense")
        elif self.dense_steps is None and self.dense_start > 0:
            parts.append(f"the first {self.dense_start:.0%} of the run dense")
        if self.dense_layers not in ((), 0):
            parts.append(f"layers {self.dense_layers} dense")
        if self.min_steps > 1:
            parts.append(f"runs of fewer than {self.min_steps} steps dense")
        return ", ".join(parts) or "in every step and layer"


class Moment(NamedTuple):
    """The step that runs now, counted from the first of this run, and the length of the run."""

    step: int
    steps: int


def moment(scheduler: Any) -> Moment | None:
    """Where a scheduler is; None if it does not say (no `step_index`, or no timesteps yet).

    `step_index` is None until the first `scheduler.step`, and every model call of a step, with both
    branches of classifier-free guidance, sees the same value. No GPU synchronisation.
    """
    timesteps = getattr(scheduler, "timesteps", None)
    if timesteps is None or not hasattr(scheduler, "step_index"):
        return None
    begin = getattr(scheduler, "begin_index", None) or 0
    index = scheduler.step_index
    return Moment((begin if index is None else index) - begin, len(timesteps) - begin)

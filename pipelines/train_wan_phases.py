"""Which noise levels are trained, and which phase of a recipe's schedule each of them belongs to.

A generation meets every noise level in one step, and that step in one phase of the schedule; training meets it in
the same phase (FPSAttention, arXiv 2506.04648, section 3.3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise

import torch
from diffusers import WanPipeline
from torch import Tensor

from visionfuse import patching
from visionfuse.schedule import Span
from visionfuse.session import Session


@dataclass(frozen=True)
class Times:
    """A mixture of logit-normal times with shifts; every part of (0, 1) has a mass and can be drawn from."""

    parts: tuple[tuple[float, float], ...]  # (share, shift)

    def mass(self, low: float, high: float) -> float:
        return sum(share * (_cdf(high, shift) - _cdf(low, shift)) for share, shift in self.parts)

    def draw(self, count: int, generator: torch.Generator, low: float, high: float) -> Tensor:
        """`[count]` float32 between `low` and `high`, by the inverse of the distribution function."""
        bounds = [(_cdf(low, shift), _cdf(high, shift)) for _, shift in self.parts]
        masses = [
            share * (b - a) + 1e-12 for (share, _), (a, b) in zip(self.parts, bounds, strict=True)
        ]
        weights = torch.tensor(masses, dtype=torch.float64)
        which = torch.multinomial(weights, count, replacement=True, generator=generator)
        lows, highs = torch.tensor(bounds, dtype=torch.float64)[which].unbind(1)
        uniform = torch.rand(count, generator=generator, dtype=torch.float64)
        z = torch.special.ndtri((lows + (highs - lows) * uniform).clamp(1e-9, 1 - 1e-9))
        shift = torch.tensor([math.log(shift) for _, shift in self.parts])[which]
        return torch.sigmoid(z + shift).clamp(low, high).float()


def _cdf(t: float, shift: float) -> float:
    """Share of the times below t: sigmoid(z + log shift) for a standard normal z."""
    if not 0 < t < 1:
        return float(t >= 1)
    z = math.log(t / (1 - t)) - math.log(shift)
    return 0.5 * (1 + math.erf(z / math.sqrt(2)))


@dataclass(frozen=True)
class Part:
    """Times between `low` and `high` belong to steps that start with `step` and run `name`."""

    low: float
    high: float
    step: int
    name: str


class Phases:
    """Which part of a recipe's schedule each noise level belongs to; one part without a recipe."""

    def __init__(self, pipe: WanPipeline, steps: int):
        self.pipe, self.steps = pipe, steps
        self.enabled = patching.get(pipe)
        self.parts = [Part(0.0, 1.0, 0, "stock")]
        if self.enabled is not None:
            self.restart()
            scheduler = pipe.scheduler
            times = (scheduler.timesteps / scheduler.config.num_train_timesteps).tolist()
            between = [1.0, *((a + b) / 2 for a, b in pairwise(times)), 0.0]
            spans: Sequence[Span] = self.enabled.recipe.schedule.spans(steps)
            self.parts = [Part(between[s.end], between[s.start], s.start, s.variant) for s in spans]

    def restart(self) -> None:
        """Put the scheduler where a generation of `steps` begins; a check has moved it."""
        if self.enabled is not None:
            self.pipe.scheduler.set_timesteps(self.steps)
            self.pipe.scheduler.set_begin_index(0)

    def session(self):
        """The recipe around the transformer, as in a call of the pipeline."""
        if self.enabled is None:
            return ExitStack()
        return Session(self.pipe, self.enabled.recipe, self.enabled.impl, self.enabled.ran)

    def enter(self, part: Part) -> None:
        if self.enabled is not None:
            self.pipe.scheduler._step_index = part.step

    def of(self, t: float) -> Part:
        return next((part for part in self.parts if part.low <= t <= part.high), self.parts[-1])

    def choose(self, times: Times, generator: torch.Generator) -> Part:
        masses = torch.tensor([times.mass(part.low, part.high) for part in self.parts])
        return self.parts[int(torch.multinomial(masses.clamp(min=0), 1, generator=generator))]

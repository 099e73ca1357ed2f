"""Windows by head: for every phase, layer and head the one that leaves least error at a density of the whole run.

One stock run a prompt measures every window in every attention call: e(window, layer, step, head), the squared
error of that head's output as a share of the squared output of all heads. Sliding tile attention (arXiv 2502.04507)
searches its windows by this error; here they also cost what they visit. Windows of least `error + price * pairs` are
the best ones that visit so few pairs, for any price, and the price is the lowest that stays inside the density.
Where the phases end is chosen with them: all ends are tried, and those of least error taken (FPSAttention,
arXiv 2506.04648, sweeps the error of steps for them).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..kernels.attention import Precision
from ..kernels.plan import TileWindow
from ..recipe import Recipe, Variant
from ..recipes import FPS_PRECISIONS
from ..schedule import Phase, Schedule
from .measure import MeasuringSession, attention_of
from .run import Task

BISECTIONS = 60  # of the price


@dataclass(frozen=True, kw_only=True)
class Choice:
    """ends: the measured step after the last of every phase. windows: index of the window of every head,
    [phases, layers, heads]. density: visited pairs, mean over the run. error: sum over the measured steps."""

    ends: tuple[int, ...]
    windows: np.ndarray
    density: float
    error: float


def choose(
    errors: np.ndarray, densities: Sequence[float], density: float, *, phases: int = 3
) -> Choice:
    """Phase ends and windows of least error whose pairs are at most the share `density` of all.

    errors: [windows, layers, steps, heads]. densities: share of the pairs that each window visits.
    Raises ValueError where even the narrowest window visits more, or there are more phases than steps.
    """
    steps, own = errors.shape[2], np.asarray(densities)
    if own.min() > density:
        raise ValueError(
            f"No window visits so few as {density:.1%} of the pairs: the narrowest has {own.min():.1%}."
        )
    if not 1 <= phases <= steps:
        raise ValueError(f"A run of {steps} measured steps cannot have {phases} phases.")
    sums = np.concatenate([np.zeros_like(errors[:, :, :1]), errors.cumsum(2)], axis=2)
    found = []
    for borders in combinations(range(1, steps), phases - 1):
        ends = (*borders, steps)
        parts = np.stack([sums[:, :, b] - sums[:, :, a] for a, b in pairwise((0, *ends))], axis=1)
        lengths = np.diff((0, *ends))
        windows = _cheapest(parts, own, lengths, density)
        error = float(np.take_along_axis(parts, windows[None], axis=0).sum())
        visited = float((own[windows].mean((1, 2)) * lengths).sum() / steps)
        found.append(Choice(ends=ends, windows=windows, density=visited, error=error))
    return min(found, key=lambda choice: choice.error)


def _cheapest(
    parts: np.ndarray, densities: np.ndarray, lengths: np.ndarray, density: float
) -> np.ndarray:
    """Windows [phases, layers, heads] at the lowest price of a pair that stays inside the density."""
    pairs = densities[:, None, None, None] * lengths[:, None, None]
    most = density * lengths.sum() * parts.shape[2] * parts.shape[3] * (1 + 1e-9)

    def at(price: float) -> np.ndarray:
        return (parts + price * pairs).argmin(0)

    def fits(windows: np.ndarray) -> bool:
        return float((densities[windows] * lengths[:, None, None]).sum()) <= most

    if fits(at(0.0)):
        return at(0.0)
    # At the higher price every head takes the narrowest window.
    gap = np.diff(np.unique(densities)).min()
    low, high = 0.0, 2 * float(np.ptp(parts, axis=0).max()) / gap + 1e-30
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(at(middle)) else (middle, high)
    return at(high)


class HeadSession(MeasuringSession):
    """Around one stock run: sets `head_errors`, [windows, layers, measured steps, heads], and `densities`."""

    head_errors: np.ndarray | None = None
    densities: tuple[float, ...] = ()

    def see(self, layer, step, layout, qkv, own: Tensor, scale, candidates) -> None:
        if step % self.every:
            return
        if self.head_errors is None:
            shape = (len(self.routings[0].processors), -(-self.steps // self.every), own.shape[2])
            self.head_errors = np.zeros((len(candidates), *shape))
            self.densities = tuple(
                1.0 if chosen is None else chosen.plans[0].visited_density for chosen in candidates
            )
        whole = own.float().square().sum()
        for index, chosen in enumerate(candidates):
            if chosen is None:  # the whole grid: the model's own attention
                continue
            error = (
                (attention_of(qkv, scale, chosen)().float() - own.float()).square().sum((0, 1, 3))
            )
            self.head_errors[index, layer, step // self.every] += (error / whole).cpu().numpy()


def windows_by_head(
    pipe: Any,
    task: Task,
    density: float,
    tell: Callable[[str, float, int], None] = lambda job, done, of: None,
) -> tuple[Recipe, Choice]:
    """A recipe in `task.phases`, with the best of the candidates for every head of every layer, and the choice.

    task: its candidates are tile windows of one tile; phases end at steps that are measured, each `every`-th.
    density: visited pairs as a share of all, mean over the run. Formats are those of the candidates or, where they
    keep the model's, those of the phases of "fps".
    """
    _check(task.candidates)
    total: np.ndarray = np.zeros((1, 1, 1, 1))
    densities: tuple[float, ...] = ()
    for number, prompt in enumerate(task.prompts):
        session = HeadSession(pipe, task.candidates, task.steps, impl=task.impl, every=task.every)

        def stepped(pipe, step, time, values, number=number):
            done = number + (step + 1) / task.steps
            tell(f"windows, prompt {number + 1}", done, len(task.prompts))
            return values

        generator = torch.Generator("cpu").manual_seed(task.seed + number)
        with session:
            pipe(
                prompt, num_inference_steps=task.steps, generator=generator, output_type="latent",
                callback_on_step_end=stepped, **task.call,
            )  # fmt: skip
        if session.head_errors is None:
            why = "; ".join(reason for ran in session.ran.values() for reason in ran.notes)
            raise ValueError(f"No attention of this model can follow a recipe here: {why}.")
        total, densities = total + session.head_errors, session.densities
    found = choose(total, densities, density, phases=min(task.phases, total.shape[2]))
    return to_recipe(found, task.candidates, total.shape[2]), found


def _check(candidates: Sequence[Variant]) -> None:
    plans = [candidate.plan for candidate in candidates]
    if not all(isinstance(plan, TileWindow) and plan.window is not None for plan in plans):
        raise ValueError('Windows by head are found among tile windows: candidates "sta window=1x2x2 tile=1x8x8".')  # fmt: skip
    if len({plan.tile for plan in plans}) > 1 or len({c.precision for c in candidates}) > 1:  # pyright: ignore[reportAttributeAccessIssue]
        raise ValueError("Candidates for the heads of one layer need one tile and one precision.")


def to_recipe(found: Choice, candidates: Sequence[Variant], steps: int) -> Recipe:
    """A variant for every phase and layer, one for layers that chose the same. steps: those measured."""
    formats = [Precision.parse(name) for name in FPS_PRECISIONS.values()]
    variants: list[Variant] = []
    phases: list[Phase] = []
    for number, (end, layers) in enumerate(zip(found.ends, found.windows, strict=True)):
        own: dict[TileWindow, list[int]] = {}
        for layer, heads in enumerate(layers):
            own.setdefault(_plan([candidates[i] for i in heads]), []).append(layer)
        precision = candidates[0].precision
        if precision.is_model:
            precision = formats[min(number, len(formats) - 1)]
        names = [f"phase {number + 1}, layer {of[0] + 1}" for of in own.values()]
        variants += [
            Variant(name=name, plan=plan, precision=precision)
            for name, plan in zip(names, own, strict=True)
        ]
        others = tuple(zip(names, map(tuple, own.values()), strict=True))[1:]
        phases.append(Phase(until=end / steps, variant=names[0], layers=others))
    return Recipe(
        name="heads",
        note=f"Windows by head, {found.density:.1%} of the pairs visited.",
        variants=tuple(variants),
        schedule=Schedule(phases=tuple(phases), min_steps=0),
    )


def _plan(chosen: Sequence[Variant]) -> TileWindow:
    """The windows of these candidates as those of the heads."""
    plans = [candidate.plan for candidate in chosen if isinstance(candidate.plan, TileWindow)]
    windows = tuple(plan.window for plan in plans if plan.window is not None)
    return TileWindow(heads=windows, tile=plans[0].tile)

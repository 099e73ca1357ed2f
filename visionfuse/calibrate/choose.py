"""Which variant runs in which layers and phases: least time inside an error budget, exactly.

A *group* is the layers of one class of blocks in one phase. Its layers take the same time with the same
variant, so that only the number of layers matters to time, and errors add up. A group may use two variants,
a and b, because every further one is a further graph where blocks are compiled: for a given number of layers
that run b, those which gain or lose least error by it are the best choice. That leaves at most V^2 (L + 1) / 2
choices a group, of which only those on the Pareto front of (time, error) can be part of the answer; fronts of
groups are added one by one, and what is dominated or beyond the budget is left out. Nothing optimal is lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement, pairwise

import numpy as np

# Points kept of a front. Where there are more, errors within budget / POINTS of one another count as equal, so
# that the answer is the best one for a budget smaller by the share groups / POINTS at most.
POINTS = 20_000


@dataclass(frozen=True, kw_only=True)
class Group:
    """times: of one layer, by variant, in any unit. errors: what layer l adds with variant v, [layers, variants]."""

    times: tuple[float, ...]
    errors: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Selection:
    """variants: of every layer of every group. time, error: their sums."""

    variants: tuple[tuple[int, ...], ...]
    time: float
    error: float


def choose(groups: Sequence[Group], budget: float) -> Selection:
    """The selection of least time, then of least error, whose errors add up to `budget` at most.

    Raises ValueError where even the most exact one exceeds it, or a number is NaN.
    """
    if any(np.isnan(g.errors).any() or np.isnan(g.times).any() for g in groups):
        raise ValueError("Times and errors must be numbers, some are NaN.")
    fronts = [front(group) for group in groups]
    least = [min(error for _, error, _ in found) for found in fronts]
    # What is left to spend for the groups so far, when all others are as exact as they can be.
    spare = budget - sum(least)
    if spare < -1e-12 * max(1.0, budget):
        raise ValueError(
            f"No selection stays inside the budget {budget:.3g}: the most exact one has {sum(least):.3g}."
        )
    time, error = np.zeros(1), np.zeros(1)
    chosen: list[tuple[np.ndarray, np.ndarray]] = []
    allowed = 0.0
    for found, smallest in zip(fronts, least, strict=True):
        allowed += smallest
        own_time = np.array([t for t, _, _ in found])
        own_error = np.array([e for _, e, _ in found])
        times = (time[:, None] + own_time).ravel()
        errors = (error[:, None] + own_error).ravel()
        kept = pareto(times, errors, allowed + max(spare, 0.0), budget / POINTS)
        time, error = times[kept], errors[kept]
        chosen.append(np.divmod(kept, len(found)))
    at = 0  # fronts are sorted by time
    result_time, result_error = float(time[at]), float(error[at])
    picks = []
    for found, (before, own) in zip(reversed(fronts), reversed(chosen), strict=True):
        picks.append(found[own[at]][2])
        at = before[at]
    return Selection(variants=tuple(reversed(picks)), time=result_time, error=result_error)


def uniform(groups: Sequence[Group], variant: int) -> Selection:
    """One variant in all layers of all groups."""
    return Selection(
        variants=tuple((variant,) * len(group.errors) for group in groups),
        time=sum(len(group.errors) * group.times[variant] for group in groups),
        error=sum(float(group.errors[:, variant].sum()) for group in groups),
    )


def choose_in_order(phases: Sequence[Sequence[Group]], budget: float) -> Selection:
    """The selection of least time inside the budget in which all groups of a phase run one variant, and variants
    follow one another in their order; of none of them need there be a phase.

    phases: the groups of each part of the run. Raises ValueError as `choose` does.
    """
    variants, count = len(phases[0][0].times), len(phases)
    time = np.array([[len(g.errors) * np.array(g.times) for g in own] for own in phases]).sum(1)
    error = np.array([[g.errors.sum(0) for g in own] for own in phases]).sum(
        1
    )  # [phases, variants]
    if np.isnan(time).any() or np.isnan(error).any():
        raise ValueError("Times and errors must be numbers, some are NaN.")
    slack = 1e-12 * max(1.0, budget)
    best: tuple[float, float, tuple[int, ...]] | None = None
    least = np.inf
    for borders in combinations_with_replacement(range(count + 1), variants - 1):
        runs = np.repeat(np.arange(variants), [b - a for a, b in pairwise((0, *borders, count))])
        spent = float(error[np.arange(count), runs].sum())
        least = min(least, spent)
        took = float(time[np.arange(count), runs].sum())
        if spent <= budget + slack and (best is None or (took, spent) < best[:2]):
            best = took, spent, tuple(runs.tolist())
    if best is None:
        raise ValueError(
            f"No selection stays inside the budget {budget:.3g}: the most exact one has {least:.3g}."
        )
    chosen = [(v,) * len(g.errors) for own, v in zip(phases, best[2], strict=True) for g in own]
    return Selection(variants=tuple(chosen), time=best[0], error=best[1])


def front(group: Group) -> list[tuple[float, float, tuple[int, ...]]]:
    """(time, error, variant of each layer) of the choices of one group that nothing dominates, by time."""
    count = len(group.errors)
    found: list[tuple[float, float, tuple[int, ...]]] = []
    for a, b in combinations_with_replacement(range(len(group.times)), 2):
        order = np.argsort(group.errors[:, b] - group.errors[:, a], kind="stable")
        for layers in range(count + 1) if a != b else (0,):
            own = np.full(count, a)
            own[order[:layers]] = b
            error = float(group.errors[np.arange(count), own].sum())
            time = layers * group.times[b] + (count - layers) * group.times[a]
            found.append((time, error, tuple(own.tolist())))
    times, errors = np.array([f[0] for f in found]), np.array([f[1] for f in found])
    return [found[i] for i in pareto(times, errors)]


def pareto(
    times: np.ndarray, errors: np.ndarray, most: float = np.inf, step: float = 0.0
) -> np.ndarray:
    """Indices of the points with an error of at most `most` that no other dominates, by rising time.

    Where there are more than POINTS, of those in one `step` of error only the fastest.
    """
    slack = 1e-12 * max(1.0, abs(most)) if np.isfinite(most) else 0.0
    order = np.lexsort((errors, times))
    order = order[errors[order] <= most + slack]
    best = np.minimum.accumulate(errors[order])
    first = np.concatenate([[True], best[1:] < best[:-1]]) if len(order) else np.zeros(0, bool)
    kept = order[first]
    if len(kept) > POINTS and step > 0:
        buckets = np.floor(errors[kept] / step)
        kept = kept[np.concatenate([[True], buckets[1:] != buckets[:-1]])]
    return kept

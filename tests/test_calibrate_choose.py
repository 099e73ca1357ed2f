"""The choice of variants: exact, by comparison with every possible one."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visionfuse.calibrate import choose as choosing
from visionfuse.calibrate.choose import Group, choose, front, uniform

whole = st.integers(0, 12)  # so that sums are exact and ties are common


@st.composite
def groups(draw, most_groups=3):
    found = []
    for _ in range(draw(st.integers(1, most_groups))):
        layers, variants = draw(st.integers(1, 3)), draw(st.integers(1, 3))
        errors = draw(st.lists(whole, min_size=layers * variants, max_size=layers * variants))
        times = draw(st.lists(st.integers(1, 9), min_size=variants, max_size=variants))
        table = np.array(errors, dtype=float).reshape(layers, variants)
        table[:, 0] = 0  # stock
        found.append(Group(times=tuple(map(float, times)), errors=table))
    return found


def brute_force(groups, budget):
    """(time, error) of the best of all selections with at most two variants a group."""
    choices = []
    for group in groups:
        layers, variants = group.errors.shape
        own = []
        for names in product(range(variants), repeat=layers):
            if len(set(names)) <= 2:
                error = sum(group.errors[i, v] for i, v in enumerate(names))
                own.append((sum(group.times[v] for v in names), error))
        choices.append(own)
    sums = [(sum(t for t, _ in pick), sum(e for _, e in pick)) for pick in product(*choices)]
    return min((t, e) for t, e in sums if e <= budget)


@settings(max_examples=150, deadline=None)
@given(groups(), st.integers(0, 30))
def test_equals_brute_force(groups, budget):
    found = choose(groups, budget)
    assert (found.time, found.error) == brute_force(groups, budget)
    time = error = 0.0
    for group, names in zip(groups, found.variants, strict=True):
        assert len(names) == len(group.errors)
        assert len(set(names)) <= 2
        time += sum(group.times[v] for v in names)
        error += sum(group.errors[i, v] for i, v in enumerate(names))
    assert (time, error) == (found.time, found.error)


@settings(max_examples=60, deadline=None)
@given(groups())
def test_no_variant_alone_beats_the_choice(groups):
    for variant in range(min(len(group.times) for group in groups)):
        alone = uniform(groups, variant)
        assert all(set(names) == {variant} for names in alone.variants)
        found = choose(groups, alone.error)
        assert (found.time, found.error) <= (alone.time, alone.error)


@settings(max_examples=60, deadline=None)
@given(groups(), st.integers(1, 30))
def test_thinned_fronts_stay_inside_the_budget_and_near_the_best(groups, budget):
    before, choosing.POINTS = choosing.POINTS, 40
    try:
        found = choose(groups, budget)
    finally:
        choosing.POINTS = before
    assert found.error <= budget
    assert found.time <= brute_force(groups, budget * (1 - len(groups) / 40))[0]


def test_a_larger_budget_is_never_slower():
    rng = np.random.default_rng(0)
    groups = [
        Group(times=(10.0, 7.0, 6.0, 3.0), errors=rng.random((19, 4)) * [0, 1, 2, 5])
        for _ in range(8)
    ]
    times = [choose(groups, budget).time for budget in (0.0, 1.0, 5.0, 20.0, 100.0, 1e9)]
    assert times == sorted(times, reverse=True)
    assert times[0] == 8 * 19 * 10.0
    assert times[-1] == 8 * 19 * 3.0


def test_what_nobody_can_meet():
    exact = Group(times=(2.0,), errors=np.array([[3.0]]))
    with pytest.raises(ValueError, match="most exact one has 3"):
        choose([exact], 2.0)
    with pytest.raises(ValueError, match="NaN"):
        choose([Group(times=(1.0,), errors=np.array([[np.nan]]))], 1.0)


def test_front_has_nothing_dominated():
    rng = np.random.default_rng(1)
    found = front(Group(times=(5.0, 4.0, 1.0), errors=rng.random((6, 3))))
    for (t, e, _), (t2, e2, _) in pairwise(found):
        assert t < t2
        assert e > e2

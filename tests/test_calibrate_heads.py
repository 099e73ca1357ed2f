"""Windows by phase, layer and head: the choice against brute force, and a recipe found for a tiny Wan."""

from __future__ import annotations

from itertools import combinations, pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visionfuse.calibrate.heads import select


@st.composite
def measured(draw):
    windows, layers, steps, heads = (draw(st.integers(1, most)) for most in (3, 2, 3, 2))
    number = st.integers(0, 20)
    size = windows * layers * steps * heads
    errors = draw(st.lists(number, min_size=size, max_size=size))
    densities = draw(st.lists(st.integers(1, 10), min_size=windows, max_size=windows, unique=True))
    errors = np.array(errors, float).reshape(windows, layers, steps, heads)
    return errors, [d / 10 for d in densities], draw(st.integers(1, steps))


def brute_force(errors, densities, ends):
    """(density, error) of every choice of windows with these ends."""
    _, layers, steps, heads = errors.shape
    parts = list(pairwise((0, *ends)))
    sums = np.stack([errors[:, :, a:b].sum(2) for a, b in parts])  # [phases, windows, layers, heads]
    places = list(product(range(len(parts)), range(layers), range(heads)))
    for chosen in product(range(len(densities)), repeat=len(places)):
        error = sum(sums[p, w, la, h] for (p, la, h), w in zip(places, chosen, strict=True))
        visited = sum(
            densities[w] * (parts[p][1] - parts[p][0])
            for (p, _, _), w in zip(places, chosen, strict=True)
        )
        yield visited / (steps * layers * heads), error


@settings(max_examples=60, deadline=None)
@given(measured(), st.floats(0.1, 1))
def test_nothing_that_visits_so_few_pairs_has_less_error(given_, budget):
    errors, densities, phases = given_
    if min(densities) > budget:
        with pytest.raises(ValueError, match="narrowest"):
            select(errors, densities, budget, phases=phases)
        return
    found = select(errors, densities, budget, phases=phases)
    assert found.density <= budget + 1e-9
    assert len(found.ends) == phases
    steps = errors.shape[2]
    assert found.ends[-1] == steps
    own = np.take_along_axis(
        np.stack([errors[:, :, a:b].sum(2) for a, b in pairwise((0, *found.ends))], 1),
        found.windows[None], axis=0,
    )  # fmt: skip
    assert found.error == pytest.approx(own.sum())
    if found.windows.size > 8:
        return  # too many choices
    better = [e for d, e in brute_force(errors, densities, found.ends) if d <= found.density + 1e-9]
    assert found.error == pytest.approx(min(better))
    # What a price finds is at most one step of one head short of what the budget allows.
    if phases == 1:
        best = min(e for d, e in brute_force(errors, densities, (steps,)) if d <= budget + 1e-9)
        most = errors.sum(2).max()
        assert found.error <= best + len(densities) * errors.shape[3] * errors.shape[1] * most
    assert all(
        len(set(borders)) == phases - 1 for borders in combinations(range(1, steps), phases - 1)
    )

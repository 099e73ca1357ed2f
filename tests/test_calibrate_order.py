"""Calibration of what runs in a fixed order: where the phases of "fps" end, and windows as candidates."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import visionfuse
from visionfuse.calibrate import run as calibration
from visionfuse.calibrate.choose import Group, choose_in_order
from visionfuse.calibrate.command import parse_candidates
from visionfuse.calibrate.journal import Journal
from visionfuse.calibrate.run import Calibration, Task
from visionfuse.kernels.plan import TileWindow
from visionfuse.testing_pipelines import run, single_thread, wan_pipeline

FPS = "fps coarse=1x1x1 fine=1x2x2 medium=1x1x2 tile=2x2x3"


@st.composite
def phases(draw):
    count, variants, classes = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 2))  # fmt: skip
    number = st.integers(0, 12)
    found = []
    for _ in range(count):
        own = []
        for _ in range(classes):
            layers = draw(st.integers(1, 3))
            errors = np.array(draw(st.lists(number, min_size=layers * variants, max_size=layers * variants)))  # fmt: skip
            table = errors.reshape(layers, variants).astype(float)
            table[:, 0] = 0  # stock
            times = draw(st.lists(st.integers(1, 9), min_size=variants, max_size=variants))
            own.append(Group(times=tuple(map(float, times)), errors=table))
        found.append(own)
    return found


@settings(max_examples=150, deadline=None)
@given(phases(), st.integers(0, 30))
def test_equals_brute_force(phases, budget):
    variants = len(phases[0][0].times)
    sums = []
    for names in product(range(variants), repeat=len(phases)):
        if list(names) != sorted(names):
            continue
        time = sum(len(g.errors) * g.times[v] for own, v in zip(phases, names, strict=True) for g in own)  # fmt: skip
        error = sum(g.errors[:, v].sum() for own, v in zip(phases, names, strict=True) for g in own)
        sums.append((time, error))
    found = choose_in_order(phases, budget)
    assert (found.time, found.error) == min(pair for pair in sums if pair[1] <= budget)
    groups = [group for own in phases for group in own]
    assert [len(names) for names in found.variants] == [len(g.errors) for g in groups]
    runs = [names[0] for names in found.variants]
    assert runs == sorted(runs)
    assert all(len(set(names)) == 1 for names in found.variants)


def test_a_budget_that_nothing_meets():
    phases = [[Group(times=(1.0,), errors=np.ones((2, 1)))]]
    with pytest.raises(ValueError, match="most exact one has 2"):
        choose_in_order(phases, 1.0)


def test_candidates_of_a_recipe_with_phases():
    found = parse_candidates(f"{FPS},sta density=0.3 precision=fp8_tile tile=2x2x3")
    assert [v.name for v in found] == [f"{FPS} {phase}" for phase in ("coarse", "fine", "medium")] + [
        "sta density=0.3 precision=fp8_tile tile=2x2x3"
    ]  # fmt: skip
    assert found[0].plan == TileWindow(window=(1, 1, 1), tile=(2, 2, 3))
    assert str(found[0].precision) == "fp8_tile"
    assert found[3].plan == TileWindow(density=0.3, tile=(2, 2, 3))


@pytest.fixture
def calibrated(tmp_path, monkeypatch):
    """Of a tiny Wan, with times in which tile windows are faster than stock."""
    monkeypatch.setattr(calibration, "stock_ms", lambda setting: 8.0)
    times = {"coarse": 1.0, "fine": 4.0, "medium": 2.0}
    monkeypatch.setattr(
        calibration, "candidate_ms", lambda candidate, *_: times[candidate.name.split()[-1]]
    )
    pipe = wan_pipeline()
    task = Task(
        candidates=parse_candidates(FPS), prompts=("a red cube",), held_out=("a blue ball",), steps=6,
        phases=6, call={"height": 64, "width": 96, "num_frames": 9, "max_sequence_length": 16},
    )  # fmt: skip

    def found(budget, in_order, resume=False):
        journal = Journal(tmp_path / "journal", task.to_dict(), resume=resume)
        with single_thread():
            return pipe, Calibration(pipe, task, journal).run(budget, in_order=in_order)

    return found


def test_where_the_phases_of_fps_end(calibrated):
    """All layers run one variant, variants follow in their order, more budget is faster, and the recipe runs."""
    pipe, loose = calibrated(5.0, True)
    _, middle = calibrated(loose.chosen.psnr + 3, True, resume=True)
    _, exact = calibrated(loose.chosen.psnr + 30, True, resume=True)
    assert loose.ms < middle.ms < exact.ms
    assert all(found.chosen.psnr >= found.budget for found in (exact, middle, loose))
    order = ["stock", *(f"{FPS} {phase}" for phase in ("coarse", "fine", "medium"))]
    for found in (exact, loose, middle):
        phases = found.recipe.schedule.phases
        assert all(not phase.layers for phase in phases)
        places = [order.index(phase.variant) for phase in phases]
        assert places == sorted(places)
    assert loose.ms == 6 * 2 * 1.0  # the coarse one in all steps
    pipe.enable_visionfuse(middle.recipe)
    run(pipe, steps=9)
    assert visionfuse.report(pipe).denoisers[0].calls["plan"] > 0
    _, free = calibrated(middle.budget, False, resume=True)
    assert free.ms <= middle.ms  # by layer and in any order: windows as STA's search finds them

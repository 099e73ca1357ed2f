"""Windows by phase, layer and head: the choice against brute force, and a recipe found for a tiny Wan."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import visionfuse
from visionfuse.calibrate.command import parse_candidates
from visionfuse.calibrate.heads import choose, windows_by_head
from visionfuse.calibrate.run import Task
from visionfuse.cli import app
from visionfuse.recipe import Recipe
from visionfuse.testing_pipelines import run, single_thread, wan_pipeline


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
    sums = np.stack(
        [errors[:, :, a:b].sum(2) for a, b in parts]
    )  # [phases, windows, layers, heads]
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
            choose(errors, densities, budget, phases=phases)
        return
    found = choose(errors, densities, budget, phases=phases)
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


CANDIDATES = ",".join(f"sta window={window} tile=1x2x3" for window in ("1x1x1", "1x2x2", "3x1x1"))


def task_of(text: str, **changes) -> Task:
    how = {"prompts": ("a red cube",), "held_out": (), "steps": 4, "phases": 2,
           "call": {"height": 64, "width": 96, "num_frames": 9, "max_sequence_length": 16}}  # fmt: skip
    return Task(candidates=parse_candidates(text), **how | changes)


def test_a_recipe_for_a_tiny_wan(tmp_path):
    """Every head gets a window of its own, more density leaves less error, and the recipe runs and is saved."""
    pipe, task, told = wan_pipeline(), task_of(CANDIDATES), []
    with single_thread():
        recipe, found = windows_by_head(pipe, task, 0.25, lambda *said: told.append(said))
        _, loose = windows_by_head(pipe, task, 0.3)
    assert told[-1][1:] == (1.0, 1)
    assert 0.1 < found.density <= 0.25 < loose.density <= 0.3
    assert loose.error < found.error
    assert len(recipe.schedule.phases) == 2
    assert recipe.schedule.phases[0].until == found.ends[0] / 4
    heads = {variant.plan.heads for variant in recipe.variants}
    assert any(len(set(windows)) > 1 for windows in heads)  # heads differ
    assert next(str(v.precision) for v in recipe.variants) == "fp8_tile"
    recipe.save(tmp_path / "heads.json")
    assert Recipe.load(tmp_path / "heads.json") == recipe
    pipe.enable_visionfuse(recipe)
    run(pipe, steps=4)
    denoiser = visionfuse.report(pipe).denoisers[0]
    assert denoiser.calls["dense"] == 0
    assert 1 / denoiser.gain == pytest.approx(found.density, rel=1e-3)


def test_candidates_must_be_windows_of_one_tile():
    pipe = wan_pipeline()
    for text, message in (
        ("sage", "tile windows"),
        ("sta density=0.3", "tile windows"),
        ("sta window=1x1x1 tile=1x2x2,sta window=1x1x1 tile=1x2x3", "one tile"),
    ):
        with pytest.raises(ValueError, match=message):
            windows_by_head(pipe, task_of(text), 0.3)


def test_the_command_saves_it(tmp_path):
    wan_pipeline().save_pretrained(tmp_path / "wan")
    (tmp_path / "prompts.txt").write_text("a red cube\n")
    arguments = [
        "calibrate", str(tmp_path / "wan"), "--prompts", str(tmp_path / "prompts.txt"), "--measure", "1",
        "--held-out", "0", "--steps", "4", "--phases", "2", "--by-head", "0.25", "--candidates", CANDIDATES,
        "--height", "64", "--width", "96", "--frames", "9", "--max-sequence-length", "16",
        "--out", str(tmp_path / "found.json"),
    ]  # fmt: skip
    said = CliRunner().invoke(app, arguments)
    assert said.exit_code == 0, said.output
    recipe = Recipe.load(tmp_path / "found.json")
    assert recipe.name == "found"
    assert "of the pairs visited" in recipe.note
    assert recipe.note in " ".join(said.output.split())
    refused = CliRunner().invoke(app, [*arguments, "--in-order"])
    assert refused.exit_code != 0
    assert "--by-head goes without" in " ".join(refused.output.split())

"""Linear layers chosen by a calibration, in a recipe: inside one budget with attention, and off again without a trace."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from visionfuse import Precision, Recipe
from visionfuse.calibrate import run as of_attention
from visionfuse.calibrate.journal import Journal
from visionfuse.calibrate.linears import HALF_DB, measured, run_with_linears
from visionfuse.calibrate.run import Calibration, Task
from visionfuse.linears import Linears
from visionfuse.patching import get
from visionfuse.recipe import Variant
from visionfuse.testing_pipelines import flux_pipeline, run

CALL = {"height": 32, "width": 48, "max_sequence_length": 48}
INT8 = Linears(format="int8", least_width=16, skip=())


@pytest.fixture(autouse=True)
def plausible_times(monkeypatch):
    """At these sizes nothing is faster than stock: times in which it is, so that there is something to choose."""
    monkeypatch.setattr(of_attention, "stock_ms", lambda setting: 4.0)
    monkeypatch.setattr(of_attention, "candidate_ms", lambda *_: 2.0)


def calibration(pipe, folder) -> Calibration:
    task = Task(
        candidates=(Variant(name="int8", precision=Precision.parse("int8_fp8")),), prompts=("a",),
        held_out=("b",), call=CALL, steps=2, phases=1,
    )  # fmt: skip
    return Calibration(pipe, task, Journal(folder, task.to_dict(), resume=folder.exists()))


def test_a_recipe_says_which_linear_layers_are_rounded(tmp_path):
    pytest.importorskip("torchao")
    recipe = Recipe(name="mine", linear=replace(INT8, only=("*.ff.*",)))
    recipe.save(tmp_path / "recipe.json")
    loaded = Recipe.load(tmp_path / "recipe.json")
    assert loaded == recipe
    pipe = flux_pipeline()
    stock = run(pipe)
    pipe.enable_visionfuse(loaded)
    layers = get(pipe).rounded["transformer"].layers
    assert layers
    assert all(".ff." in name for name in layers)
    pipe.enable_visionfuse(loaded, linear=INT8)  # what is said in the call goes first
    assert len(get(pipe).rounded["transformer"].layers) > len(layers)
    pipe.disable_visionfuse()
    assert torch.equal(run(pipe), stock)
    with pytest.raises(TypeError, match="linear must be Linears"):
        Recipe(linear="int8")


def test_as_many_as_the_budget_allows_those_of_least_error_first(tmp_path):
    pytest.importorskip("torchao")
    pipe = flux_pipeline()
    first = calibration(pipe, tmp_path / "a")
    errors = measured(first, Recipe(linear=INT8))
    assert len(errors) > 20
    every = first.compare(Recipe(linear=INT8), "a", "prompt-0", 0)
    none = first.compare(Recipe(), "a", "prompt-0", 0)
    assert none == 120.0 > every

    loose, said = run_with_linears(first, INT8, every - 10, "loose")
    assert set(rounded(pipe, loose.recipe)) == set(errors)
    assert said.startswith(f"Linear layers: {len(errors)} of {len(errors)} in int8")
    assert loose.recipe.variants  # attention has its half of the budget

    tight, said = run_with_linears(first, INT8, every + 3, "tight")
    kept = rounded(pipe, tight.recipe)
    assert 0 < len(kept) < len(errors)
    (known,) = (x for key, x in first.journal.results.items() if key.startswith("errors of linear"))
    assert set(kept) == set(sorted(known, key=known.__getitem__)[: len(kept)])
    assert tight.chosen.psnr >= every + 3
    assert tight.budget == every + 3
    assert tight.held_out == first.check(tight.recipe)

    again, _ = run_with_linears(calibration(pipe, tmp_path / "a"), INT8, every + 3, "tight")
    assert again.recipe == tight.recipe


def test_a_budget_that_no_linear_layer_keeps(tmp_path):
    pytest.importorskip("torchao")
    pipe = flux_pipeline()
    found, said = run_with_linears(calibration(pipe, tmp_path / "a"), INT8, 119.0, "none")
    assert found.recipe.linear is None
    assert said.startswith("Linear layers: 0 of")
    assert found.chosen.psnr >= 119.0


def test_nothing_to_round(tmp_path):
    pytest.importorskip("torchao")
    with pytest.raises(ValueError, match="1024 or wider"):
        run_with_linears(
            calibration(flux_pipeline(), tmp_path / "a"), Linears(format="int8"), 30.0, "no"
        )


def test_half_of_the_squared_error():
    assert pytest.approx(10 ** (-40 / 10)) == 2 * 10 ** (-(40 + HALF_DB) / 10)


def rounded(pipe, recipe) -> list[str]:
    pipe.enable_visionfuse(recipe)
    try:
        return list(get(pipe).rounded["transformer"].layers)
    finally:
        pipe.disable_visionfuse()

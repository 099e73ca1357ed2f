"""Recipes: values, JSON, names, options and their errors; schedules by arithmetic."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, replace

import pytest

from visionfuse import Dense, Neighborhood, Order, Precision, Recipe, Schedule, recipes
from visionfuse.schedule import Moment, moment

FLUX_4K = recipes.build("gna", window=(80, 80), stride=(16, 16), dense_steps=9)
EXAMPLES = {
    "default": Recipe(),
    "auto": recipes.build("auto"),
    "gna": recipes.build("gna"),
    "sage": recipes.build("sage"),
    "fp8": recipes.build("gna", precision="fp8-smooth_k"),
    "flux_4k": FLUX_4K,
    "everything": Recipe(
        name="mine",
        order=Order(kind="tiled", tile=(2, 8, 8), subtile=(2, 4, 8)),
        plan=Neighborhood(
            window=(None, 24, 24), stride=(1, 8, 8), dilation=(1, 2, 1), causal=(True, False, False)
        ),
        precision=Precision(qk="int8", pv="fp8", smooth_v=True, k_scale="row"),
        schedule=Schedule(dense_start=0.25, dense_layers=(0, -1), min_steps=4),
    ),
}


@pytest.mark.parametrize("recipe", EXAMPLES.values(), ids=EXAMPLES)
def test_json_round_trip(recipe, tmp_path):
    recipe.save(tmp_path / "recipe.json")
    assert Recipe.load(tmp_path / "recipe.json") == recipe
    values = json.loads((tmp_path / "recipe.json").read_text())
    assert values["version"] == 1
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert hash(Recipe.from_dict(values)) == hash(recipe)


def test_recipes_from_before_precisions_load():
    values = FLUX_4K.to_dict() | {"precision": {"qk": "model", "pv": "model"}}
    assert Recipe.from_dict(values) == FLUX_4K
    del values["precision"]
    assert Recipe.from_dict(values) == FLUX_4K


def test_precisions_of_recipes():
    assert str(recipes.build("sage").precision) == "int8_fp8"
    assert (
        str(recipes.build("sage", qk="int4", pv="model", smooth_q=True).precision)
        == "int4+smooth_q"
    )
    assert recipes.build("sage").schedule.first_step(4) == 0
    for name in ("auto", "dense", "gna"):
        assert recipes.build(name, precision="fp8").precision == Precision(qk="fp8", pv="fp8")
        assert recipes.build(name, precision=Precision(pv="fp8")).precision.name == "model_fp8"


def test_recipes_are_frozen_and_keyword_only():
    with pytest.raises(FrozenInstanceError):
        FLUX_4K.name = "other"
    with pytest.raises(TypeError):
        Recipe("gna")
    assert replace(FLUX_4K, plan=Dense()).plan == Dense()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version=2"),
        ({"version": None}, "version=None"),
        ({"plan": {"kind": "spiral"}}, "Unknown plan kind 'spiral'"),
        ({"plan": {"kind": "neighborhood", "windows": 3}}, "no 'windows'"),
        ({"plan": {"kind": "neighborhood", "density": 0}}, "density must lie"),
        ({"schedule": {"dense_start": 9}}, r"\[0, 1\], got 9"),
        ({"precision": {"qk": "fp3"}}, "qk='fp3'"),
        ({"precision": {"smooth": True}}, "no 'smooth'"),
        ({"colour": "red"}, "no 'colour'"),
    ],
)
def test_wrong_json(change, message):
    with pytest.raises(ValueError, match=message):
        Recipe.from_dict({**FLUX_4K.to_dict(), **change})


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("gnaa", {}, ValueError, "Did you mean 'gna'"),
        ("gna", {"windw": 3}, TypeError, "Did you mean 'window'"),
        ("auto", {"window": 3}, TypeError, "no option 'window'"),
        ("gna", {"window": 3, "density": 0.3}, ValueError, "either window or density"),
        ("gna", {"dense_steps": 3, "dense_start": 0.3}, ValueError, "either dense_start"),
        ("gna", {"dense_steps": -1}, ValueError, "got -1"),
        ("gna", {"order": "snake"}, ValueError, "'snake'"),
        ("gna", {"precision": "fp3"}, ValueError, "'fp3'"),
        ("gna", {"density": 1.5}, ValueError, "1.5"),
        ("sage", {"qk": "int3"}, ValueError, "'int3'"),
        ("sage", {"precision": "fp8"}, TypeError, "no option 'precision'"),
        ("auto", {"precision": "fp8-fp8"}, ValueError, "'-fp8'"),
    ],
)
def test_wrong_options(name, options, error, message):
    with pytest.raises(error, match=message):
        recipes.build(name, **options)


def test_wrong_parts():
    with pytest.raises(TypeError, match="plan must be Dense or Neighborhood"):
        Recipe(plan="gna")


def test_auto_never_sparsifies():
    for name in ("auto", "dense"):
        assert recipes.build(name).plan == Dense()
        assert recipes.build(name).precision == Precision()


def test_gna_defaults_follow_the_resolution():
    recipe = recipes.build("gna")
    assert recipe.plan.density == recipes.GNA_DENSITY
    for grid in [(64, 64), (128, 96), (256, 256), (3, 4), (21, 45, 80), (21, 30, 52)]:
        resolved = recipe.plan.resolve(grid)
        assert all(
            s <= w <= n for s, w, n in zip(resolved.stride, resolved.window, grid, strict=True)
        )
    assert 0.15 < recipe.plan.resolve((256, 256)).density < 0.45
    # Never larger than the window.
    assert recipes.build("gna", window=5).plan.resolve((64, 64)).stride == (5, 5)


@pytest.mark.parametrize(
    ("schedule", "steps", "first"),
    [
        (Schedule(dense_start=9 / 28), 28, 9),
        (Schedule(dense_start=9 / 28), 50, 16),
        (Schedule(dense_start=9 / 28), 9, 3),
        (Schedule(dense_start=9 / 28), 8, 8),
        (Schedule(dense_start=9 / 28), 1, 1),
        (Schedule(dense_steps=9), 28, 9),
        (Schedule(dense_steps=30), 28, 28),
        (Schedule(dense_start=0), 20, 0),
        (Schedule(dense_start=1), 20, 20),
        (Schedule(dense_start=0, min_steps=0), 1, 0),
    ],
)
def test_first_step(schedule, steps, first):
    assert schedule.first_step(steps) == first
    phases = schedule.phases(steps)
    assert [p.start for p in phases][:1] == [0]
    assert phases[-1].end == steps
    assert sum(p.end - p.start for p in phases if p.kind == "plan") == steps - first


def test_asking_for_steps_lifts_the_limit_of_short_runs():
    assert recipes.build("gna").schedule.first_step(4) == 4
    assert recipes.build("gna", dense_steps=1).schedule.first_step(4) == 1
    assert recipes.build("gna", dense_start=0.5).schedule.first_step(4) == 2
    assert recipes.build("gna", dense_steps=1, min_steps=9).schedule.first_step(4) == 4


def test_dense_layers():
    assert Schedule(dense_layers=2).layers(57) == (0, 1)
    assert Schedule(dense_layers=(0, -1)).layers(57) == (0, 56)
    assert Schedule(dense_layers=99).layers(4) == (0, 1, 2, 3)
    with pytest.raises(ValueError, match=r"layers \[57\].*57"):
        Schedule(dense_layers=(57,)).layers(57)


def test_moment_of_real_schedulers():
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(6)
    assert moment(scheduler) == Moment(0, 6)
    scheduler.set_begin_index(2)
    assert moment(scheduler) == Moment(0, 4)
    import torch

    scheduler.step(torch.zeros(1, 4), scheduler.timesteps[2], torch.zeros(1, 4))
    assert moment(scheduler) == Moment(1, 4)
    scheduler.set_timesteps(5)
    assert moment(scheduler).step == 0
    assert moment(DDIMScheduler()) is None  # has no step index
    assert moment(None) is None

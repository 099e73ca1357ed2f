"""Recipes: values, JSON, names, options and their errors; schedules by arithmetic."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, replace

import pytest

from visionfuse import Dense, Neighborhood, Order, Precision, Recipe, Schedule, recipes
from visionfuse.recipe import Phase, Variant
from visionfuse.schedule import Moment, Span, count_steps, moment

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
        precision=Precision(qk="int8", pv="fp8", smooth_v=True, k_scale="token"),
        schedule=Schedule(dense_start=0.25, dense_layers=(0, -1), min_steps=4),
    ),
    # FPSAttention: coarse and sparse, then fine and dense, then in between.
    "fps": Recipe(
        variants=(
            Variant(
                name="coarse",
                plan=Neighborhood(window=(9, 12, 12), stride=(3, 4, 4)),
                precision=Precision.parse("fp8-smooth_k"),
            ),
            Variant(name="fine", precision=Precision.parse("fp8+smooth_v")),
            Variant(name="medium", plan=Neighborhood(density=0.5), precision=Precision(pv="fp8")),
        ),
        schedule=Schedule(
            phases=(
                Phase(until=0.2, variant="coarse"),
                Phase(until=0.8, variant="fine", layers={"stock": (0, -1), "coarse": (3, 4)}),
                Phase(variant="medium"),
            ),
            min_steps=0,
        ),
        note="three phases",
    ),
}


@pytest.mark.parametrize("recipe", EXAMPLES.values(), ids=EXAMPLES)
def test_json_round_trip(recipe, tmp_path):
    recipe.save(tmp_path / "recipe.json")
    assert Recipe.load(tmp_path / "recipe.json") == recipe
    values = json.loads((tmp_path / "recipe.json").read_text())
    assert values["version"] == 2
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert hash(Recipe.from_dict(values)) == hash(recipe)


def test_recipes_of_version_1_load():
    """As they were written before there were variants: row was the name of a scale for every token."""
    values: dict = EXAMPLES["everything"].to_dict() | {"version": 1}
    del values["variants"], values["note"], values["schedule"]["phases"]
    values["precision"] |= {"k_scale": "row", "q_scale": "row"}
    assert Recipe.from_dict(values) == EXAMPLES["everything"]


def test_recipes_from_before_precisions_load():
    values = FLUX_4K.to_dict() | {"precision": {"qk": "model", "pv": "model"}}
    assert Recipe.from_dict(values) == FLUX_4K
    del values["precision"]
    assert Recipe.from_dict(values) == FLUX_4K


def test_precisions_of_recipes():
    assert str(recipes.build("sage").precision) == "int8_fp8+k_thread"
    assert str(recipes.build("sage", qk="fp8").precision) == "fp8"
    int4 = recipes.build("sage", qk="int4", pv="model", smooth_q=True, k_scale="block")
    assert str(int4.precision) == "int4+smooth_q"
    assert recipes.build("sage").schedule.first_step(4) == 0
    finer = recipes.build("sage", pv="fp16", q_scale="thread", k_scale="token").precision
    assert (finer.pv, finer.q_scale, finer.k_scale) == ("fp16", "thread", "token")
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
        ({"version": 3}, "version=3"),
        ({"version": None}, "version=None"),
        ({"plan": {"kind": "spiral"}}, "Unknown plan kind 'spiral'"),
        ({"plan": {"kind": "neighborhood", "windows": 3}}, "no 'windows'"),
        ({"plan": {"kind": "neighborhood", "density": 0}}, "density must lie"),
        ({"schedule": {"dense_start": 9}}, r"\[0, 1\], got 9"),
        ({"precision": {"qk": "fp3"}}, "qk='fp3'"),
        ({"precision": {"smooth": True}}, "no 'smooth'"),
        ({"colour": "red"}, "no 'colour'"),
        ({"variants": [{"name": "a", "planet": {}}]}, "no 'planet'"),
        ({"variants": [{"name": "a"}, {"name": "a"}]}, "name of its own"),
        ({"variants": [{"name": "stock"}]}, "name of its own"),
        ({"schedule": {"phases": [{"variant": "b"}]}}, "names 'b'.*'stock', 'plan'"),
        ({"schedule": {"phases": [{"until": 0.5}]}}, "last at 1"),
        ({"schedule": {"phases": [{"until": 0.5}, {"until": 0.5}, {}]}}, "one after the other"),
        ({"schedule": {"phases": [{"until": 2}]}}, "got 2"),
        ({"schedule": {"phases": [{"unti": 1}]}}, "no 'unti'"),
        ({"schedule": {"phases": [{}], "dense_steps": 3}}, "either phases or dense_start"),
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
    spans = schedule.spans(steps)
    assert [s.start for s in spans][:1] == [0]
    assert spans[-1].end == steps
    assert sum(s.end - s.start for s in spans if s.variant == "plan") == steps - first


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


def test_phases():
    schedule = EXAMPLES["fps"].schedule
    exceptions = (("stock", (0, -1)), ("coarse", (3, 4)))
    assert schedule.spans(10) == (
        Span("coarse", 0, 2),
        Span("fine", 2, 8, exceptions),
        Span("medium", 8, 10),
    )
    assert schedule.spans(2) == (Span("fine", 0, 2, exceptions),), "phases without a step"
    names = ("stock", "fine", "fine", "coarse", "coarse", "stock")
    assert schedule.by_layer(schedule.spans(10)[1], 6) == names
    assert schedule.names == ("coarse", "fine", "stock", "medium")
    assert schedule.first_step(10) == 0
    first = Schedule(phases=(Phase(until=0.25, variant="stock"), Phase()), min_steps=0)
    assert first.first_step(20) == 5
    assert first.spans(20) == Schedule(dense_start=0.25, min_steps=0).spans(20)
    assert first.spans(3) == (Span("stock", 0, 1), Span("plan", 1, 3))
    assert Schedule(phases=(Phase(),)).spans(8) == (Span("stock", 0, 8),), "fewer than min_steps"
    with pytest.raises(ValueError, match=r"'coarse'.*\[4\].*4"):
        schedule.check_layers(4)
    kept = replace(schedule, dense_layers=(1,))
    assert kept.by_layer(Span("fine", 0, 1), 3) == ("fine", "stock", "fine")


@pytest.mark.parametrize("steps", [1, 3, 7, 20, 28, 50])
@pytest.mark.parametrize("schedule", [e.schedule for e in EXAMPLES.values()], ids=EXAMPLES)
def test_spans_cover_a_run(schedule, steps):
    spans = schedule.spans(steps)
    covered = [step for span in spans for step in range(span.start, span.end)]
    assert covered == list(range(steps))


def test_variants_share_one_order():
    with pytest.raises(ValueError, match="one dilation, got 1, 2"):
        Recipe(
            plan=Neighborhood(density=0.5),
            variants=(Variant(name="wide", plan=Neighborhood(density=0.5, dilation=2)),),
        )


def test_what_changes_numbers():
    assert not recipes.build("auto").changes_numbers
    assert recipes.build("sage").changes_numbers
    assert recipes.build("gna").changes_numbers
    assert EXAMPLES["fps"].changes_numbers
    assert [way.name for way in EXAMPLES["fps"].ways] == ["plan", "coarse", "fine", "medium"]


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


def test_steps_are_counted_where_a_scheduler_does_not_say():
    import copy
    import inspect

    import torch
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    scheduler = DDIMScheduler()
    before = inspect.signature(scheduler.step)
    undo = count_steps(scheduler)
    assert inspect.signature(scheduler.step) == before, "pipelines look for eta and generator in it"
    x = torch.zeros(1, 3, 4, 4)
    for _ in range(2):  # the second time with timesteps set anew
        scheduler.set_timesteps(4)
        for i, t in enumerate(scheduler.timesteps):
            assert moment(scheduler) == Moment(i, 4)
            scheduler.step(x, t, x)
    scheduler.set_timesteps(4)
    scheduler.step(x, scheduler.timesteps[0], x)
    twin = copy.deepcopy(scheduler)
    twin.step(x, scheduler.timesteps[1], x)
    assert moment(scheduler) == Moment(1, 4), "a copy steps itself"
    assert moment(twin).steps == 4
    undo()
    assert moment(scheduler) is None
    assert not {"step", "_visionfuse_steps"} & set(vars(scheduler))
    flow = FlowMatchEulerDiscreteScheduler()
    count_steps(flow)()
    assert "step" not in vars(flow)
    count_steps(None)()

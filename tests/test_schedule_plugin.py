"""Recipes of several variants in pipelines: which layers run what in which step, in one order of the tokens."""

from __future__ import annotations

import copy

import pytest
import torch

import visionfuse
from visionfuse import Dense, Neighborhood, Order, Precision, Recipe, Schedule, routing
from visionfuse.context import ACTIVE
from visionfuse.recipe import Phase, Variant
from visionfuse.testing_pipelines import (
    Graphs,
    explicit_mask,
    flux_pipeline,
    masked_attention,
    run,
    wan_pipeline,
)

BUILD = {"flux": flux_pipeline, "wan": wan_pipeline}
GRID = {"flux": (16, 24), "wan": (3, 4, 6)}
TEXT = {"flux": 48, "wan": 0}
ORDER = {
    "flux": Order(kind="tiled", tile=(4, 6), subtile=(2, 3)),
    "wan": Order(kind="tiled", tile=(2, 2, 3)),
}
LAYERS = {"flux": 4, "wan": 2}
SMALL, LARGE = Neighborhood(density=0.2, stride=2), Neighborhood(density=0.5, stride=2)


def recipe(family, *phases, **changes):
    variants = (
        Variant(name="small", plan=SMALL),
        Variant(name="large", plan=LARGE),
        Variant(name="rounded", precision=Precision.parse("fp8")),
        Variant(name="both", plan=LARGE, precision=Precision.parse("int8_fp8")),
    )
    schedule = Schedule(phases=phases, min_steps=0)
    return Recipe(
        order=ORDER[family], variants=variants, schedule=schedule, name="phases", **changes
    )


@pytest.fixture(scope="module", params=list(BUILD))
def family(request):
    return request.param


@pytest.fixture(scope="module")
def pipe(family):
    return BUILD[family]()


@pytest.fixture(autouse=True)
def _disabled(request):
    yield
    if "pipe" in request.fixturenames:
        request.getfixturevalue("pipe").disable_visionfuse()


@pytest.fixture(scope="module")
def stock(pipe):
    return run(pipe, steps=4)


def masks(family, layers: dict[int, Neighborhood]):
    """The masks that these layers should be equal to, by layer."""
    grid = [GRID[family]]
    return {i: explicit_mask(p, text=TEXT[family], grids=grid) for i, p in layers.items()}


def by_masks(pipe, family, schedule):
    """A stock run whose attention layers have explicit masks: schedule[step] = {layer: neighborhood}."""
    from visionfuse.schedule import moment
    from visionfuse.sites import denoisers

    hooks = []
    for denoiser in denoisers(pipe):
        for index, layer in enumerate(denoiser.site.layers(denoiser.model)):

            def add(module, args, kwargs, index=index):
                own = schedule[moment(pipe.scheduler).step].get(index)
                mask = None if own is None else masks(family, {index: own})[index]
                if len(args) > 2:
                    return (*args[:2], mask, *args[3:]), kwargs
                return args, {**kwargs, "attention_mask": mask}

            hooks.append(layer.register_forward_pre_hook(add, with_kwargs=True))
    try:
        return run(pipe, steps=len(schedule))
    finally:
        for hook in hooks:
            hook.remove()


def test_every_layer_and_step_runs_its_variant(pipe, family, stock):
    """Equal to explicit masks, layer by layer and step by step."""
    last = LAYERS[family] - 1
    phases = (
        Phase(until=0.25, variant="stock"),
        Phase(until=0.5, variant="small"),
        Phase(variant="small", layers={"large": (0,), "stock": (-1,)}),
    )
    pipe.enable_visionfuse(recipe(family, *phases))
    got = run(pipe, steps=4)
    second = dict.fromkeys(range(LAYERS[family]), SMALL)
    third = {0: LARGE, **dict.fromkeys(range(1, last), SMALL)}
    pipe.disable_visionfuse()
    expected = by_masks(pipe, family, [{}, second, third, third])
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-4 * float(expected.abs().max()))
    assert not torch.allclose(got, stock, atol=1e-2 * float(stock.abs().max()))


def test_phases_of_fps_attention(pipe, family, stock):
    """Coarse and sparse, fine and dense, in between: as three recipes of one variant, each in its part."""
    phases = (
        Phase(until=0.25, variant="both"),
        Phase(until=0.75, variant="rounded"),
        Phase(variant="large"),
    )
    pipe.enable_visionfuse(recipe(family, *phases))
    got = run(pipe, steps=4)
    found = visionfuse.report(pipe).denoisers[0]
    assert found.phases == ("step 0 both", "steps 1-2 rounded", "step 3 large")
    assert [v.name for v in found.variants] == ["large", "rounded", "both"]
    assert found.calls["dense"] == 0 < found.calls["plan"]
    assert "rounded" in str(visionfuse.report(pipe))
    assert float((got - stock).abs().mean()) > 0
    # All in one order, although a dense plan needs none.
    shared = found.order
    assert shared.kind == "tiled"


def test_stock_phases_are_stock(pipe, family, stock):
    pipe.enable_visionfuse(recipe(family, Phase(variant="stock")))
    assert torch.equal(run(pipe, steps=4), stock)
    pipe.enable_visionfuse(
        recipe(family, Phase(variant="small", layers={"stock": tuple(range(LAYERS[family]))}))
    )
    # Tokens lie in another order, which changes the last bits of sums.
    close = 1e-5 * float(stock.abs().max())
    torch.testing.assert_close(run(pipe, steps=4), stock, rtol=0, atol=close)


def test_one_phase_of_the_plan_is_the_plain_recipe(pipe, family):
    plain = Recipe(order=ORDER[family], plan=SMALL, schedule=Schedule(min_steps=0))
    pipe.enable_visionfuse(plain)
    expected = run(pipe, steps=4)
    pipe.enable_visionfuse(recipe(family, Phase(variant="small")))
    assert torch.equal(run(pipe, steps=4), expected)
    pipe.enable_visionfuse(
        Recipe(order=ORDER[family], plan=SMALL,
               schedule=Schedule(phases=(Phase(until=0.5), Phase()), min_steps=0))
    )  # fmt: skip
    assert torch.equal(run(pipe, steps=4), expected)


def test_it_leaves_no_trace(pipe, family, stock):
    layers = {"large": (0,), "rounded": (1,)}
    pipe.enable_visionfuse(recipe(family, Phase(variant="small", layers=layers)))
    seen = []

    def look(pipe, step, time, values):
        seen.append([type(p) for p in processors(pipe)])
        return values

    before = [type(p) for p in processors(pipe)]
    run(pipe, steps=4, callback_on_step_end=look)
    assert any(a is not b for types in seen for a, b in zip(types, before, strict=True))
    assert [type(p) for p in processors(pipe)] == before
    assert ACTIVE.variants == ()
    twin = copy.deepcopy(pipe)
    assert torch.equal(run(twin, steps=4), run(pipe, steps=4))
    twin.disable_visionfuse()
    pipe.disable_visionfuse()
    assert torch.equal(run(pipe, steps=4), stock)


def processors(pipe):
    from visionfuse.sites import denoisers

    return [
        layer.processor
        for denoiser in denoisers(pipe)
        for layer in denoiser.site.layers(denoiser.model)
    ]


def test_a_variant_that_cannot_help_is_left_to_the_model(pipe, family, stock):
    """A window of the whole grid in the model's format is the model's own attention."""
    everything = Variant(name="everything", plan=Neighborhood(window=GRID[family]))
    exact = Variant(name="exact", plan=Dense())
    phases = (Phase(until=0.5, variant="everything"), Phase(variant="exact"))
    pipe.enable_visionfuse(
        Recipe(variants=(everything, exact), schedule=Schedule(phases=phases, min_steps=0))
    )
    assert torch.equal(run(pipe, steps=4), stock)
    notes = visionfuse.report(pipe).denoisers[0].notes
    assert notes, "it says why"


def test_layers_that_the_model_has_not(pipe, family):
    wrong = recipe(family, Phase(variant="small", layers={"large": (40,)}))
    with pytest.raises(ValueError, match=r"'large'.*\[40\]"):
        pipe.enable_visionfuse(wrong)
    assert "_visionfuse" not in vars(pipe)


SLOW = pytest.mark.slow
# Graphs at most. Stock FLUX compiled by blocks has 3, and both of its classes meet one variant here. Wan's
# blocks meet stock and two variants; as a whole it has a graph a phase.
COMPILED = [
    pytest.param("flux", True, 5, id="flux-regional", marks=SLOW),
    pytest.param("wan", True, 3, id="wan-regional"),
    pytest.param("wan", False, 4, id="wan-whole", marks=SLOW),
]


@pytest.mark.parametrize(("family", "regional", "most"), COMPILED)
def test_compiled_graphs_are_few(family, regional, most):
    half = LAYERS[family] // 2
    phases = (
        Phase(until=0.25, variant="stock"),
        Phase(until=0.5, variant="small", layers={"large": tuple(range(half))}),
        Phase(until=0.75, variant="small", layers={"stock": tuple(range(half))}),
        Phase(variant="small", layers={"large": tuple(range(half))}),
    )
    compiled, counter = BUILD[family](), Graphs()
    compiled.enable_visionfuse(recipe(family, *phases))
    expected = run(compiled, steps=4)
    torch._dynamo.reset()
    if regional:
        compiled.transformer.compile_repeated_blocks(backend=counter, fullgraph=True)
    else:
        compiled.transformer = torch.compile(compiled.transformer, backend=counter, fullgraph=True)
    got = run(compiled, steps=4)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    assert counter.count <= most
    first = counter.count
    run(compiled, steps=4)
    assert counter.count == first, "a second run compiles nothing"
    torch._dynamo.reset()


def test_masks_of_steps_are_what_the_helper_says(pipe, family):
    """`by_masks` against `masked_attention`, which other tests trust."""
    same = dict.fromkeys(range(LAYERS[family]), SMALL)
    expected = by_masks(pipe, family, [same] * 2)
    with masked_attention(pipe, explicit_mask(SMALL, text=TEXT[family], grids=[GRID[family]])):
        assert torch.equal(run(pipe, steps=2), expected)


def test_routing_knows_these_processors(pipe):
    assert not any(routing.refusal(p) for p in processors(pipe))

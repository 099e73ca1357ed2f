"""FLUX with a recipe equals stock FLUX with the recipe's mask, whatever the order of the tokens."""

from __future__ import annotations

import pytest
import torch

import visionfuse
from visionfuse import Dense, Neighborhood, Order, Recipe, Schedule
from visionfuse.sites import Unsupported
from visionfuse.sites.flux import parse_ids
from visionfuse.testing_pipelines import explicit_mask, flux_pipeline, masked_attention, run

TEXT, GRID = 48, (16, 24)
PLAN = {"window": (7, 9), "stride": (2, 3)}
MOVED = Order(kind="tiled", tile=(4, 6), subtile=(2, 3))


def close(a, b, tolerance=1e-4):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * float(b.abs().max()))


@pytest.fixture(scope="module")
def pipe():
    return flux_pipeline()


@pytest.fixture(autouse=True)
def _disabled(pipe):
    yield
    pipe.disable_visionfuse()


@pytest.fixture(scope="module")
def stock(pipe):
    return run(pipe)


@pytest.fixture(scope="module")
def masked(pipe, stock):
    with masked_attention(pipe, explicit_mask(Neighborhood(**PLAN), text=TEXT, grids=[GRID])):
        result = run(pipe)
    assert (result - stock).abs().max() > 0.05, "the mask must matter, or the test shows nothing"
    return result


@pytest.mark.parametrize("impl", ["blocks", "reference"])
def test_dense_recipe_reproduces_stock(pipe, stock, impl):
    pipe.enable_visionfuse("dense", impl=impl)
    close(run(pipe), stock, 1e-5)
    assert visionfuse.report(pipe).denoisers[0].calls == {"plan": 3, "dense": 0}


@pytest.mark.parametrize(
    "order",
    ["auto", "row", MOVED, Order(kind="hilbert", tile=(8, 8))],
    ids=["auto", "row", "tiled", "hilbert"],
)
def test_neighborhood_equals_the_explicit_mask(pipe, masked, order):
    pipe.enable_visionfuse("gna", **PLAN, order=order, dense_steps=0)
    close(run(pipe), masked)
    assert visionfuse.report(pipe).denoisers[0].calls == {"plan": 3, "dense": 0}


def test_order_alone_changes_nothing(pipe, stock):
    """Rotary tables and the output follow the tokens."""
    recipe = Recipe(plan=Dense(), order=MOVED, schedule=Schedule(min_steps=0))
    pipe.enable_visionfuse(recipe, impl="blocks")
    close(run(pipe), stock, 1e-5)
    assert visionfuse.report(pipe).denoisers[0].order == MOVED


def run_stock(pipe, **arguments):
    pipe.disable_visionfuse()
    return run(pipe, **arguments)


def test_window_of_the_whole_grid_is_stock(pipe, stock):
    pipe.enable_visionfuse("gna", window=GRID, dense_steps=0)
    assert torch.equal(run(pipe), stock)
    assert "every token" in str(visionfuse.report(pipe))


def test_schedule_switches_at_the_step(pipe):
    """Two dense steps, then the mask: the stock pipeline with the mask switched on by a callback."""
    mask = explicit_mask(Neighborhood(**PLAN), text=TEXT, grids=[GRID])

    def switch(pipe, step, time, tensors):
        if step == 1:
            pipe._joint_attention_kwargs = {"attention_mask": mask}
        return tensors

    expected = run(pipe, steps=5, callback_on_step_end=switch)
    pipe.enable_visionfuse("gna", **PLAN, order=MOVED, dense_start=0.4)
    close(run(pipe, steps=5), expected)
    report = visionfuse.report(pipe).denoisers[0]
    assert report.calls == {"plan": 3, "dense": 2}
    assert report.phases == ("steps 0-1 dense", "steps 2-4 plan")


def test_dense_layers(pipe):
    mask = explicit_mask(Neighborhood(**PLAN), text=TEXT, grids=[GRID])
    layers = [b.attn for b in (*pipe.transformer.transformer_blocks,
                               *pipe.transformer.single_transformer_blocks)]  # fmt: skip
    add = lambda module, args, kwargs: (args, {**kwargs, "attention_mask": mask})
    handles = [layers[i].register_forward_pre_hook(add, with_kwargs=True) for i in (1, 2)]
    expected = run(pipe)
    for handle in handles:
        handle.remove()
    pipe.enable_visionfuse("gna", **PLAN, order=MOVED, dense_steps=0, dense_layers=(0, -1))
    close(run(pipe), expected)
    assert visionfuse.report(pipe).denoisers[0].routed == 2


def test_short_runs_stay_dense_unless_asked(pipe, stock):
    pipe.enable_visionfuse("gna", **PLAN)
    assert torch.equal(run(pipe), stock)
    assert "all of this run's 3 steps dense" in str(visionfuse.report(pipe))
    pipe.enable_visionfuse("gna", **PLAN, min_steps=0)
    assert not torch.equal(run(pipe), stock)


def test_inference_mode_does_not_taint_cached_plans(pipe):
    pipe.enable_visionfuse("gna", density=0.37, stride=2, order=MOVED, dense_steps=0)
    with torch.inference_mode():
        expected = run(pipe)
    plan = vars(pipe)["_visionfuse"].ran["transformer"].plan
    assert not plan.permutation.is_inference()
    assert not any(t.is_inference() for t in plan.blocks.to_tensors())
    close(run(pipe), expected)


def test_auto_is_the_models_own_attention(pipe, stock):
    pipe.enable_visionfuse()
    assert torch.equal(run(pipe), stock)
    assert "own attention" in str(visionfuse.report(pipe))


def test_a_mask_in_the_call_wins(pipe):
    """The recipe steps back: no order, no plan, and the report says so."""
    mask = torch.ones(1, 1, TEXT + 384, TEXT + 384, dtype=torch.bool).tril()
    with_mask = {"joint_attention_kwargs": {"attention_mask": mask}}
    expected = run(pipe, **with_mask)
    pipe.enable_visionfuse("gna", **PLAN, order=MOVED, dense_steps=0)
    assert torch.equal(run(pipe, **with_mask), expected)
    assert "attention mask" in str(visionfuse.report(pipe))


def test_a_mask_that_a_layer_adds_follows_the_order(pipe):
    """A mask that appears below the transformer is in the model's order, the tokens are not."""
    mask = torch.rand(TEXT + 384, TEXT + 384) < 0.3
    with masked_attention(pipe, mask):
        expected = run(pipe)
        pipe.enable_visionfuse("gna", **PLAN, order=MOVED, dense_steps=0)
        close(run(pipe), expected)
    assert "attention mask" in str(visionfuse.report(pipe))


# -- ids ---------------------------------------------------------------------------------------------


def ids(*grids, dtype=torch.float32):
    parts = [
        torch.stack(
            torch.meshgrid(torch.tensor([float(image)]), rows, columns, indexing="ij"), -1
        ).reshape(-1, 3)
        for image, rows, columns in grids
    ]
    return torch.cat(parts).to(dtype)


def span(n, start=0):
    return torch.arange(start, start + n, dtype=torch.float32)


@pytest.mark.parametrize(
    ("grids", "expected"),
    [
        ([(0, span(16), span(24))], [(16, 24)]),
        ([(0, span(1), span(24))], [(1, 24)]),
        ([(0, span(24), span(1))], [(24, 1)]),
        ([(0, span(16), span(24)), (1, span(8), span(6))], [(16, 24), (8, 6)]),
        ([(0, span(16), span(24)), (1, span(16), span(24))], [(16, 24), (16, 24)]),
        ([(0, span(4), span(6)), (1, span(4, 4), span(6)), (1, span(4, 8), span(5))],
         [(4, 6), (4, 6), (4, 5)]),
    ],
)  # fmt: skip
def test_ids_name_grids(grids, expected):
    assert parse_ids(ids(*grids)) == expected
    assert parse_ids(ids(*grids)[None]) == expected


def test_ids_that_are_no_grid():
    assert "do not count" in parse_ids(torch.ones(384, 3)).reason
    assert "do not count" in parse_ids(torch.randperm(384)[:, None].expand(-1, 3).float()).reason
    assert "shape" in parse_ids(torch.zeros(384, 5)).reason
    wide = parse_ids(ids((0, span(8), span(300)), dtype=torch.bfloat16))
    assert isinstance(wide, Unsupported)
    assert "256" in wide.reason


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_ids_with_nan_are_an_error(value):
    bad = ids((0, span(4), span(4)))
    bad[3, 1] = value
    with pytest.raises(ValueError, match="1 of 16 image tokens are NaN or infinite"):
        parse_ids(bad)


def test_other_ids_fall_back_and_say_so(pipe, monkeypatch):
    dummy = lambda batch, h, w, device, dtype: torch.ones(h * w, 3, device=device, dtype=dtype)
    monkeypatch.setattr(pipe, "_prepare_latent_image_ids", dummy)
    expected = run(pipe)
    pipe.enable_visionfuse("gna", **PLAN, dense_steps=0)
    assert torch.equal(run(pipe), expected)
    assert "do not count out a grid" in str(visionfuse.report(pipe))


def test_nan_ids_stop_the_call_and_leave_the_pipe_whole(pipe, stock, monkeypatch):
    nan = lambda batch, h, w, device, dtype: torch.full((h * w, 3), float("nan"), dtype=dtype)
    pipe.enable_visionfuse("gna", **PLAN, dense_steps=0)
    with monkeypatch.context() as patch:
        patch.setattr(pipe, "_prepare_latent_image_ids", nan)
        with pytest.raises(ValueError, match="NaN or infinite"):
            run(pipe)
    assert torch.equal(run_stock(pipe), stock)


def test_window_larger_than_the_grid(pipe, stock):
    pipe.enable_visionfuse("gna", window=(17, 9), stride=1, dense_steps=0)
    with pytest.raises(ValueError, match=r"window=17.*at most 16"):
        run(pipe)
    assert torch.equal(run_stock(pipe), stock)

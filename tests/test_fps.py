"""The recipes "fps" and "sta": what they say, and that families of denoisers run them as they are."""

from __future__ import annotations

import json
from math import prod

import pytest
import torch

import visionfuse
from visionfuse import Dense, Recipe, recipes
from visionfuse.kernels.plan import TileWindow
from visionfuse.kernels.plan.neighborhood import neighborhood_mask
from visionfuse.recipes import FPS_ALPHAS, FPS_PRECISIONS, phases_until
from visionfuse.schedule import Phase
from visionfuse.testing_families import TINY
from visionfuse.testing_pipelines import explicit_mask, masked_attention, run, wan_pipeline

GRID, TILE = (3, 4, 6), (2, 2, 3)
WINDOWS = {"coarse": (1, 1, 1), "fine": (2, 2, 1), "medium": (1, 2, 2)}


def close(a, b, tolerance=1e-4):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * float(b.abs().max()))


# -- what they say ------------------------------------------------------------------------------------


def test_three_phases():
    recipe = recipes.build("fps")
    assert [str(v.precision) for v in recipe.variants] == list(FPS_PRECISIONS.values())
    assert [v.plan.density for v in recipe.variants] == [0.09, 0.5, 0.25]
    ends = [span.end for span in recipe.schedule.spans(50)]
    assert ends == [round(50 * FPS_ALPHAS[0]), round(50 * FPS_ALPHAS[1]), 50]
    assert recipe.schedule.first_step(8) == 8  # short runs have no step to spare
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert hash(recipe) == hash(recipes.build("fps"))


def test_every_option():
    recipe = recipes.build(
        "fps", coarse=(3, 3, 1), fine=None, medium=0.4, tile=(6, 8, 8), alpha1=0.4, alpha2=0.7,
        precision=("fp8_tile", "model", "int8_fp8"), dense_start=0.1, dense_layers=(0, -1),
    )  # fmt: skip
    coarse, fine, medium = recipe.variants
    assert coarse.plan == TileWindow(window=(3, 3, 1), tile=(6, 8, 8))
    assert fine.plan == Dense()
    assert medium.plan == TileWindow(density=0.4, tile=(6, 8, 8))
    assert [str(v.precision) for v in recipe.variants] == ["fp8_tile", "model", "int8_fp8"]
    spans = recipe.schedule.spans(10)
    assert [(s.variant, s.start, s.end) for s in spans] == [("stock", 0, 1), ("coarse", 1, 4), ("fine", 4, 7), ("medium", 7, 10)]  # fmt: skip
    assert recipe.schedule.layers(30) == (0, 29)
    assert recipes.build("fps", precision="fp8_tile").variants[2].precision == coarse.precision
    by_head = recipes.build("fps", coarse=((1, 2, 2), (5, 1, 1)), tile=(1, 8, 8))
    assert by_head.variants[0].plan == TileWindow(heads=((1, 2, 2), (5, 1, 1)), tile=(1, 8, 8))
    assert Recipe.from_dict(by_head.to_dict()) == by_head


@pytest.mark.parametrize(
    ("alphas", "names"),
    [((0, 0), ["medium"]), ((0, 1), ["fine"]), ((0.5, 0.5), ["coarse", "medium"]), ((1, 1), ["coarse"]), ((0.5, 1), ["coarse", "fine"])],
)  # fmt: skip
def test_phases_that_do_not_exist(alphas, names):
    recipe = recipes.build("fps", alpha1=alphas[0], alpha2=alphas[1])
    assert [span.variant for span in recipe.schedule.spans(10)] == names


def test_phases_end_where_they_are_told_to():
    assert phases_until({"a": 0.0, "b": 0.5, "c": 0.5, "d": 1}) == (
        Phase(until=0.5, variant="b"),
        Phase(until=1.0, variant="d"),
    )


@pytest.mark.parametrize(
    ("name", "options", "error", "said"),
    [
        ("fps", {"alpha1": 0.7}, ValueError, "alpha1 <= alpha2"),
        ("fps", {"alpha2": 1.5}, ValueError, "alpha2=1.5"),
        ("fps", {"dense_start": -1}, ValueError, "dense_start=-1"),
        ("fps", {"precision": ("fp8", "fp8")}, ValueError, "three phases"),
        ("fps", {"coarse": 1.5}, ValueError, "density must lie"),
        ("fps", {"coarse": (0, 1, 1)}, ValueError, "at least 1"),
        ("fps", {"coarse": ((1, 1), (0, 1))}, ValueError, "at least 1"),
        ("fps", {"sparse": 0.1}, TypeError, "no option 'sparse'"),
        ("sta", {"window": 3, "density": 0.1}, ValueError, "needs one of window"),
        ("sta", {"dense_start": 0.1, "dense_steps": 3}, ValueError, "either dense_start"),
    ],
)
def test_wrong_options(name, options, error, said):
    with pytest.raises(error, match=said):
        recipes.build(name, **options)


def test_windows_by_head_are_saved():
    recipe = recipes.build("sta", heads=((3, 3, None), 1), tile=(2, 2, 3), precision="fp8_tile")
    values = recipe.to_dict()
    assert json.loads(json.dumps(values)) == values
    assert Recipe.from_dict(values) == recipe
    assert recipe.plan.heads == ((3, 3, None), 1)


def test_one_recipe_has_one_tile():
    with pytest.raises(ValueError, match="hence one tile"):
        Recipe(
            plan=TileWindow(window=1, tile=4),
            variants=(visionfuse.recipe.Variant(name="other", plan=TileWindow(window=1, tile=8)),),
        )


def test_windows_that_cannot_fit_are_refused_before_a_run():
    with pytest.raises(ValueError, match="axes"):
        TileWindow(window=(3, 3)).check_axes(3, "this has a grid of 3 axes")
    with pytest.raises(ValueError, match="axes"):
        TileWindow(window=3, tile=(8, 8)).check_axes(3, "this has a grid of 3 axes")
    with pytest.raises(ValueError, match="axes"):
        TileWindow(heads=((3, 3, 3), (3, 3))).check_axes(3, "this has a grid of 3 axes")


# -- what they do -------------------------------------------------------------------------------------


def windows_mask(windows):
    """bool [S, S], the rule pair by pair."""
    return neighborhood_mask(TileWindow(window=windows, tile=TILE).resolve(GRID))


@pytest.mark.parametrize("two_stages", [False, True], ids=["Wan 2.1", "Wan 2.2"])
def test_every_phase_is_the_model_under_its_mask(two_stages):
    """And fractions are those of the whole run, whichever transformer has the step."""
    pipe = wan_pipeline(two_stages=two_stages)
    steps, ends = 5, {"coarse": 2, "fine": 4, "medium": 5}
    with masked_attention(pipe, windows_mask(WINDOWS["coarse"])) as switch:

        def at_the_end_of(pipe, step, time, values):
            following = [name for name, end in ends.items() if step + 1 < end]
            if following:
                switch(windows_mask(WINDOWS[following[0]]))
            return values

        expected = run(pipe, steps=steps, callback_on_step_end=at_the_end_of)
    pipe.enable_visionfuse("fps", **WINDOWS, tile=TILE, alpha1=0.4, alpha2=0.8, precision="model")
    close(run(pipe, steps=steps), expected)
    said = visionfuse.report(pipe).denoisers
    assert len(said) == 1 + two_stages
    assert sum(d.calls["plan"] for d in said) == 2 * steps
    assert all(v.full_share == 1 for d in said for v in d.variants)
    for d in said:
        assert [span.split()[-1] for span in d.phases] == list(WINDOWS)
        assert d.order is not None
        assert d.order.tile == TILE


def test_eight_bits_change_a_little_more():
    pipe = wan_pipeline()
    stock = run(pipe, steps=4)
    found = {}
    for precision in ("model", None):
        pipe.enable_visionfuse("fps", **WINDOWS, tile=TILE, min_steps=0, precision=precision)
        found[precision] = run(pipe, steps=4)
    change = (found[None] - found["model"]).abs().mean()
    assert 0 < change < (found["model"] - stock).abs().mean()
    text = str(visionfuse.report(pipe))
    for precision in FPS_PRECISIONS.values():
        assert f"{precision}, emulated" in text


@pytest.mark.parametrize("family", ["hunyuan_video", "hunyuan_video_15", "cogvideox_2b", "cogvideox_5b", "ltx", "ltx2", "wan_vace", "skyreels"])  # fmt: skip
def test_video_families_run_all_phases(family):
    """Text is seen by all tokens. Where tokens cannot change places, windows are cut out of rows by masks."""
    tiny = TINY[family]()
    stock = tiny.run(num_inference_steps=3)
    tile = tuple(max(1, n // 2) for n in tiny.grid)
    tiny.pipe.enable_visionfuse("fps", coarse=1, fine=(1, 1, 2), medium=(1, 2, 1), tile=tile, alpha1=0.34, alpha2=0.67)  # fmt: skip
    out = tiny.run(num_inference_steps=3)
    said = visionfuse.report(tiny.pipe).denoisers[0]
    assert said.routed == said.layers == tiny.layers
    assert said.calls["plan"] >= 3
    assert said.calls["dense"] == 0, said.notes
    assert said.order is not None
    assert said.order.kind == ("tiled" if tiny.moves else "row")
    assert out.isfinite().all()
    assert (out - stock).abs().max() > 1e-3 * stock.abs().max()
    tiny.pipe.disable_visionfuse()
    assert torch.equal(tiny.run(num_inference_steps=3), stock)


def test_heads_have_windows_of_their_own_in_a_pipeline():
    pipe = wan_pipeline()
    spec = TileWindow(heads=((1, 1, 2), (2, 2, 1)), tile=TILE)
    masks = torch.stack([windows_mask(window) for window in spec.heads])  # [H, S, S]
    with masked_attention(pipe, masks[None]):
        expected = run(pipe)
    pipe.enable_visionfuse("sta", heads=spec.heads, tile=TILE, dense_start=0.0)
    close(run(pipe), expected)
    said = visionfuse.report(pipe).denoisers[0].variants[0]
    assert "2 kinds" in said.what


def test_sta_equals_the_explicit_mask():
    pipe = wan_pipeline()
    spec = TileWindow(window=(2, 1, 2), tile=TILE)
    with masked_attention(pipe, explicit_mask(spec, grids=[GRID])):  # pyright: ignore
        expected = run(pipe)
    pipe.enable_visionfuse("sta", window=spec.window, tile=TILE, dense_steps=0)
    close(run(pipe), expected)
    assert visionfuse.report(pipe).denoisers[0].density == spec.resolve(GRID).visible / prod(GRID) ** 2  # fmt: skip

"""Presets: the paper's numbers, valid on every grid, carried over by proportion."""

from math import prod

import diffusers
import pytest
from hypothesis import given
from hypothesis import strategies as st

from visionfuse.kernels.plan import Neighborhood
from visionfuse.presets import PRESETS, preset
from visionfuse.recipes import build

GRIDS = {2: st.tuples(*[st.integers(4, 300)] * 2), 3: st.tuples(*[st.integers(2, 100)] * 3)}


@pytest.mark.parametrize("known", PRESETS, ids=lambda p: p.name)
def test_presets_are_of_diffusers_models_and_fit_their_grid(known):
    assert hasattr(diffusers, known.model)
    assert preset(known.model, known.grid) == known
    rule = known.neighborhood.resolve(known.grid)
    assert 0.08 < rule.density < 0.35
    assert known.source in known.describe()


def test_the_papers_own():
    """arXiv 2504.16922: density, windows and dense steps of its tables."""
    flux = preset("FluxTransformer2DModel", (256, 256))
    assert (flux.window, flux.stride, round(28 * flux.dense_start)) == ((80, 80), (16, 16), 9)
    hunyuan = preset("HunyuanVideoTransformer3DModel", (30, 48, 80))
    assert hunyuan.neighborhood.resolve(hunyuan.grid).density == pytest.approx(1 - 0.91, abs=0.001)
    assert round(50 * hunyuan.dense_start) == 15
    cosmos = preset("CosmosTransformer3DModel", (16, 44, 80))
    assert cosmos.neighborhood.resolve(cosmos.grid).density == pytest.approx(1 - 0.89, abs=0.002)
    assert {p.source for p in (flux, hunyuan, cosmos)} == {"paper"}


def test_small_grids_and_other_models_have_none():
    assert preset("FluxTransformer2DModel", (32, 32)) is None  # flux-micro at 512 x 512
    assert preset("FluxTransformer2DModel", (21, 45, 80)) is None
    assert preset("UNet2DConditionModel", (64, 64)) is None


@given(st.sampled_from(PRESETS), st.data())
def test_every_grid_gets_a_window_that_fits(known, data):
    grid = data.draw(GRIDS[len(known.grid)])
    found = preset(known.model, grid)
    if found is None:
        assert prod(grid) < prod(known.grid)
        return
    found.neighborhood.resolve(grid)  # raises where it does not fit
    assert found.grid == grid


def test_windows_keep_their_share_of_the_grid():
    found = preset("HunyuanVideoTransformer3DModel", (33, 45, 80))
    assert found.scaled_from == (30, 48, 80)
    assert found.window == (20, 24, 24)  # 18/30 of 33 frames, 24/48 of 45 rows in strides of 8
    assert found.stride == (16, 8, 8)
    assert "scaled from 30x48x80" in found.describe()


def test_gna_takes_a_preset_by_name():
    recipe = build("gna", preset="flux.1 4k")
    assert recipe.plan == Neighborhood(window=(80, 80), stride=(16, 16))
    assert recipe.schedule.first_step(28) == 9
    changed = build("gna", preset="HunyuanVideo 720p", stride=(1, 8, 8), dense_steps=4)
    assert changed.plan == Neighborhood(window=(18, 24, 24), stride=(1, 8, 8))
    assert changed.schedule.first_step(50) == 4
    by_density = build("gna", preset="FLUX.1 4K", density=0.5)
    assert by_density.plan == build("gna", density=0.5).plan


def test_an_unknown_preset_names_the_choices():
    with pytest.raises(ValueError, match=r"no preset 'FLUX 4K'.*'FLUX.1 4K' \(paper\)"):
        build("gna", preset="FLUX 4K")

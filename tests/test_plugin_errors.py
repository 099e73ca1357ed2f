"""Bad input: what is wrong, the values, what to do; and nothing has changed afterwards."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL, DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.modular_pipelines import FluxAutoBlocks

import visionfuse
from visionfuse import Dense, Neighborhood, Order, Recipe, Schedule
from visionfuse.testing_pipelines import (
    explicit_mask,
    flux_components,
    flux_pipeline,
    masked_attention,
    run,
)


@pytest.fixture(scope="module")
def pipe():
    return flux_pipeline()


BAD = {
    "unknown recipe": (("magic",), {}, ValueError, "Unknown recipe 'magic'.*auto, dense, gna"),
    "not a recipe": ((3,), {}, TypeError, "name or a Recipe, got int"),
    "unknown option": (("gna",), {"windows": 3}, TypeError, "Did you mean 'window'"),
    "options with an object": ((Recipe(),), {"window": 3}, TypeError, "window=3"),
    "unknown implementation": (("gna",), {"impl": "cuda"}, ValueError, "'cuda'.*reference, blocks"),
    "stride over window": (("gna",), {"window": 4, "stride": 5}, ValueError, "stride.*larger"),
    "zero window": (("gna",), {"window": 0, "stride": 1}, ValueError, "window=0"),
    "zero stride": (("gna",), {"window": 4, "stride": 0}, ValueError, "stride=0"),
    "three axes": (("gna",), {"window": (3, 3, 3)}, ValueError, r"has 3 values.*2 axes"),
    "tile of three axes": (
        ("gna",), {"order": Order(kind="tiled", tile=(1, 2, 3))}, ValueError, r"tile=\(1, 2, 3\)",
    ),
    "layers that do not exist": (("gna",), {"dense_layers": (4,)}, ValueError, r"\[4\].*has 4"),
    "precision": (("gna",), {"precision": "fp3"}, ValueError, "'fp3'.*Available"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_options_change_nothing(pipe, name):
    args, options, error, message = BAD[name]
    before, call = dict(vars(pipe)), type(pipe).__call__
    with pytest.raises(error, match=message):
        pipe.enable_visionfuse(*args, **options)
    assert vars(pipe) == before
    assert type(pipe).__call__ is call


def test_a_failed_change_keeps_the_recipe(pipe):
    pipe.enable_visionfuse("gna", density=0.5)
    with pytest.raises(ValueError, match="Unknown recipe"):
        pipe.enable_visionfuse("magic")
    assert visionfuse.report(pipe).recipe.plan.density == 0.5
    pipe.disable_visionfuse()


def test_a_named_implementation_that_cannot_run_says_why():
    wide = flux_pipeline(
        attention_head_dim=512, num_attention_heads=1, axes_dims_rope=(128, 128, 256)
    )
    before = dict(vars(wide))
    with pytest.raises(ValueError, match=r"impl='triton' cannot run here") as error:
        wide.enable_visionfuse("gna", impl="triton")
    for words in ("on cpu: ", "head dim may be at most 256, got 512", "Use impl='auto'"):
        assert words in str(error.value)
    assert vars(wide) == before


def test_not_a_pipeline(pipe):
    for function in (
        visionfuse.enable_visionfuse,
        visionfuse.disable_visionfuse,
        visionfuse.report,
    ):
        with pytest.raises(TypeError, match=r"got FluxTransformer2DModel.*pipeline itself"):
            function(pipe.transformer)


def test_a_model_without_sites():
    unet = UNet2DModel(
        sample_size=8, block_out_channels=(8,), down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",), norm_num_groups=2, layers_per_block=1,
    )  # fmt: skip
    pipe = DDPMPipeline(unet, DDPMScheduler())
    with pytest.raises(
        ValueError, match=r"has UNet2DModel, supported are .*FluxTransformer2DModel, .*Wan"
    ):
        pipe.enable_visionfuse("gna")
    pipe.enable_visionfuse()  # exact for every model
    assert "supported are" in str(visionfuse.report(pipe))
    pipe.set_progress_bar_config(disable=True)
    assert pipe(num_inference_steps=1, output_type="np").images.shape == (1, 8, 8, 3)
    pipe.disable_visionfuse()


def test_reports_read_well(pipe):
    assert "not enabled" in str(visionfuse.report(pipe))
    pipe.enable_visionfuse("gna", dense_steps=1)
    before = str(visionfuse.report(pipe))
    assert "4 of 4 layers" in before
    assert "density 0.3" in before
    run(pipe)
    after = str(visionfuse.report(pipe))
    for words in (
        "text 48 + grid 16x24 = 432",
        "step 0 dense, steps 1-2 plan",
        "visited",
        "blocks",
    ):
        assert words in after
    from rich.console import Console

    console = Console(width=120)
    with console.capture() as capture:
        console.print(visionfuse.report(pipe))
    assert "432" in capture.get()
    pipe.disable_visionfuse()


def test_a_scheduler_without_steps_keeps_the_run_dense(pipe):
    recipe = Recipe(plan=Neighborhood(density=0.3), schedule=Schedule(dense_start=0.3))
    pipe.enable_visionfuse(recipe)
    stock_scheduler, pipe.scheduler = pipe.scheduler, Silent(pipe.scheduler)
    try:
        dense = run(pipe)
        assert "does not tell the step" in str(visionfuse.report(pipe))
        pipe.disable_visionfuse()
        assert torch.equal(run(pipe), dense)
    finally:
        pipe.scheduler = stock_scheduler


class Silent:
    """A scheduler that steps, but does not say where it is, as DDIM's does not."""

    def __init__(self, scheduler):
        self._scheduler = scheduler

    def __getattr__(self, name):
        if name in ("step_index", "_scheduler"):
            raise AttributeError(name)
        return getattr(self._scheduler, name)

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None):
        self._scheduler.set_timesteps(num_inference_steps, device, sigmas=sigmas, mu=mu)


def test_modular_pipeline():
    pipe = FluxAutoBlocks().init_pipeline()
    pipe.update_components(**flux_components())
    pipe.set_progress_bar_config(disable=True)

    def call():
        return pipe(
            prompt="a red cube", height=32, width=48, num_inference_steps=3, output="latents",
            max_sequence_length=48, output_type="latent", generator=torch.Generator().manual_seed(0),
        )  # fmt: skip

    stock, plan = call(), {"density": 0.3, "stride": 2}
    with masked_attention(pipe, explicit_mask(Neighborhood(**plan), text=48, grids=[(16, 24)])):
        expected = call()
    pipe.enable_visionfuse("gna", **plan, order=Order(kind="tiled", tile=(4, 6)), dense_steps=0)
    torch.testing.assert_close(call(), expected, rtol=0, atol=1e-4)
    assert (expected - stock).abs().max() > 0.05
    pipe.disable_visionfuse()
    assert torch.equal(call(), stock)


def test_vae_keeps_its_own_attention(pipe):
    """A VAE with attention of the class that diffusers' own `set_attention_backend` would break."""
    vae = AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=2, latent_channels=1, shift_factor=0.0
    ).eval()
    before = [vars(m.processor).copy() for m in vae.modules() if hasattr(m, "processor")]
    assert before
    stock_vae, pipe.vae = pipe.vae, vae
    try:
        pipe.enable_visionfuse(Recipe(plan=Dense(), schedule=Schedule(min_steps=0)), impl="blocks")
        run(pipe, output_type="pt")
        after = [vars(m.processor) for m in vae.modules() if hasattr(m, "processor")]
        assert after == before
    finally:
        pipe.vae = stock_vae
        pipe.disable_visionfuse()

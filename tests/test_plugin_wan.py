"""Wan with a recipe equals stock Wan with the recipe's mask, in every layout that its family has."""

from __future__ import annotations

import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline

import visionfuse
from visionfuse import Dense, Neighborhood, Order, Recipe, Schedule
from visionfuse.sites.order import OrderedRope, permute_patches
from visionfuse.testing_pipelines import (
    explicit_mask,
    masked_attention,
    run,
    wan_pipeline,
    wan_transformer,
)

GRID = (3, 4, 6)
PLAN = {"window": (2, 3, 4), "stride": (1, 1, 2)}
MOVED = Order(kind="tiled", tile=(2, 2, 3))


def close(a, b, tolerance=1e-4):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * float(b.abs().max()))


def masked_run(pipe, **arguments):
    with masked_attention(pipe, explicit_mask(Neighborhood(**PLAN), grids=[GRID])):
        return run(pipe, **arguments)


@pytest.fixture(scope="module")
def pipe():
    return wan_pipeline()


@pytest.fixture(autouse=True)
def _disabled(pipe):
    yield
    pipe.disable_visionfuse()


@pytest.fixture(scope="module")
def stock(pipe):
    return run(pipe)


@pytest.mark.parametrize("order", [Order(kind="row"), MOVED], ids=["row", "tiled"])
def test_dense_recipe_reproduces_stock(pipe, stock, order):
    recipe = Recipe(plan=Dense(), order=order, schedule=Schedule(min_steps=0))
    pipe.enable_visionfuse(recipe, impl="blocks")
    close(run(pipe), stock, 1e-5)
    # Classifier-free guidance: two forwards a step.
    assert visionfuse.report(pipe).denoisers[0].calls == {"plan": 6, "dense": 0}


@pytest.mark.parametrize(
    "order",
    ["auto", "row", MOVED, Order(kind="hilbert", tile=(2, 2, 2))],
    ids=["auto", "row", "tiled", "hilbert"],
)
def test_neighborhood_equals_the_explicit_mask(pipe, stock, order):
    expected = masked_run(pipe)
    assert (expected - stock).abs().max() > 0.05
    pipe.enable_visionfuse("gna", **PLAN, order=order, dense_steps=0)
    close(run(pipe), expected)


@pytest.mark.parametrize("dense_steps", [1, 2])
def test_two_transformers_and_a_schedule(dense_steps):
    """Wan 2.2: high-noise steps on one transformer, the rest on the other; one schedule for both."""
    pipe = wan_pipeline(two_stages=True)
    mask = explicit_mask(Neighborhood(**PLAN), grids=[GRID])
    order: list[str] = []
    for name in ("transformer", "transformer_2"):
        getattr(pipe, name).register_forward_pre_hook(lambda *a, name=name: order.append(name))

    with masked_attention(pipe, None) as switch:
        expected = run(pipe, steps=4, callback_on_step_end=lambda p, i, t, kw: (
            switch(mask) if i == dense_steps - 1 else None) or kw)  # fmt: skip
    assert set(order) == {"transformer", "transformer_2"}
    pipe.enable_visionfuse("gna", **PLAN, order=MOVED, dense_steps=dense_steps)
    close(run(pipe, steps=4), expected)
    first, second = visionfuse.report(pipe).denoisers
    assert first.calls["plan"] + second.calls["plan"] == 2 * (4 - dense_steps)
    assert first.calls["dense"] + second.calls["dense"] == 2 * dense_steps


def test_unipc_scheduler():
    pipe = wan_pipeline(
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        )
    )
    expected = masked_run(pipe)
    pipe.enable_visionfuse("gna", **PLAN, order=MOVED, dense_steps=0)
    close(run(pipe), expected)
    pipe.enable_visionfuse("gna", **PLAN, order=MOVED, dense_steps=2)
    run(pipe, steps=5)
    assert visionfuse.report(pipe).denoisers[0].phases == ("steps 0-1 dense", "steps 2-4 plan")


@pytest.mark.parametrize("expand", [False, True], ids=["wan_i2v", "wan2.2_ti2v"])
def test_image_to_video(expand):
    """A first frame given as further channels, or with time steps of its own for every token."""
    channels = {} if expand else {"in_channels": 36}
    pipe = wan_pipeline(WanImageToVideoPipeline, extra={"expand_timesteps": expand}, **channels)
    times = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: times.append(kwargs["timestep"]), with_kwargs=True
    )
    numbers = torch.Generator().manual_seed(5)
    call = {
        "image": torch.rand(1, 3, 64, 96, generator=numbers),
        "prompt": None,  # as embeddings: cleaning a prompt takes ftfy in this pipeline
        "prompt_embeds": torch.randn(1, 16, 32, generator=numbers),
        "negative_prompt_embeds": torch.randn(1, 16, 32, generator=numbers),
    }
    expected = masked_run(pipe, **call)
    assert all(t.ndim == (2 if expand else 1) for t in times)
    assert all(t.unique().numel() == (2 if expand else 1) for t in times)
    pipe.enable_visionfuse("gna", **PLAN, order=MOVED, dense_steps=0)
    close(run(pipe, **call), expected)


def test_time_steps_that_differ_between_tokens():
    """The model called by itself, by position and by name, with other time steps in every token."""
    model = wan_transformer()
    torch.manual_seed(3)
    latent, text = torch.randn(1, 16, 3, 8, 12), torch.randn(1, 8, 32)
    time = torch.randint(0, 1000, (1, 72)).float()
    pipe = wan_pipeline()
    pipe.transformer = model
    with torch.no_grad(), masked_attention(pipe, explicit_mask(Neighborhood(**PLAN), grids=[GRID])):
        expected = model(latent, time, text, return_dict=False)[0]
    from visionfuse.session import Session

    recipe = visionfuse.recipes.build("gna", **PLAN, order=MOVED, dense_steps=0)
    with torch.no_grad(), Session(pipe, recipe, "auto", {}):
        close(model(latent, time, text, return_dict=False)[0], expected)
        close(model(latent, timestep=time, encoder_hidden_states=text).sample, expected)
    assert not isinstance(model.rope, OrderedRope)


def test_patches_that_do_not_divide_are_cut():
    """A convolution with stride drops an incomplete patch; so does the permutation."""
    x = torch.randn(2, 4, 3, 9, 13)
    whole = permute_patches(x, (1, 2, 2), torch.arange(72))
    assert torch.equal(whole, x[:, :, :, :8, :12])
    order = torch.randperm(72)
    there = permute_patches(x, (1, 2, 2), order)
    assert torch.equal(permute_patches(there, (1, 2, 2), order.argsort()), whole)
    conv = torch.nn.Conv3d(4, 5, (1, 2, 2), (1, 2, 2))
    torch.testing.assert_close(
        conv(there).flatten(2), conv(whole).flatten(2)[..., order], rtol=0, atol=1e-5
    )


def test_cross_attention_is_never_routed(pipe):
    seen = {}

    def look(pipe, step, time, tensors):
        for name in ("attn1", "attn2"):
            seen[name] = {hasattr(getattr(b, name).processor, "_visionfuse_stock")
                          for b in pipe.transformer.blocks}  # fmt: skip
        return tensors

    pipe.enable_visionfuse("gna", **PLAN, dense_steps=0)
    run(pipe, callback_on_step_end=look)
    assert seen == {"attn1": {True}, "attn2": {False}}


def test_a_window_with_two_axes_is_refused_at_once(pipe, stock):
    with pytest.raises(ValueError, match=r"window=\(7, 9\) has 2 values.*3 axes"):
        pipe.enable_visionfuse("gna", window=(7, 9))
    assert "_visionfuse" not in vars(pipe)
    assert torch.equal(run(pipe), stock)

"""Gradient checkpointing under a recipe: blocks that are computed again in the backward pass follow the same plan."""

from __future__ import annotations

import pytest
import torch

from visionfuse import patching
from visionfuse.context import ACTIVE
from visionfuse.session import Session
from visionfuse.testing_pipelines import TEXT_WIDTH, flux_pipeline, wan_pipeline

RECIPES = {
    "gna": {"density": 0.3, "stride": 2, "dense_steps": 0, "min_steps": 0},
    "fps": {},
}


def flux():
    pipe = flux_pipeline()
    ids = torch.zeros(8, 12, 3)
    ids[..., 1], ids[..., 2] = torch.arange(8)[:, None], torch.arange(12)
    return pipe, {
        "hidden_states": torch.randn(1, 96, 4),
        "encoder_hidden_states": torch.randn(1, 16, TEXT_WIDTH),
        "pooled_projections": torch.randn(1, TEXT_WIDTH),
        "timestep": torch.full((1,), 0.5),
        "img_ids": ids.flatten(0, 1),
        "txt_ids": torch.zeros(16, 3),
    }


def wan():
    pipe = wan_pipeline()
    return pipe, {
        "hidden_states": torch.randn(1, pipe.transformer.config.in_channels, 3, 8, 12),
        "encoder_hidden_states": torch.randn(1, 16, pipe.transformer.config.text_dim),
        "timestep": torch.full((1,), 500),
    }


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", [flux, wan])
def test_the_same_gradients(family, recipe):
    torch.manual_seed(0)
    pipe, inputs = family()
    model = pipe.transformer.train()
    pipe.scheduler.set_timesteps(12)
    pipe.scheduler.set_begin_index(0)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        enabled = patching.get(pipe)
        session = Session(pipe, enabled.recipe, enabled.impl, enabled.ran) if enabled else torch.enable_grad()  # fmt: skip
        with session:
            out = model(**inputs, return_dict=False)[0]
            out.square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    stock = gradients()
    pipe.enable_visionfuse(recipe, **RECIPES[recipe], impl="blocks")
    expected = gradients()
    calls = patching.get(pipe).ran["transformer"].calls
    assert calls["plan"] == 1, patching.get(pipe).ran["transformer"].notes
    blocks = []
    for block in model.modules():
        if hasattr(block, "attn") or hasattr(block, "attn1"):
            block.register_forward_pre_hook(lambda *_: blocks.append(len(ACTIVE.variants)))
    once = gradients()
    count = len(blocks)
    model.enable_gradient_checkpointing()
    again = gradients()
    assert len(blocks) - count > count  # every block twice
    assert all(blocks)
    for one, two, three in zip(expected, once, again, strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(three, one, rtol=1e-5, atol=1e-7)
    assert any(not torch.allclose(a, b, rtol=1e-3) for a, b in zip(stock, expected, strict=True))

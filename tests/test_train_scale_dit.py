"""The LoRA of Scale-DiT: on which tokens it acts, its file, and a training that learns and resumes, on a CPU."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file

from visionfuse.pipelines.train_scale_dit import TARGETS, Photos, main
from visionfuse.scale_dit import Guidance, TwoStage, guided, two_stages
from visionfuse.scale_dit.lora import lora_layers, without_lora
from visionfuse.testing_pipelines import flux_transformer

MICRO = Path(__file__).parents[1] / "assets" / "flux-micro"
SHARED = r".*\.to_[qkv]"
IMAGE, COARSE, TEXT = (8, 8), (2, 2), 4


def given(seed=0):
    generator = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=generator)
    return {
        "hidden_states": rand(1, IMAGE[0] * IMAGE[1], 4), "encoder_hidden_states": rand(1, TEXT, 32),
        "pooled_projections": rand(1, 32), "timestep": torch.full((1,), 0.5), "txt_ids": torch.zeros(TEXT, 3),
        "img_ids": torch.cartesian_prod(torch.zeros(1), *(torch.arange(n).float() for n in IMAGE)),
        "return_dict": False,
    }  # fmt: skip


def tuned_model(targets=TARGETS):
    model = flux_transformer()
    model.add_adapter(
        LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, target_modules=targets)
    )
    return model


def guidance():
    latents = torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(1))
    return Guidance(latents=latents, coarse=COARSE, image=IMAGE)


def test_the_published_targets():
    found = set(lora_layers(tuned_model()))
    double = {"norm1.linear", "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.2"}
    single = {"norm.linear", "proj_mlp", "proj_out", "attn.to_q", "attn.to_k", "attn.to_v"}
    expected = {"x_embedder"}
    for i in range(2):
        expected |= {f"transformer_blocks.{i}.{name}" for name in double}
        expected |= {f"single_transformer_blocks.{i}.{name}" for name in single}
    assert found == expected


@pytest.mark.parametrize("name", ["x_embedder", "transformer_blocks.1.attn.to_out.0", "transformer_blocks.0.ff.net.2",
                                  "single_transformer_blocks.0.proj_mlp", "single_transformer_blocks.1.proj_out"])  # fmt: skip
def test_other_layers_are_tuned_for_guidance_alone(name):
    model = tuned_model()
    layer = model.get_submodule(name)
    calls = []
    with torch.no_grad(), guided(model, guidance()):
        split = vars(layer)["forward"]
        object.__setattr__(
            layer, "forward", lambda x, *a: calls.append((x, split(x, *a))) or calls[-1][1]
        )
        model(**given())
        object.__setattr__(layer, "forward", split)
        (x, out), n = calls[-1], COARSE[0] * COARSE[1]
    assert "forward" not in vars(layer)
    torch.testing.assert_close(out[:, :-n], layer.base_layer(x[:, :-n]))
    torch.testing.assert_close(out[:, -n:], layer(x[:, -n:]))
    assert not torch.allclose(out[:, -n:], layer.base_layer(x[:, -n:]))


@torch.no_grad()
def test_queries_keys_and_values_are_tuned_for_all():
    """A LoRA of nothing else acts on an image without guidance as PEFT has it, and so it does with guidance."""
    model = tuned_model(SHARED)
    for layer in lora_layers(model):
        assert not vars(model.get_submodule(layer)).get("forward")
    with guided(model, guidance()):
        tuned = model(**given())[0]
        model.disable_lora()
        base = model(**given())[0]
    assert not torch.allclose(tuned, base)


@torch.no_grad()
def test_modulation_is_tuned_for_guidance_alone():
    """With LoRA in norms alone, an image that cannot see its guidance is that of the base model."""
    model = tuned_model(r".*\.norm1?\.linear")
    with guided(model, guidance()):
        tuned = model(**given())[0]
        model.disable_lora()
        base = model(**given())[0]
    assert not torch.allclose(tuned, base)  # through the guidance
    norm = model.transformer_blocks[0].norm1
    model.enable_lora()
    x, emb = torch.randn(1, 6, 32), torch.randn(1, 32)
    plain = norm(x, emb=emb)[0]
    without = without_lora(norm, norm.forward)(x, emb=emb)[0]
    assert not torch.allclose(plain, without)
    model.disable_lora()
    torch.testing.assert_close(norm(x, emb=emb)[0], without)


def train(out, *more, steps=4):
    main([str(MICRO), "--shapes", "--out", str(out), "--size", "64x64", "--steps", str(steps), "--batch", "2",
          "--accumulate", "1", "--text-length", "24", "--device", "cpu", "--every", "2", "--lr", "1e-3", "--ntk", "1",
          *more])  # fmt: skip
    return json.loads((out / "losses.json").read_text())


def test_training_resumes_where_it_stopped(tmp_path):
    pytest.importorskip("matplotlib")
    whole = train(tmp_path / "whole")
    train(tmp_path / "parts", "--stop-at", "2")
    assert len(json.loads((tmp_path / "parts" / "losses.json").read_text())) == 2
    parts = train(tmp_path / "parts", "--resume")
    assert len(whole) == 4
    assert parts == pytest.approx(whole, rel=1e-4)
    assert (tmp_path / "whole" / "loss.png").stat().st_size > 1000
    one, other = (
        load_file(tmp_path / name / "pytorch_lora_weights.safetensors")
        for name in ("whole", "parts")
    )
    assert all(name.startswith("transformer.") for name in one)
    for name, weight in one.items():
        torch.testing.assert_close(weight, other[name], atol=1e-4, rtol=1e-3)
    # The file is what diffusers reads, and what the second stage uses; the small image is that of the base model.
    pipe = FluxPipeline.from_pretrained(MICRO, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    stages = TwoStage(steps=2, fine_steps=1, ntk=1.0)
    draw = lambda: two_stages(pipe, "a red circle", height=128, width=128, stages=stages, max_sequence_length=24,
                              generator=torch.Generator().manual_seed(0))  # fmt: skip
    before = draw()
    pipe.load_lora_weights(tmp_path / "whole")
    after = draw()
    assert (np.asarray(before.small[0]) == np.asarray(after.small[0])).all()
    assert (np.asarray(before.images[0]) != np.asarray(after.images[0])).any()
    stages = replace(stages, lora="everywhere")
    assert (np.asarray(before.small[0]) != np.asarray(draw().small[0])).any()


def test_checkpointing_changes_nothing(tmp_path):
    plain = train(tmp_path / "plain", steps=2)
    again = train(tmp_path / "again", "--checkpointing", steps=2)
    assert again == pytest.approx(plain, rel=1e-5)


@pytest.mark.slow
def test_training_learns(tmp_path):
    losses = train(tmp_path, steps=60)
    assert sum(losses[-15:]) < sum(losses[:15])


def test_photos(tmp_path):
    Image.new("RGB", (100, 40), "red").save(tmp_path / "wide.png")
    (tmp_path / "wide.txt").write_text("a red wall\n")
    images, captions = Photos(tmp_path, (32, 32)).batch(2, torch.Generator().manual_seed(0))
    assert images.shape == (2, 3, 32, 32)
    assert captions == ["a red wall"] * 2
    assert images[:, 0].min() == 1
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="no pictures"):
        Photos(empty, (32, 32)).batch(1, torch.Generator())

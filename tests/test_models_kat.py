"""KAT in timm: what timm's own model tests ask of a model, and the published state dict."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers import PatchEmbed
from timm.models import create_model, get_pretrained_cfg, list_models, list_pretrained
from timm.models._features_fx import GraphExtractNet

from visionfuse.models import KAT, GRKANMlp, RationalActivation
from visionfuse.testing import memory_of, saved_for_backward

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("kat_tiny_patch16_224", "kat_small_patch16_224", "kat_base_patch16_224")
SMALL = {"img_size": 48, "depth": 3, "num_classes": 7}


def small(name=NAMES[0], **options) -> Any:
    torch.manual_seed(0)
    return create_model(name, **(SMALL | options))


@pytest.fixture
def images():
    return torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))


# The registry and the published configurations --------------------------------------------------------


def test_registered_by_import_of_models_only():
    code = (
        "import timm, visionfuse; assert not timm.list_models('kat_*'); "
        "import visionfuse.models; print(len(timm.list_models('kat_*')))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "3", done.stderr


def test_names_tags_and_weights():
    assert set(list_models("kat_*")) == set(NAMES)
    assert set(list_pretrained("kat_*")) == {
        f"{n}.{tag}" for n in NAMES for tag in ("in1k", "vitft")
    }
    for name in NAMES:
        cfg = get_pretrained_cfg(name)
        assert (cfg.tag, cfg.crop_pct, cfg.interpolation) == ("in1k", 0.875, "bicubic")
        assert cfg.hf_hub_id == f"adamdad/{name}"
        assert get_pretrained_cfg(f"{name}.vitft").hf_hub_id == f"adamdad/{name}.vitft"
        assert cfg.url.startswith(
            f"https://huggingface.co/adamdad/kat_pretained/resolve/main/{name}_"
        )


@pytest.mark.parametrize(
    ("name", "count"), [(NAMES[0], 5_718_328), (NAMES[1], 22_051_576), (NAMES[2], 86_568_568)]
)
def test_parameters_are_those_of_the_release(name, count):
    """The names and shapes of a published checkpoint: a ViT's, and four more in each block."""
    model: Any = create_model(name, device="meta")
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    assert sum(p.numel() for p in model.parameters()) == count
    twin = create_model(name.replace("kat", "vit"), device="meta").state_dict()
    expected = {k: tuple(v.shape) for k, v in twin.items()}
    for i in range(12):
        for act in ("act1", "act2"):
            expected[f"blocks.{i}.mlp.{act}.weight_numerator"] = (1, 6)
            expected[f"blocks.{i}.mlp.{act}.weight_denominator"] = (8, 4)
    assert shapes == expected
    assert model.norm.eps == model.blocks[0].norm2.eps == 1e-6


def test_published_state_dicts_load_and_save(tmp_path, images):
    """Both ways, in the form of the release: a training checkpoint with the weights under `state_dict`."""
    source, target = small(), small(weight_init="skip")
    with torch.no_grad():
        for p in source.parameters():
            p.add_(torch.randn_like(p) * 0.02)
    torch.save({"epoch": 3, "state_dict": source.state_dict()}, tmp_path / "kat.pth")
    timm.models.load_checkpoint(target, str(tmp_path / "kat.pth"))
    assert torch.equal(source.eval()(images), target.eval()(images))
    larger: Any = create_model(
        NAMES[0], pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "kat.pth"),
                                                           "num_classes": 7},
        **(SMALL | {"img_size": 96, "num_classes": 5}),
    )  # fmt: skip
    assert larger.pos_embed.shape[1] == 1 + 36
    assert larger.head.weight.shape[0] == 5
    assert torch.equal(larger.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)


def test_saved_for_the_hub(tmp_path, images):
    """As `hf-hub:` reads it: config.json with the architecture and its arguments, and the weights."""
    model = small()
    timm.models.save_for_hf(model, tmp_path, model_args=SMALL)
    again = create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert isinstance(again, KAT)
    assert torch.equal(model.eval()(images), again.eval()(images))


def test_block_is_that_of_the_paper():
    """act1, linear, act2, linear, with P shared by 8 groups of channels."""
    mlp = small().eval().blocks[0].mlp
    x = torch.randn(2, 5, 192)

    def act(module, x):
        a, b = module.weight_numerator[0], module.weight_denominator.abs()
        z = x.double().unflatten(-1, (8, -1))
        p = sum(a[i].double() * z**i for i in range(6))
        q = 1 + sum(b[:, j, None].double() * z.abs() ** (j + 1) for j in range(4))
        return (p / q).flatten(-2).float()

    torch.testing.assert_close(mlp(x), mlp.fc2(act(mlp.act2, mlp.fc1(act(mlp.act1, x)))))
    torch.testing.assert_close(mlp.act1(x), x)
    torch.testing.assert_close(mlp.act2(x), torch.nn.functional.silu(x), atol=2e-3, rtol=0)


# What timm's tests/test_models.py checks --------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_forward_and_backward(name, images):
    model = small(name).train()
    out = model(images)
    out.mean().backward()
    assert out.shape == (2, 7)
    assert not out.isnan().any()
    missing = [n for n, p in model.named_parameters() if p.grad is None or p.grad.isnan().any()]
    assert not missing


def test_recomputation_saves_memory_and_changes_nothing(images):
    grads, kept = [], []
    for recompute in (False, True):
        model = small().train()
        model.set_recompute(recompute)
        with saved_for_backward() as saved:
            loss = model(images).square().sum()
        kept.append(memory_of(saved))
        loss.backward()
        grads.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*grads)
    outputs = 3 * 2 * 10 * (192 + 4 * 192) * 4  # blocks, images, tokens, channels, bytes
    assert kept[0] - kept[1] >= outputs
    assert torch.jit.script(model.eval())(images).shape == (2, 7)


def test_gradient_checkpointing_changes_nothing(images):
    grads = []
    for checkpoint in (False, True):
        model = small().train()
        model.set_grad_checkpointing(checkpoint)
        model(images).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*grads)


def test_default_cfg_and_classifier(images):
    model = small().eval()
    cfg = model.default_cfg
    state = model.state_dict()
    assert cfg["classifier"] + ".weight" in state
    assert cfg["first_conv"] + ".weight" in state
    features = model.forward_features(images)
    assert features.shape == (2, 10, model.num_features)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    model.reset_classifier(0)
    assert model(images).shape == (2, model.num_features)
    model.reset_classifier(0, "")
    assert model(images).shape == features.shape
    model.reset_classifier(3, "avg")
    assert model(images).shape == (2, 3)
    assert small(num_classes=0).eval()(images).shape == (2, 192)
    assert small(in_chans=1).eval()(images[:, :1]).shape == (2, 7)
    assert isinstance(model.patch_embed, PatchEmbed)


def test_features(images):
    model: Any = create_model(NAMES[0], features_only=True, img_size=48, depth=3)
    outputs = model(images)
    assert model.feature_info.channels() == [192] * 3
    assert model.feature_info.reduction() == [16] * 3
    assert [tuple(o.shape) for o in outputs] == [(2, 192, 3, 3)] * 3


def test_forward_intermediates_and_pruning(images):
    model = small().eval()
    final, all_of_them = model.forward_intermediates(images)
    assert torch.equal(final, model.forward_features(images))
    assert len(all_of_them) == 3
    some = model.forward_intermediates(images, indices=[0, 1], intermediates_only=True)
    assert [tuple(t.shape) for t in some] == [(2, 192, 3, 3)] * 2
    assert all(torch.equal(p, q) for p, q in zip(some, all_of_them, strict=False))
    assert model.prune_intermediate_layers([0, 1]) == [0, 1]
    assert len(model.blocks) == 2
    pruned = model.forward_intermediates(images, indices=[0, 1], intermediates_only=True)
    assert all(torch.equal(p, q) for p, q in zip(some, pruned, strict=True))


def test_torchscript(images):
    model = small().eval()
    scripted = torch.jit.script(model)
    torch.testing.assert_close(scripted(images), model(images))


def test_fx_forward_and_backward(images):
    model = small().eval()
    graph = GraphExtractNet(model, ["head"])
    out = graph(images)
    out = out[0] if isinstance(out, list | tuple) else out
    assert torch.equal(out, model(images))
    out.mean().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.slow
def test_compiles_whole(images):
    model = small(depth=1).train()
    torch.testing.assert_close(
        torch.compile(model, fullgraph=True)(images), model(images), atol=1e-4, rtol=1e-3
    )


@pytest.mark.parametrize("channels_last", [False, True])
def test_memory_format_and_half_precision(channels_last, images):
    model = small().eval()
    expected = model(images)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
        torch.testing.assert_close(
            model(images.contiguous(memory_format=torch.channels_last)), expected
        )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (model(images) - expected).abs().max() < 0.1 * expected.abs().max()
    assert model.bfloat16()(images.bfloat16()).dtype == torch.bfloat16


# Initialisation and training --------------------------------------------------------------------------


def test_variance_is_preserved():
    """Through both layers of an MLP the second moment of a normal input stays, as section 4.4 asks."""
    for act in ("silu", "gelu", "relu"):
        mlp = small(act_layer=act).blocks[0].mlp
        x = torch.randn(500, 192)
        hidden = mlp.fc1(mlp.act1(x))
        assert 0.9 < hidden.square().mean() < 1.1, act
        assert 0.8 < mlp(x).square().mean() < 1.2, act


def test_release_initialisation():
    model = small(weight_init="kat_release")
    attn, mlp = model.blocks[1].attn, model.blocks[1].mlp
    assert abs(mlp.fc1.weight.std() - 0.02) < 1e-3
    assert abs(mlp.fc2.weight.std() - 0.02) < 1e-3
    q, k, v = attn.qkv.weight.view(3, 192, 192)
    heads = (q.view(3, 64, 192).mT @ k.view(3, 64, 192)).mean(0)  # a third of 0.7 I each, and noise
    assert heads.diagonal().mean() > 0.15
    assert heads.diagonal().mean() > 5 * (heads - heads.diagonal().diag()).abs().mean()
    product = v @ attn.proj.weight
    assert abs(product.diagonal().mean() + 0.4) < 0.05
    mimetic = small(weight_init="kat_mimetic")
    assert mimetic.blocks[0].mlp.fc1.weight.std() > 0.05
    with pytest.raises(AssertionError):
        small(weight_init="nothing")


def test_weight_decay_of_coefficients():
    from timm.optim import param_groups_weight_decay

    for decay_rationals in (False, True):
        model = small(decay_rationals=decay_rationals)
        groups = param_groups_weight_decay(
            model, 0.05, no_weight_decay_list=model.no_weight_decay()
        )
        decayed = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
        for module in model.modules():
            if isinstance(module, RationalActivation):
                assert (id(module.weight_numerator) in decayed) is decay_rationals
                assert (id(module.weight_denominator) in decayed) is decay_rationals


def test_another_activation_and_other_parts():
    model = small(act_layer="gelu", proj_drop_rate=0.1, drop_path_rate=0.1)
    assert isinstance(model.blocks[0].mlp, GRKANMlp)
    assert model.blocks[0].mlp.act2.init == "gelu"
    assert model.blocks[0].mlp.drop1.p == 0.1
    assert isinstance(model, KAT)


def test_it_learns():
    model = small(depth=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    images = torch.randn(8, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(8) % 7
    before = [
        m.weight_denominator.clone() for m in model.modules() if isinstance(m, RationalActivation)
    ]
    losses = []
    for _ in range(12):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    after = [m.weight_denominator for m in model.modules() if isinstance(m, RationalActivation)]
    assert all((p != q).all() for p, q in zip(before, after, strict=True))

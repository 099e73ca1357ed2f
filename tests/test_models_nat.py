"""NAT and DiNAT in timm: what timm's own model tests ask of a model, and the published state dicts."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.models import create_model, get_pretrained_cfg, list_models, list_pretrained
from timm.models._features_fx import GraphExtractNet

from visionfuse.models import NAT
from visionfuse.neighborhood import NeighborhoodAttention2D

COUNTS = {  # 20, 28, 51 and 90 million in the tables of the release; only two have layer scale
    "nat_mini": 19_984_174, "nat_tiny": 27_901_582, "nat_small": 50_743_297, "nat_base": 89_769_652,
    "dinat_mini": 19_984_174, "dinat_tiny": 27_901_582, "dinat_small": 50_719_681,
    "dinat_base": 89_738_164,
}  # fmt: skip
LARGE = ("dinat_large", "dinat_large_384", "dinat_large_384_11x11")
NAMES = list(COUNTS)
SMALL = {
    "depths": (2, 2, 2, 1), "num_heads": (2, 2, 4, 4), "embed_dim": 16, "num_classes": 7,
    "kernel_size": 3,
}  # fmt: skip
DILATED = {"dilations": ((1, 4), (1, 2), (1, 2), (1,))}


def small(name="nat_mini", **options) -> Any:
    torch.manual_seed(0)
    return create_model(
        name, **({**SMALL, **(DILATED if name.startswith("dinat") else {})} | options)
    )


@pytest.fixture
def images():
    return torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["nat_mini", "dinat_small"])
def name(request):
    return request.param


# The registry and the published configurations --------------------------------------------------------


def test_names_tags_and_weights():
    assert set(list_models(["nat_*", "dinat_*"])) == {*NAMES, *LARGE}
    assert set(list_pretrained(["nat_*", "dinat_*"])) == {
        *(f"{n}.in1k" for n in NAMES), *(f"{n}.in22k_ft_in1k" for n in LARGE)
    }  # fmt: skip
    for each in NAMES:
        cfg = get_pretrained_cfg(each)
        assert (cfg.tag, cfg.crop_pct, cfg.interpolation) == ("in1k", 0.875, "bicubic")
        assert cfg.url.startswith("https://shi")
        assert f"/{each}" in cfg.url
    assert get_pretrained_cfg("dinat_large_384").input_size == (3, 384, 384)


@pytest.mark.parametrize("each", NAMES)
def test_parameters_are_those_of_the_release(each):
    """Counts, names and shapes."""
    model: Any = create_model(each, device="meta")
    kind, size = each.split("_")
    assert sum(p.numel() for p in model.parameters()) == COUNTS[each]
    names = set(model.state_dict())
    assert ("levels.0.blocks.0.gamma1" in names) is (kind == "nat" and size in ("small", "base"))
    dim = {"mini": 64, "tiny": 64, "small": 96, "base": 128}[size]
    assert model.levels[0].blocks[0].norm1.weight.numel() == dim
    assert len(model.levels[2].blocks) == (6 if size == "mini" else 18)
    assert {
        "patch_embed.proj.0.weight", "patch_embed.proj.1.bias", "patch_embed.norm.weight",
        "levels.0.blocks.0.norm1.weight", "levels.2.blocks.5.attn.rpb",
        "levels.1.blocks.3.attn.qkv.bias", "levels.1.blocks.3.attn.proj.weight",
        "levels.3.blocks.4.mlp.fc1.weight", "levels.3.blocks.4.mlp.fc2.bias",
        "levels.0.downsample.reduction.weight", "levels.2.downsample.norm.bias", "norm.weight",
        "head.weight", "head.bias",
    } <= names  # fmt: skip
    assert (
        not {"levels.3.downsample.reduction.weight", "levels.0.downsample.reduction.bias"} & names
    )
    assert tuple(model.levels[0].blocks[0].attn.rpb.shape) == (dim // 32, 13, 13)


def test_dilations_are_those_of_the_release():
    steps = lambda model: [
        [layer.attn.dilation[0] for layer in stage.blocks] for stage in model.levels
    ]
    assert steps(create_model("dinat_mini", device="meta")) == [
        [1, 8, 1], [1, 4, 1, 4], [1, 2, 1, 2, 1, 2], [1] * 5
    ]  # fmt: skip
    assert steps(create_model("dinat_large_384", device="meta")) == [
        [1, 13, 1], [1, 6, 1, 6], [1, 3] * 9, [1] * 5
    ]  # fmt: skip
    assert {d for stage in steps(create_model("nat_base", device="meta")) for d in stage} == {1}
    wide: Any = create_model("dinat_large_384_11x11", device="meta")
    assert wide.levels[0].blocks[0].attn.kernel_size == (11, 11)


def test_published_state_dicts_load_and_save(tmp_path, images):
    """Both ways; and a published head of another size is replaced."""
    source, target = small(layer_scale=0.5), small(layer_scale=0.5)
    with torch.no_grad():
        for p in source.parameters():
            p.add_(torch.randn_like(p) * 0.02)
    torch.save({"state_dict": source.state_dict()}, tmp_path / "nat.pth")
    timm.models.load_checkpoint(target, str(tmp_path / "nat.pth"))
    assert torch.equal(source.eval()(images), target.eval()(images))
    other: Any = create_model(
        "nat_mini", pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "nat.pth"), "num_classes": 7},
        **(SMALL | {"num_classes": 5, "layer_scale": 0.5}),
    )  # fmt: skip
    assert other.head.weight.shape[0] == 5
    assert torch.equal(other.levels[1].blocks[0].attn.rpb, source.levels[1].blocks[0].attn.rpb)


def test_transformers_state_dicts_load(tmp_path, images):
    """As shi-labs/nat-mini-in1k-224 and others on the Hub store the same weights."""
    source = small(layer_scale=0.5).eval()
    renamed = {}
    names = {
        "norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense",
        "attn.rpb": "attention.self.rpb", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
    }  # fmt: skip
    for key, value in source.state_dict().items():
        if key.startswith("levels."):
            _, level, kind, rest = key.split(".", 3)
            stem = f"dinat.encoder.levels.{level}."
            if kind == "downsample":
                renamed[f"{stem}downsample.{rest}"] = value
                continue
            number, rest = rest.split(".", 1)
            stem += f"layers.{number}."
            if rest.startswith("attn.qkv."):
                for part, piece in zip(("query", "key", "value"), value.chunk(3), strict=True):
                    renamed[f"{stem}attention.self.{part}.{rest.split('.')[-1]}"] = piece
            elif rest.startswith("gamma"):
                both = [
                    source.state_dict()[f"levels.{level}.blocks.{number}.gamma{i}"] for i in (1, 2)
                ]
                renamed[f"{stem}layer_scale_parameters"] = torch.stack(both)
            else:
                name = next(n for n in names if rest.startswith(n))
                renamed[stem + names[name] + rest.removeprefix(name)] = value
        elif key.startswith("patch_embed."):
            rest = key.removeprefix("patch_embed.").replace("proj.", "patch_embeddings.projection.")
            renamed[f"dinat.embeddings.{rest}"] = value
        elif key.startswith("norm."):
            renamed[f"dinat.layer{key}"] = value
        else:
            renamed[key.replace("head", "classifier")] = value
    torch.save(renamed, tmp_path / "pytorch_model.bin")
    loaded: Any = create_model(
        "nat_mini", pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "pytorch_model.bin"), "num_classes": 7},
        **(SMALL | {"layer_scale": 0.5}),
    )  # fmt: skip
    assert torch.equal(loaded.eval()(images), source(images))


def test_saved_for_the_hub(tmp_path, images):
    model = small("dinat_mini")
    timm.models.save_for_hf(model, tmp_path, model_args={**SMALL, **DILATED})
    again = create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert isinstance(again, NAT)
    assert torch.equal(model.eval()(images), again.eval()(images))


# What the release computes ----------------------------------------------------------------------------


def test_layer_is_that_of_the_paper():
    torch.manual_seed(0)
    layer = small("dinat_mini", layer_scale=0.5).levels[0].blocks[1].eval()
    x = torch.randn(2, 24, 24, 16)
    y = x + layer.gamma1 * layer.attn(layer.norm1(x))
    hidden = torch.nn.functional.gelu(layer.mlp.fc1(layer.norm2(y)))
    torch.testing.assert_close(layer(x), y + layer.gamma2 * layer.mlp.fc2(hidden))
    assert layer.attn.dilation == (4, 4)


@pytest.mark.parametrize("grid", [(5, 9), (14, 5), (3, 3)])
def test_small_grids_are_padded_as_in_training(grid):
    """To kernel times dilation, with zeros at the right and below, before the queries and keys are made."""
    attn = (
        small("dinat_mini", dilations=((1, 2), (1, 2), (1, 2), (1,)), kernel_size=5)
        .levels[0]
        .blocks[1]
        .attn
    )
    x = torch.randn(1, *grid, 16)
    padded = torch.zeros(1, max(grid[0], 10), max(grid[1], 10), 16)
    padded[:, : grid[0], : grid[1]] = x
    expected = NeighborhoodAttention2D.forward(attn, padded)[:, : grid[0], : grid[1]]
    torch.testing.assert_close(attn(x), expected)


# What timm's tests/test_models.py checks --------------------------------------------------------------


def test_forward_and_backward(name, images):
    model = small(name).train()
    out = model(images)
    out.mean().backward()
    assert out.shape == (2, 7)
    assert not out.isnan().any()
    missing = [n for n, p in model.named_parameters() if p.grad is None or p.grad.isnan().any()]
    assert not missing


@pytest.mark.parametrize("side", [(64, 96), (50, 33), (97, 130)])
def test_any_input_size(side):
    assert small("dinat_mini").eval()(torch.randn(1, 3, *side)).shape == (1, 7)


def test_gradient_checkpointing_changes_nothing(name, images):
    grads = []
    for checkpoint in (False, True):
        model = small(name).train()
        model.set_grad_checkpointing(checkpoint)
        model(images).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*grads)


def test_default_cfg_and_classifier(name, images):
    model = small(name).eval()
    cfg, state = model.default_cfg, model.state_dict()
    assert cfg["classifier"] + ".weight" in state
    assert cfg["first_conv"] + ".weight" in state
    assert not any(
        k.startswith(cfg["classifier"]) for k in state.keys() - {"head.weight", "head.bias"}
    )
    features = model.forward_features(images)
    assert features.shape == (2, 3, 3, model.num_features)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    model.reset_classifier(0)
    assert model(images).shape == (2, model.num_features)
    model.reset_classifier(0, "")
    assert model(images).shape == features.shape
    model.reset_classifier(3, "avgmax")
    assert model(images).shape == (2, 3)
    assert small(name, num_classes=0).eval()(images).shape == (2, 128)
    assert small(name, num_classes=0, global_pool="").eval()(images).shape == (2, 3, 3, 128)
    assert small(name, in_chans=1).eval()(images[:, :1]).shape == (2, 7)


def test_features(name, images):
    options = {**SMALL, **(DILATED if name.startswith("dinat") else {})}
    model: Any = create_model(name, features_only=True, **options)
    outputs = model(images)
    assert model.feature_info.channels() == [16, 32, 64, 128]
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    assert [tuple(o.shape) for o in outputs] == [
        (2, 16, 24, 24), (2, 32, 12, 12), (2, 64, 6, 6), (2, 128, 3, 3)
    ]  # fmt: skip
    two: Any = create_model(name, features_only=True, out_indices=(1, 2), **options)
    assert [tuple(o.shape) for o in two(images)] == [(2, 32, 12, 12), (2, 64, 6, 6)]


def test_forward_intermediates_and_pruning(name, images):
    model = small(name).eval()
    final, all_of_them = model.forward_intermediates(images)
    assert torch.equal(final, model.forward_features(images))
    assert len(all_of_them) == 4
    some = model.forward_intermediates(images, indices=[0, 2], intermediates_only=True)
    assert all(torch.equal(a, all_of_them[i]) for a, i in zip(some, (0, 2), strict=True))
    early = model.forward_intermediates(
        images, indices=[1], intermediates_only=True, stop_early=True
    )
    assert torch.equal(early[0], all_of_them[1])
    last = model.forward_intermediates(
        images, indices=[3], norm=True, output_fmt="NHWC", intermediates_only=True
    )
    assert torch.equal(last[0], final)
    with pytest.raises(ValueError, match="NCHW"):
        model.forward_intermediates(images, output_fmt="NLC")
    stopped, _ = model.forward_intermediates(images, indices=[0, 2], stop_early=True)
    assert model.prune_intermediate_layers([0, 2]) == [0, 2]
    assert len(model.levels) == 3
    pruned = model.forward_intermediates(images, indices=[0, 2], intermediates_only=True)
    assert all(torch.equal(p, q) for p, q in zip(some, pruned, strict=True))
    features = model.forward_features(images)  # end where the last of them was taken
    assert torch.equal(features, some[1].permute(0, 2, 3, 1))
    assert torch.equal(stopped, features)
    assert model.num_features == features.shape[-1]
    model.train().forward_features(images).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_torchscript(name, images):
    model = small(name).eval()
    torch.testing.assert_close(torch.jit.script(model)(images), model(images))


def test_fx_forward_and_backward(name, images):
    model = small(name).eval()
    out = GraphExtractNet(model, ["head"])(images)
    out = out[0] if isinstance(out, list | tuple) else out
    assert torch.equal(out, model(images))
    out.mean().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.slow
def test_compiles_whole(name, images):
    model = small(name, drop_path_rate=0.0).train()
    compiled = torch.compile(model, fullgraph=True)
    grads = []
    for each in (compiled, model):
        model.zero_grad()
        each(images).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*grads, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("channels_last", [False, True])
def test_memory_format_and_half_precision(name, channels_last, images):
    model = small(name).eval()
    expected = model(images)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
        torch.testing.assert_close(
            model(images.contiguous(memory_format=torch.channels_last)),
            expected,
            atol=1e-4,
            rtol=1e-4,
        )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (model(images) - expected).abs().max() < 0.1 * expected.abs().max()
    assert model.bfloat16()(images.bfloat16()).dtype == torch.bfloat16


def test_groups_and_weight_decay(name):
    from timm.models import group_parameters
    from timm.optim import param_groups_weight_decay

    model = small(name)
    for coarse in (False, True):
        groups = group_parameters(model, model.group_matcher(coarse=coarse))
        assert sum(map(len, groups.values())) == len(list(model.parameters()))
    groups = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    decayed = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
    for n, p in model.named_parameters():
        assert (id(p) in decayed) is (p.dim() > 1 and not n.endswith("rpb"))


def test_it_learns():
    model = small("dinat_mini", drop_path_rate=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    images = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(8) % 7
    losses = []
    for _ in range(12):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]

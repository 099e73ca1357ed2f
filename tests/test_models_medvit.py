"""MedViTV2 in timm: what timm's own model tests ask of a model, the published weights and their formula."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import create_model, list_models
from timm.models._features_fx import GraphExtractNet

from visionfuse.models import medvit_blocks
from visionfuse.models.medvit_blocks import NeighborhoodAttention
from visionfuse.models.medvit_published import checkpoint_filter_fn, published_state_dict
from visionfuse.testing import memory_of, saved_for_backward

NAMES = ("medvit_tiny", "medvit_small", "medvit_base", "medvit_large")
SMALL = {
    "depths": (2, 2, 3, 1),
    "dims": (32, 128, 128, 128),
    "stem_chs": (8, 8, 16),
    "num_classes": 7,
}
SIZE = 64  # stages of 16, 8, 4 and 2 pixels


def small(name=NAMES[0], **options) -> Any:
    torch.manual_seed(0)
    model: Any = create_model(name, **(SMALL | options))
    with torch.no_grad():  # so that biases and normalisations count
        for module in model.modules():
            if isinstance(module, NeighborhoodAttention):
                module.rpb.normal_()
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                module.weight.normal_(std=module.weight[0].numel() ** -0.5)
            if isinstance(module, torch.nn.BatchNorm2d | torch.nn.BatchNorm1d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(std=0.1)
    return model


@pytest.fixture
def images():
    return torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


# The registry and the published weights ---------------------------------------------------------------


def test_names_and_configurations():
    assert set(NAMES) <= set(list_models("medvit_*"))
    for name in NAMES:
        cfg = timm.models.get_pretrained_cfg(name)
        assert (cfg.input_size, cfg.pool_size, cfg.classifier) == ((3, 224, 224), (7, 7), "head.fc")


@pytest.mark.parametrize(
    ("name", "used", "published"),
    [("medvit_tiny", 10.74, 11.72), ("medvit_small", 27.34, 30.09), ("medvit_base", 60.85, 67.00),
     ("medvit_large", 107.42, 118.29)],
)  # fmt: skip
def test_parameters_are_those_of_the_release(name, used, published):
    """Millions, of ours and of the published code, which has networks that no forward reads."""
    model: Any = create_model(name, device="meta")
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == used
    state = published_state_dict(model)
    count = sum(
        v.numel() for k, v in state.items() if "running" not in k and "num_batches" not in k and "rbf" not in k
    )  # fmt: skip
    assert round(count / 1e6, 2) == published


def test_published_state_dicts_load_and_save(tmp_path, images):
    """Both ways, with the names that the published code has."""
    source, target = small(legacy_layout=True).eval(), small(legacy_layout=True)
    state = published_state_dict(source)
    hidden = 2 * SMALL["dims"][1]
    assert {
        "features.0.attn.rpb": (1, 13, 13),
        "features.0.conv.conv.3.weight": (96, 1, 7, 7),
        "features.0.conv.conv.6.fc.0.weight": (3, 96),
        "features.3.e_mhsa.norm.running_mean": (96,),
        "features.3.mhca.group_conv3x3.weight": (32, 32, 3, 3),
        "features.3.kan.layers.0.rbf.grid": (8,),
        "features.3.kan.layers.1.spline_linear.weight": (128, 8 * hidden),
        "features.3.conv.conv.0.weight": (hidden, 128, 1, 1),
        "features.3.conv.conv.8.num_batches_tracked": (),
        "norm.weight": (128,),
        "proj_head.0.bias": (7,),
        "stem.3.norm.bias": (16,),
    }.items() <= {k: tuple(v.shape) for k, v in state.items()}.items()
    for key in state:  # the network that is not used may hold anything
        if key.startswith("features.3.conv.") and state[key].is_floating_point():
            state[key] = torch.randn_like(state[key])
    torch.save({"model": state}, tmp_path / "medvit.pth")
    with torch.no_grad():
        for p in target.parameters():
            p.zero_()
    timm.models.load_checkpoint(
        target, str(tmp_path / "medvit.pth"), filter_fn=checkpoint_filter_fn
    )
    assert torch.equal(target.eval()(images), source(images))
    again = published_state_dict(target)
    assert list(again) == list(published_state_dict(source))
    own = source.state_dict()
    assert checkpoint_filter_fn(own, source) is own
    state["features.3.kan.layers.0.rbf.grid"] += 1
    with pytest.raises(ValueError, match="must be 8 centres from"):
        checkpoint_filter_fn(state, source)


def test_saved_for_the_hub(tmp_path, images):
    model = small(legacy_layout=True)
    timm.models.save_for_hf(model, tmp_path, model_args=SMALL | {"legacy_layout": True})
    again = create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert torch.equal(model.eval()(images), again.eval()(images))


# The published formula, written down from its description and state dict alone ------------------------


def formula(w: dict[str, torch.Tensor], x: torch.Tensor, depths: tuple[int, ...]) -> torch.Tensor:
    """Logits of the published network, in evaluation, from its state dict."""

    def norm(name, x):
        parts = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(w[f"{name}.{p}"] for p in parts)) if f"{name}.weight" in w else x

    def patches(name, x, stride):
        x = F.avg_pool2d(x, 2, 2, ceil_mode=True, count_include_pad=False) if stride == 2 else x
        return (
            norm(f"{name}.norm", F.conv2d(x, w[f"{name}.conv.weight"]))
            if f"{name}.conv.weight" in w
            else x
        )

    def linear(name, x):
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def neighborhood(name, x):  # the 49 neighbours of every pixel, gathered
        B, H, W, C = x.shape
        heads = C // 32
        q, k, v = linear(f"{name}.qkv", x).view(B, H, W, 3, heads, 32).unbind(3)
        size_y, size_x = min(7, H), min(7, W)
        out = torch.empty_like(q)
        for i in range(H):
            for j in range(W):
                top, left = (
                    min(max(p - s // 2, 0), n - s) for p, s, n in ((i, size_y, H), (j, size_x, W))
                )
                near = (slice(None), slice(top, top + size_y), slice(left, left + size_x))
                rows = slice(top - i + 6, top - i + 6 + size_y)
                bias = w[f"{name}.rpb"][:, rows, left - j + 6 : left - j + 6 + size_x]
                scores = torch.einsum("bhd,byxhd->bhyx", q[:, i, j], k[near]) * 32**-0.5 + bias
                weights = scores.flatten(2).softmax(-1).view_as(scores)
                out[:, i, j] = torch.einsum("bhyx,byxhd->bhd", weights, v[near])
        return linear(f"{name}.proj", out.reshape(B, H, W, C))

    def h_sigmoid(x):
        return F.relu6(x + 3) / 6

    def locality(name, x, pad):
        y = norm(f"{name}.1", F.conv2d(x, w[f"{name}.0.weight"]))
        y = y * h_sigmoid(y)
        y = norm(f"{name}.4", F.conv2d(y, w[f"{name}.3.weight"], padding=pad, groups=y.shape[1]))
        y = y * h_sigmoid(y)
        squeezed = F.relu(linear(f"{name}.6.fc.0", y.mean((2, 3))))
        y = y * h_sigmoid(linear(f"{name}.6.fc.2", squeezed))[:, :, None, None]
        return x + norm(f"{name}.8", F.conv2d(y, w[f"{name}.7.weight"]))

    def kan(name, x):
        for i in range(2):
            layer = f"{name}.layers.{i}"
            x = F.layer_norm(
                x, x.shape[-1:], w[f"{layer}.layernorm.weight"], w[f"{layer}.layernorm.bias"]
            )
            bumps = 1 - torch.tanh((x[..., None] - w[f"{layer}.rbf.grid"]) / 0.33) ** 2
            x = F.linear(bumps.view(x.shape[0], -1), w[f"{layer}.spline_linear.weight"])
        return x

    for i, stride in enumerate((2, 1, 1, 2)):
        x = F.relu(
            norm(
                f"stem.{i}.norm", F.conv2d(x, w[f"stem.{i}.conv.weight"], stride=stride, padding=1)
            )
        )
    index = 0
    for stage, depth in enumerate(depths):
        for block in range(depth):
            f = f"features.{index}"
            x = patches(f"{f}.patch_embed", x, 2 if stage and not block else 1)
            B, C, H, W = x.shape
            if f"{f}.attn.rpb" in w:
                attended = neighborhood(f"{f}.attn", norm(f"{f}.norm1", x).reshape(B, H, W, C))
                x = x + attended.reshape(B, C, H, W)
                x = x + locality(f"{f}.conv.conv", norm(f"{f}.norm2", x), 3 if stage == 0 else 1)
            else:
                tokens = norm(f"{f}.norm1", x).flatten(2).transpose(1, 2)
                ratio = (8, 4, 2, 1)[stage] ** 2
                pooled = tokens
                if ratio > 1:
                    pooled = F.avg_pool1d(tokens.transpose(1, 2), ratio, ratio)
                    pooled = norm(f"{f}.e_mhsa.norm", pooled).transpose(1, 2)
                q, k, v = (
                    linear(f"{f}.e_mhsa.{n}", t).unflatten(-1, (-1, 32)).transpose(1, 2)
                    for n, t in (("q", tokens), ("k", pooled), ("v", pooled))
                )
                seen = ((q @ k.mT) * 32**-0.5).softmax(-1) @ v
                seen = linear(f"{f}.e_mhsa.proj", seen.transpose(1, 2).flatten(2))
                x = x + seen.transpose(1, 2).reshape(B, C, H, W)
                y = patches(f"{f}.projection", x, 1)
                conv = F.conv2d(
                    y, w[f"{f}.mhca.group_conv3x3.weight"], padding=1, groups=y.shape[1] // 32
                )
                conv = F.relu(norm(f"{f}.mhca.norm", conv))
                x = torch.cat([x, y + F.conv2d(conv, w[f"{f}.mhca.projection.weight"])], 1)
                out = norm(f"{f}.norm2", x)
                x = x + kan(f"{f}.kan", out.reshape(-1, out.shape[1])).reshape(out.shape)
            index += 1
    return linear("proj_head.0", norm("norm", x).mean((2, 3)))


def test_legacy_layout_is_the_published_formula(images):
    model = small(legacy_layout=True).eval()
    expected = formula(published_state_dict(model), images, SMALL["depths"])
    largest = expected.abs().max()
    assert (model(images) - expected).abs().max() < 1e-4 * largest
    assert (small().eval()(images) - expected).abs().max() > 0.1 * largest


def test_clean_layout_follows_a_flip_of_the_picture():
    """A flipped picture gives flipped features where weights are symmetric; the published layout mixes pixels up."""
    x = torch.randn(1, 96, 8, 8)
    found = []
    for legacy in (False, True):
        torch.manual_seed(0)
        block = medvit_blocks.LocalBlock(96, 96, legacy_layout=legacy).eval()
        with torch.no_grad():
            block.attn.rpb += block.attn.rpb.flip(-1)
            block.conv.conv[3].weight += block.conv.conv[3].weight.flip(-1)
        found.append((block(x.flip(-1)).flip(-1) - block(x)).abs().max().item())
    assert found[0] < 1e-5
    assert found[1] > 1e-3


# Attention ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dilated", [False, True])
@pytest.mark.parametrize("size", [(21, 15), (16, 16)], ids=str)
def test_neighborhoods_by_blocks_and_by_mask(dilated, size):
    torch.manual_seed(0)
    module = NeighborhoodAttention(64, dilated=dilated)
    torch.nn.init.normal_(module.rpb)
    x = torch.randn(2, *size, 64, requires_grad=True)
    grad = torch.randn_like(x)
    found = []
    for module.dense_tokens in (0, 10**6):
        out = module(x)
        found.append((out, *torch.autograd.grad(out, [x, *module.parameters()], grad)))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_dilation_sees_further():
    """Pixel (0, 0) of 14 x 14: with dilation 2 it sees every second pixel to (12, 12)."""
    for dilated, expected in ((False, list(range(7))), (True, list(range(0, 14, 2)))):
        module = NeighborhoodAttention(32, dilated=dilated)
        x = torch.randn(1, 14, 14, 32, requires_grad=True)
        (dx,) = torch.autograd.grad(module(x)[0, 0, 0].sum(), x)
        assert dx[0].abs().sum(-1).nonzero().unique().tolist() == expected
    blocks = small(dilated=True).stages[2].blocks
    assert [getattr(b, "attn", None) and b.attn.dilated for b in blocks] == [False, True, None]


# What timm's tests/test_models.py checks ---------------------------------------------------------------


@pytest.mark.parametrize("legacy_layout", [False, True])
def test_forward_and_backward(legacy_layout, images):
    model = small(legacy_layout=legacy_layout, drop_path_rate=0.0).train()
    out = model(images)
    out.mean().backward()
    assert out.shape == (2, 7)
    assert not out.isnan().any()
    missing = [n for n, p in model.named_parameters() if p.grad is None or p.grad.isnan().any()]
    assert not missing


def test_recomputation_saves_memory_and_changes_nothing(images):
    """Gradients and running statistics are those of training that keeps everything, bit for bit."""
    found, kept = [], []
    for recompute in (False, True):
        model = small(drop_path_rate=0.0).train()
        model.set_recompute(recompute)
        with saved_for_backward() as saved:
            loss = model(images).square().sum()
        kept.append(memory_of(saved))
        loss.backward()
        found.append([p.grad for p in model.parameters()] + list(model.buffers()))
    assert all(torch.equal(p, q) for p, q in zip(*found, strict=True))
    # Two activations of three times the channels, and the gated one: five tensors of a local block.
    sides = {0: 16, 1: 8, 2: 4}
    locals_of = {s: sum(hasattr(b, "conv") for b in model.stages[s].blocks) for s in sides}
    pixels = {s: 2 * 3 * SMALL["dims"][s] * side * side * 4 for s, side in sides.items()}
    assert kept[0] - kept[1] >= sum(5 * locals_of[s] * pixels[s] for s in sides)


def test_gradient_checkpointing_changes_nothing(images):
    grads = []
    for checkpoint in (False, True):
        model = small(drop_path_rate=0.0).train()
        model.set_grad_checkpointing(checkpoint)
        model(images).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-4)


def test_default_cfg_and_classifier(images):
    model = small().eval()
    cfg, state = model.default_cfg, model.state_dict()
    assert cfg["classifier"] + ".weight" in state
    assert cfg["first_conv"] + ".weight" in state
    features = model.forward_features(images)
    assert features.shape == (2, model.num_features, 2, 2)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    model.reset_classifier(0)
    assert model(images).shape == (2, model.num_features)
    model.reset_classifier(0, "")
    assert model(images).shape == features.shape
    model.reset_classifier(3, "avg")
    assert model(images).shape == (2, 3)
    assert small(num_classes=0).eval()(images).shape == (2, 128)
    assert small(in_chans=1).eval()(images[:, :1]).shape == (2, 7)
    assert set(model.group_matcher()) == {"stem", "blocks"}


def test_features_intermediates_and_pruning(images):
    extractor: Any = create_model(NAMES[0], features_only=True, **SMALL)
    assert extractor.feature_info.channels() == list(SMALL["dims"])
    assert extractor.feature_info.reduction() == [4, 8, 16, 32]
    shapes = [(2, c, s, s) for c, s in zip(SMALL["dims"], (16, 8, 4, 2), strict=True)]
    assert [tuple(o.shape) for o in extractor(images)] == shapes
    model = small().eval()
    final, all_of_them = model.forward_intermediates(images)
    assert torch.equal(final, model.forward_features(images))
    assert [tuple(t.shape) for t in all_of_them] == shapes
    some = model.forward_intermediates(images, indices=[0, 1], intermediates_only=True)
    assert model.prune_intermediate_layers([0, 1]) == [0, 1]
    assert len(model.stages) == 2
    pruned = model.forward_intermediates(images, indices=[0, 1], intermediates_only=True)
    assert all(torch.equal(p, q) for p, q in zip(some, pruned, strict=True))


def test_torchscript(images):
    model = small().eval()
    torch.testing.assert_close(torch.jit.script(model)(images), model(images), rtol=1e-3, atol=1e-4)


def test_fx_forward_and_backward(images):
    model = small().eval()
    out = GraphExtractNet(model, ["head"])(images)
    out = out[0] if isinstance(out, list | tuple) else out
    assert torch.equal(out, model(images))
    out.mean().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.slow
def test_compiles_whole(images):
    model = small(drop_path_rate=0.0).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(model(images).square().sum(), list(model.parameters()))
    got = torch.autograd.grad(compiled(images).square().sum(), list(model.parameters()))
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kan_impl", ["reference", "portable"])
def test_every_implementation_and_half_precision(kan_impl, images):
    model, expected = small(kan_impl=kan_impl).eval(), small().eval()(images)
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
    last = model(images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(last, expected, rtol=1e-3, atol=1e-3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (model(images) - expected).abs().max() < 0.1 * expected.abs().max()


def test_wrong_sizes():
    with pytest.raises(ValueError, match="multiple of 3"):
        small(depths=(1, 1, 4, 1))
    with pytest.raises(ValueError, match="128 at least, got 64"):
        small(dims=(32, 64, 128, 128))


def test_it_learns(images):
    model = small(drop_path_rate=0.0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    labels = torch.tensor([2, 5])
    losses = []
    for _ in range(10):
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("legacy_layout", [False, True])
def test_a_gpu_computes_the_same(legacy_layout, images, monkeypatch):
    """Forward and gradients in float32, with the kernels for KANs and for neighborhoods."""
    monkeypatch.setattr(
        torch.backends.cudnn, "allow_tf32", False
    )  # which convolutions have by default
    settled = small(legacy_layout=legacy_layout, drop_path_rate=0.0)
    for module in settled.modules():  # random statistics let numbers grow until rounding decides
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        settled.train()(images)
    found = []
    for device in ("cpu", "cuda"):
        model = small(legacy_layout=legacy_layout, drop_path_rate=0.0).eval()
        model.load_state_dict(settled.state_dict())
        model.to(device)
        loss = model(images.to(device)).square().mean()
        grads = torch.autograd.grad(loss, list(model.parameters()))
        found.append([t.cpu() for t in (loss.detach(), *grads)])
    # On a CPU float32 differs from float64 by up to 4e-3 here.
    for cpu, gpu in zip(*found, strict=True):
        assert (cpu - gpu).abs().max() <= 2e-2 * cpu.abs().max() + 1e-6

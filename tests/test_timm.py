"""timm's vision transformers with a recipe equal the stock model under the recipe's mask."""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import pytest
import timm
import torch

import visionfuse
from visionfuse import Neighborhood, TokenLayout, recipes
from visionfuse.kernels.plan import neighborhood_mask
from visionfuse.testing_pipelines import explicit_mask, flux_pipeline
from visionfuse.vision import Enabled, disable, enable

WINDOW = {"window": (3, 4), "stride": (1, 2)}
GRID, PATCH = (4, 6), 16
NAMES = {
    "vit": ("vit_tiny_patch16_224", {"dynamic_img_size": True}),
    "registers": ("vit_little_patch16_reg4_gap_256", {"dynamic_img_size": True}),
    "dinov3": ("vit_small_patch16_dinov3", {"dynamic_img_size": True}),
    "eva": ("eva02_tiny_patch14_224", {"dynamic_img_size": True}),
    "naflex": ("naflexvit_base_patch16_gap", {}),
}


def build(kind: str, **changes):
    name, options = NAMES[kind]
    torch.manual_seed(0)
    model = timm.create_model(
        name, num_classes=5, depth=2, embed_dim=32, num_heads=2, **options, **changes
    )
    for path, weight in model.named_parameters():
        if weight.ndim >= 2:
            torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
        elif "gamma" in path or "ls" in path:  # layer scales so small that attention would not show
            torch.nn.init.ones_(weight)
    return model.eval()


def images(kind: str, grid=GRID, batch=2):
    side = 14 if kind == "eva" else PATCH
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, grid[0] * side, grid[1] * side, generator=generator)


@pytest.fixture(scope="module", params=list(NAMES))
def kind(request):
    return request.param


@pytest.fixture
def model(kind):
    model = build(kind)
    yield model
    disable(model)


def close(a, b, tolerance=1e-4):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * float(b.abs().max()))


def change(a, b):
    return float((a - b).abs().mean() / b.abs().mean())


def stock_mask(model, grid=GRID, **rule):
    """What the stock model takes to compute the same, if this version of timm lets it."""
    if "attn_mask" not in inspect.signature(model.forward_intermediates).parameters:
        pytest.skip("timm before 1.0.26: this model takes no mask to compare with")
    return explicit_mask(Neighborhood(**rule), text=model.num_prefix_tokens, grids=[grid])


def record(model) -> Enabled:
    return vars(model)["_visionfuse"]


@torch.no_grad()
def test_sage_changes_little_and_comes_off(kind, model):
    x = images(kind)
    before, types = set(vars(model)), [type(m) for m in model.modules()]
    stock, pickled = model(x), pickle.dumps(model.state_dict())
    enable(model, "sage")
    assert 0 < change(model(x), stock) < 0.15
    assert not record(model).notes
    disable(model)
    disable(model)
    assert torch.equal(model(x), stock)
    assert set(vars(model)) == before
    assert [type(m) for m in model.modules()] == types
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert pickle.dumps(model.state_dict()) == pickled


@torch.no_grad()
@pytest.mark.parametrize("grid", [GRID, (5, 3)])
def test_neighborhood_equals_its_mask(kind, model, grid):
    """On grids of two sizes. Class and register tokens see all and are seen by all."""
    if kind == "naflex":
        pytest.skip("takes a mask with intermediates only, see below")
    x, rule = images(kind, grid), {"window": (3, 3), "stride": 1}
    mask = stock_mask(model, grid, **rule)
    stock, wanted = model(x), model(x, attn_mask=mask)
    assert change(wanted, stock) > 0.02
    enable(model, "gna", **rule)
    close(model(x), wanted)
    assert not record(model).notes


@torch.no_grad()
def test_intermediates_are_in_the_models_order(kind, model):
    x, mask = images(kind), stock_mask(model, **WINDOW)
    wanted, wanted_all = model.forward_intermediates(x, attn_mask=mask, norm=True)
    enable(model, "gna", **WINDOW)
    features, maps = model.forward_intermediates(x, norm=True)
    close(features, wanted)
    for got, expected in zip(maps, wanted_all, strict=True):
        assert got.shape == expected.shape == (2, 32, *GRID)
        close(got, expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_equals_its_mask(kind, model, checkpointing):
    x, mask = images(kind), stock_mask(model, **WINDOW)
    model.train()

    def gradients(**call):
        model.zero_grad()
        features = model.forward_intermediates(x, intermediates_only=True, **call)[-1]
        features.square().mean().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    wanted = gradients(attn_mask=mask)
    model.set_grad_checkpointing(checkpointing)
    enable(model, "gna", **WINDOW)
    got = gradients()
    assert got.keys() == wanted.keys()
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-5, msg=name)


def test_sage_trains():
    model, x = build("vit"), images("vit")
    enable(model, "sage")
    model.train()
    model(x).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "recipe", "grids"),
    [
        ("vit", "gna", [GRID]),
        pytest.param("vit", "gna", [GRID, (5, 4)], marks=pytest.mark.slow),
        pytest.param("vit", "sage", [GRID, (5, 4)], marks=pytest.mark.slow),
        pytest.param("dinov3", "sage", [GRID, (5, 4)], marks=pytest.mark.slow),
        pytest.param("eva", "gna", [GRID, (5, 4)], marks=pytest.mark.slow),
        pytest.param("naflex", "gna", [GRID], marks=pytest.mark.slow),
    ],
)
def test_compiled_equals_eager(kind, recipe, grids):
    model, options = build(kind), WINDOW if recipe == "gna" else {}
    sizes = [images(kind, grid) for grid in grids]
    stock = [model(x) for x in sizes]
    enable(model, recipe, **options)
    expected = [model(x) for x in sizes]
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for x, wanted in zip(sizes, expected, strict=True):
        close(compiled(x), wanted, 1e-3)
    disable(model)
    for x, wanted in zip(sizes, stock, strict=True):
        close(compiled(x), wanted)
    torch._dynamo.reset()


def naflex_batch(model, sizes=((4, 6), (3, 5))):
    """Two images of different sizes, the second padded, as NaFlex's collator makes them."""
    generator = torch.Generator().manual_seed(2)
    most = max(h * w for h, w in sizes)
    batch = {
        "patches": torch.zeros(len(sizes), most, PATCH * PATCH * 3),
        "patch_coord": torch.zeros(len(sizes), most, 2, dtype=torch.long),
        "patch_valid": torch.zeros(len(sizes), most, dtype=torch.bool),
    }
    for i, (h, w) in enumerate(sizes):
        n = h * w
        batch["patches"][i, :n] = torch.randn(n, PATCH * PATCH * 3, generator=generator)
        batch["patch_coord"][i, :n] = torch.cartesian_prod(torch.arange(h), torch.arange(w))
        batch["patch_valid"][i, :n] = True
    return batch


@torch.no_grad()
def test_padding_of_naflex():
    """Padding is told by keys instead of by pairs, which changes no valid token."""
    model = build("naflex")
    batch = naflex_batch(model)
    stock = model(batch)
    enable(model, "dense", impl="blocks")
    close(model(batch), stock)
    enable(model, "sage")
    assert 0 < change(model(batch), stock) < 0.15
    assert not record(model).notes
    enable(model, "gna", **WINDOW)
    close(model(batch), stock)
    assert any("padding" in note for note in record(model).notes)


@torch.no_grad()
def test_masks_that_the_user_gives():
    model, x = build("vit"), images("vit")
    length = 1 + GRID[0] * GRID[1]
    seen = torch.rand(length, length, generator=torch.Generator().manual_seed(3)) > 0.3
    numbers = torch.zeros(length, length).masked_fill(~seen, -1.0)
    stock = model(x, attn_mask=seen), model(x, attn_mask=numbers)
    enable(model, "dense", impl="blocks")
    close(model(x, attn_mask=seen), stock[0])
    assert not record(model).notes
    assert torch.equal(model(x, attn_mask=numbers), stock[1])
    assert any("of numbers" in note for note in record(model).notes)


@torch.no_grad()
def test_dense_layers_and_auto():
    model, x = build("vit"), images("vit")
    stock = model(x)
    enable(model, "gna", **WINDOW, dense_layers=2)
    assert torch.equal(model(x), stock)
    enable(model, "gna", **WINDOW, dense_layers=(0,))
    assert len(record(model).layers) == 1
    assert not torch.equal(model(x), stock)
    enable(model)
    assert not record(model).layers
    assert torch.equal(model(x), stock)
    enable(model, recipes.build("gna", **WINDOW))
    assert not torch.equal(model(x), stock)


@torch.no_grad()
def test_copies_and_files_run_their_own_attention():
    model, x = build("vit"), images("vit")
    stock = model(x)
    enable(model, "gna", **WINDOW)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(x), stock)
        enable(twin, "gna", **WINDOW)
        assert torch.equal(twin(x), model(x))
        disable(twin)
        assert torch.equal(twin(x), stock)
    assert not torch.equal(model(x), stock)


@torch.no_grad()
def test_report_says_what_ran():
    model, x = build("vit"), images("vit")
    assert "not enabled" in str(visionfuse.report(model))
    enable(model)
    assert "exact and unchanged" in str(visionfuse.report(model))
    enable(model, "gna", **WINDOW, dense_layers=(0,))
    model(x)
    model(x, attn_mask=torch.zeros(25, 25))
    text = str(visionfuse.report(model))
    for part in ("neighborhood attention, window (3, 4)", "1 layers follow it", "4x6",
                 "1 class and register tokens", "an attention mask was given"):  # fmt: skip
        assert part in text
    disable(model)
    assert visionfuse.report(model).recipe is None


def test_what_is_refused():
    swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=56, num_classes=0)
    vit = build("vit")
    for wrong, error, match in [
        (lambda: enable(swin, "sage"), ValueError, "SwinTransformer is not supported.*in windows"),
        (lambda: enable(vit, "gna", dense_steps=3), ValueError, "dense_steps name steps of a denoising run"),
        (lambda: enable(vit, "sgae"), ValueError, "Did you mean 'sage'"),
        (lambda: enable(vit, "sage", impl="tritn"), ValueError, "Unknown implementation"),
        (lambda: enable(vit, "gna", window=3, dense_layers=(7,)), ValueError, "dense_layers"),
        (lambda: enable(build("vit", patch_drop_rate=0.5), "gna"), ValueError, "leaves no grid"),
        (lambda: enable(3, "sage"), TypeError, "Expected a diffusers pipeline"),
    ]:  # fmt: skip
        with pytest.raises(error, match=match):
            wrong()
    assert "_visionfuse" not in vars(vit)
    vit.get_submodule("blocks.0.attn").fused_attn = False
    with pytest.raises(ValueError, match="fused_attn=False"):
        enable(vit, "sage")


def test_checkpoints_that_nobody_could_tell_apart():
    model = build("vit").train()
    model.set_grad_checkpointing(True)
    enable(model, "gna", window=3)
    model(images("vit", (4, 6)))
    with pytest.raises(ValueError, match=r"\(4, 6\) and \(6, 4\) have as many patches"):
        model(images("vit", (6, 4)))
    model.set_grad_checkpointing(False)
    model(images("vit", (6, 4)))


def test_the_same_words_take_a_pipeline():
    pipe = flux_pipeline()
    visionfuse.enable(pipe, "sage")
    assert visionfuse.report(pipe).recipe.name == "sage"
    visionfuse.disable(pipe)
    assert visionfuse.report(pipe).recipe is None


def test_the_mask_of_this_file_is_the_rule():
    layout = TokenLayout.joint(text=1, grids=[GRID])
    mask = explicit_mask(Neighborhood(**WINDOW), text=1, grids=[GRID])
    assert mask.shape == (layout.length,) * 2
    assert mask[0].all()
    assert mask[:, 0].all()
    assert torch.equal(mask[1:, 1:], neighborhood_mask(Neighborhood(**WINDOW).resolve(GRID)))

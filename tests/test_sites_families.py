"""Every family with a recipe equals the stock pipeline under the recipe's mask, and comes back untouched."""

from __future__ import annotations

import inspect
import pickle
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler

import visionfuse
from visionfuse import Dense, Neighborhood, Order, Recipe, Schedule, TokenLayout
from visionfuse.kernels.plan import neighborhood_mask
from visionfuse.sites import denoisers, qwen_image
from visionfuse.testing_families import TINY, Loop, Tiny, numbers, padding

PLAN = {"density": 0.4, "stride": 1}
TILES = {
    2: Order(kind="tiled", tile=(4, 6), subtile=(2, 3)),
    3: Order(kind="tiled", tile=(2, 2, 3)),
}


@pytest.fixture(scope="module", params=list(TINY))
def tiny(request):
    return TINY[request.param]()


@pytest.fixture(autouse=True)
def _disabled(request):
    yield
    if "tiny" in request.fixturenames:
        request.getfixturevalue("tiny").pipe.disable_visionfuse()


@pytest.fixture(scope="module")
def stock(tiny):
    return tiny.run()


def close(a, b, tolerance=1e-4):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * float(b.abs().max()))


def change(a, b):
    return float((a - b).abs().mean() / b.abs().mean())


def one_denoiser(pipe):
    (found,) = visionfuse.report(pipe).denoisers
    return found


@contextmanager
def rule_in_sdpa(rule, layouts):
    """PyTorch's attention with the rule's mask, wherever a call has as many tokens as one of the layouts:
    no plan, no order, no routing."""
    own, masks = F.scaled_dot_product_attention, {}
    for layout in layouts:
        mask = torch.ones(layout.length, layout.length, dtype=torch.bool)
        for part, start in zip(layout.segments, layout.offsets, strict=False):
            if part.kind == "grid":
                inside = slice(start, start + part.length)
                mask[inside, inside] = neighborhood_mask(rule.resolve(part.shape))
        masks[layout.length] = mask

    def masked(query, key, value, attn_mask=None, *args, **kwargs):
        if query.shape[-2] == key.shape[-2] and query.shape[-2] in masks:
            mask = masks[query.shape[-2]]
            attn_mask = mask if attn_mask is None else mask & attn_mask
        return own(query, key, value, attn_mask, *args, **kwargs)

    F.scaled_dot_product_attention = masked
    try:
        yield
    finally:
        F.scaled_dot_product_attention = own


@contextmanager
def layouts_of(pipe):
    """Collects those of all forwards: classifier-free guidance may have texts of two lengths."""
    (found,) = denoisers(pipe)
    seen: list[TokenLayout] = []
    names = list(inspect.signature(type(found.model).forward).parameters)[1:]

    def look(model, args, kwargs):
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        layout = found.site.layout(model, arguments, {})
        seen.extend([layout, *found.site.levels(model, layout)])

    handle = found.model.register_forward_pre_hook(look, with_kwargs=True)
    yield seen
    handle.remove()


def orders(tiny):
    return [Order(kind="row"), *([TILES[len(tiny.grid)]] if tiny.moves else [])]


def test_exact_recipes_draw_the_same(tiny, stock):
    """With padding, in both orders, at every level of a UNet."""
    for order in orders(tiny):
        recipe = Recipe(plan=Dense(), order=order, schedule=Schedule(min_steps=0))
        tiny.pipe.enable_visionfuse(recipe, impl="blocks")
        close(tiny.run(), stock, 2e-5)
        found = one_denoiser(tiny.pipe)
        assert found.layers == found.routed == tiny.layers
        assert found.calls["plan"] > 0 == found.calls["dense"]
        assert not found.notes
        assert (found.order.kind == "row") == (order.kind == "row")


def test_neighborhood_equals_its_mask(tiny, stock):
    with layouts_of(tiny.pipe) as layouts:
        tiny.run()
    with rule_in_sdpa(Neighborhood(**PLAN), layouts):
        expected = tiny.run()
    assert change(expected, stock) > 0.01, "the mask must matter"
    for order in orders(tiny):
        tiny.pipe.enable_visionfuse("gna", **PLAN, order=order, dense_steps=0)
        close(tiny.run(), expected)
        assert not one_denoiser(tiny.pipe).notes


def traces(model):
    state = {}
    for path, child in model.named_modules():
        processor = getattr(child, "processor", None)
        state[path] = (
            id(child), type(child), list(child._forward_hooks), list(child._forward_pre_hooks), sorted(vars(child)),
            id(processor), type(processor), dict(vars(processor)) if processor is not None else None,
        )  # fmt: skip
    return state


def test_sage_changes_little_and_leaves_no_trace(tiny, stock):
    (denoiser,) = denoisers(tiny.pipe)
    before, pickled = traces(denoiser.model), pickle.dumps(denoiser.model)
    tiny.pipe.enable_visionfuse("sage")
    assert 0 < change(tiny.run(), stock) < 0.05
    found = one_denoiser(tiny.pipe)
    assert found.calls["plan"] > 0 == found.calls["dense"]
    assert "emulated" in found.precision
    assert not found.notes
    tiny.pipe.disable_visionfuse()
    assert traces(denoiser.model) == before
    assert pickle.dumps(denoiser.model) == pickled
    assert torch.equal(tiny.run(), stock)


def test_an_order_that_a_model_cannot_take_is_told():
    tiny = TINY["sd3"]()
    tiny.pipe.enable_visionfuse("gna", **PLAN, order=TILES[2], dense_steps=0)
    tiny.run()
    found = one_denoiser(tiny.pipe)
    assert found.order.kind == "row"
    assert any("positions are added inside the model" in note for note in found.notes)


def test_schedules_of_schedulers_that_do_not_count():
    """CogVideoX's has no step_index."""
    tiny = TINY["cogvideox_5b"]()
    assert not hasattr(tiny.pipe.scheduler, "step_index")
    tiny.pipe.enable_visionfuse("gna", **PLAN, dense_steps=1)
    for _ in range(2):
        tiny.run(num_inference_steps=4)
    found = one_denoiser(tiny.pipe)
    assert found.calls == {"plan": 6, "dense": 2}
    assert not found.notes
    assert "step" not in vars(tiny.pipe.scheduler)


def test_masks_are_read_once_a_call(monkeypatch):
    """Reading a mask waits for the GPU: once for each of the two texts, not in every step and layer."""
    tiny, reads = TINY["qwen_image"](), []
    read = qwen_image.key_ranges
    monkeypatch.setattr(qwen_image, "key_ranges", lambda mask: reads.append(mask) or read(mask))
    tiny.pipe.enable_visionfuse("sage")
    tiny.run(num_inference_steps=4)
    assert len(reads) == 2
    assert one_denoiser(tiny.pipe).calls["plan"] == 8


def test_padding_is_never_seen():
    """What stands in the padded places does not matter, and what stands in the others does."""
    tiny = TINY["qwen_image"]()
    tiny.pipe.enable_visionfuse("sage")
    embeds, mask = tiny.call["prompt_embeds"], tiny.call["prompt_embeds_mask"].bool()
    noise = numbers(*embeds.shape, seed=9)
    expected = tiny.run()
    padded = tiny.run(prompt_embeds=torch.where(mask[..., None], embeds, noise))
    assert change(padded, expected) < 0.01  # padded keys share scales with valid ones
    valid = tiny.run(prompt_embeds=torch.where(mask[..., None], noise, embeds))
    assert change(valid, expected) > 0.02


def test_padding_of_a_batch_without_any_mask_argument():
    """Z-Image pads the shorter texts of a batch by itself."""
    tiny = TINY["z_image"]()
    prompts = {"prompt_embeds": [numbers(40, 32), numbers(5, 32)], "guidance_scale": 0.0}
    stock = tiny.run(**prompts)
    tiny.pipe.enable_visionfuse(Recipe(plan=Dense(), schedule=Schedule(min_steps=0)), impl="blocks")
    close(tiny.run(**prompts), stock, 2e-5)
    assert not one_denoiser(tiny.pipe).notes


@pytest.mark.parametrize("lengths", [[12, 12], [1, 12]])
def test_masks_of_other_lengths_reach_the_same_pipeline(lengths):
    tiny = TINY["qwen_image"]()
    stock = tiny.run(prompt_embeds_mask=padding(lengths, 12))
    tiny.pipe.enable_visionfuse("dense", impl="blocks")
    tiny.run()
    close(tiny.run(prompt_embeds_mask=padding(lengths, 12)), stock, 2e-5)


def test_reference_images():
    """Qwen-Image-Edit appends grids of other sizes, each with a window of its own."""
    transformer = TINY["qwen_image"]().pipe.transformer
    shapes = [(1, 8, 12), (1, 6, 8)]
    call = {
        "latents": numbers(1, 96 + 48, 16), "encoder_hidden_states": numbers(1, 12, 32),
        "encoder_hidden_states_mask": padding([9], 12), "img_shapes": [shapes],
    }  # fmt: skip
    tiny = Tiny(Loop(transformer, FlowMatchEulerDiscreteScheduler()), call, layers=2, grid=(8, 12))
    layout = TokenLayout.joint(text=12, grids=[shape[1:] for shape in shapes])
    with rule_in_sdpa(Neighborhood(**PLAN), [layout]):
        expected = tiny.run()
    assert change(expected, tiny.run()) > 0.01
    tiny.pipe.enable_visionfuse("gna", **PLAN, order=TILES[2], dense_steps=0)
    close(tiny.run(), expected)


def test_padding_on_the_left():
    """HunyuanImage without a second text: keys as the mask says, after the image."""
    tiny = TINY["hunyuan_image"]()
    call = {
        "encoder_hidden_states_2": None, "encoder_attention_mask_2": None,
        "encoder_attention_mask": padding([10, 6], 10).flip(1),
    }  # fmt: skip
    stock = tiny.run(**call)
    recipe = Recipe(plan=Dense(), order=TILES[2], schedule=Schedule(min_steps=0))
    tiny.pipe.enable_visionfuse(recipe, impl="blocks")
    close(tiny.run(**call), stock, 2e-5)
    assert not one_denoiser(tiny.pipe).notes


def test_texts_of_two_lengths_in_a_batch():
    """Lumina 2 puts the image right after each text: no grid in common, and every pair is still seen."""
    tiny = TINY["lumina2"]()
    call = {
        "prompt_embeds": numbers(2, 10, 32), "prompt_attention_mask": padding([6, 9], 10),
        "negative_prompt_embeds": numbers(2, 10, 32, seed=6),
        "negative_prompt_attention_mask": padding([4, 4], 10),
    }  # fmt: skip
    stock = tiny.run(**call)
    tiny.pipe.enable_visionfuse("dense", impl="blocks")
    close(tiny.run(**call), stock, 2e-5)
    assert not one_denoiser(tiny.pipe).notes


# -- what else people do ----------------------------------------------------------------------------


def test_lora_and_offload():
    from peft import LoraConfig

    tiny = TINY["stable_diffusion_xl"]()
    torch.manual_seed(7)
    tiny.pipe.unet.add_adapter(
        LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
    )
    tiny.pipe.enable_model_cpu_offload(device="cpu")
    stock = tiny.run()
    tiny.pipe.enable_visionfuse("dense", impl="blocks")
    for _ in range(2):
        close(tiny.run(), stock, 2e-5)
    assert one_denoiser(tiny.pipe).calls == {"plan": 4, "dense": 0}


def test_fused_projections_and_group_offload():
    tiny = TINY["cogvideox_5b"]()
    tiny.pipe.transformer.fuse_qkv_projections()
    tiny.pipe.transformer.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
    )
    stock = tiny.run()
    tiny.pipe.enable_visionfuse("dense", impl="blocks")
    close(tiny.run(), stock, 2e-5)
    assert not one_denoiser(tiny.pipe).notes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dense_steps"),
    [("cogvideox_5b", 0), ("sd3", 1), ("qwen_image", 1), ("stable_diffusion", 1)],
)
def test_compiled_equals_eager(name, dense_steps):
    """A graph or two more than the stock model's, none for a second call, stock graphs again afterwards."""
    tiny, count = TINY[name](), []
    (denoiser,) = denoisers(tiny.pipe)
    stock = tiny.run()
    recipe = {**PLAN, "dense_steps": dense_steps}
    tiny.pipe.enable_visionfuse("gna", **recipe)
    expected = tiny.run()
    tiny.pipe.disable_visionfuse()

    def backend(graph, inputs):
        count.append(1)
        return graph.forward

    torch._dynamo.reset()
    setattr(
        tiny.pipe, denoiser.name, torch.compile(denoiser.model, fullgraph=True, backend=backend)
    )
    close(tiny.run(), stock)
    first = len(count)
    tiny.pipe.enable_visionfuse("gna", **recipe)
    close(tiny.run(), expected)
    assert first < len(count) <= 3 * first
    once = len(count)
    close(tiny.run(), expected)
    tiny.pipe.disable_visionfuse()
    close(tiny.run(), stock)
    assert len(count) == once
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("name", list(TINY))
def test_kernels_of_a_gpu(name):
    """The same with kernels, in bfloat16: little changes where they round, less where they do not."""
    tiny = TINY[name]()
    tiny.pipe.to("cuda", torch.bfloat16)

    def moved(x):
        if isinstance(x, list):
            return [moved(y) for y in x]
        if isinstance(x, torch.Tensor):
            return x.to("cuda", torch.bfloat16 if x.is_floating_point() else x.dtype)
        return x

    tiny.call = {key: moved(value) for key, value in tiny.call.items()}
    stock = tiny.run().float()
    for recipe, most in (("sage", 0.1), ("dense", 0.05)):
        options = {"impl": "triton"} if recipe == "dense" else {}
        tiny.pipe.enable_visionfuse(recipe, **options)
        assert change(tiny.run().float(), stock) < most
        found = one_denoiser(tiny.pipe)
        assert found.calls["dense"] == 0, found.notes
    tiny.pipe.disable_visionfuse()
    assert torch.equal(tiny.run().float(), stock)

"""A recipe together with everything else that people do to a pipeline, in either order.

Every case compares with the stock pipeline under the same treatment and the recipe's mask.
"""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from dataclasses import dataclass, field

import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    FirstBlockCacheConfig,
    FluxControlNetPipeline,
    FluxFillPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    PyramidAttentionBroadcastConfig,
)
from diffusers.models.attention_dispatch import _AttentionBackendRegistry

import visionfuse
from visionfuse import Neighborhood, Order
from visionfuse.context import ACTIVE
from visionfuse.sites import denoisers
from visionfuse.testing_pipelines import (
    TEXT_WIDTH,
    explicit_mask,
    flux_controlnet,
    flux_pipeline,
    ip_adapter_weights,
    masked_attention,
    redux_pipeline,
    run,
    wan_pipeline,
)

PLAN = {"density": 0.3, "stride": 2}
FLUX_RECIPE = {**PLAN, "order": Order(kind="tiled", tile=(4, 6), subtile=(2, 3)), "dense_steps": 0}
WAN_RECIPE = {**PLAN, "order": Order(kind="tiled", tile=(2, 2, 3)), "dense_steps": 0}


def close(a, b, tolerance=1e-4):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * float(b.abs().max()))


def mask_of(text, *grids):
    return explicit_mask(Neighborhood(**PLAN), text=text, grids=list(grids))


def image(height=32, width=48, seed=5):
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed))


# -- pipelines of the FLUX family -------------------------------------------------------------------


@dataclass
class Case:
    cls: type
    call: dict = field(default_factory=dict)
    grids: tuple = ((16, 24),)
    text: int = 48
    transformer: dict = field(default_factory=dict)
    extra: object = dict
    steps: int = 3


def redux_call():
    prior = redux_pipeline()
    embeds, pooled = prior(image(16, 16), prompt="a cube", return_dict=False)
    return {"prompt": None, "prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


FAMILY = {
    "text": Case(FluxPipeline),
    "guidance": Case(FluxPipeline, transformer={"guidance_embeds": True}),
    "true_cfg": Case(FluxPipeline, {"negative_prompt": "blue", "true_cfg_scale": 2.0}),
    "batch": Case(FluxPipeline, {"prompt": ["red", "a blue ball"], "num_images_per_prompt": 2}),
    "odd_size": Case(FluxPipeline, {"height": 26, "width": 38}, grids=((13, 19),)),
    "img2img": Case(FluxImg2ImgPipeline, {"image": image(), "strength": 0.6}, steps=5),
    "inpaint": Case(
        FluxInpaintPipeline, {"image": image(), "mask_image": image()[:, :1].round(), "strength": 0.9}
    ),
    "controlnet": Case(
        FluxControlNetPipeline,
        {"control_image": image()},
        extra=lambda: {"controlnet": flux_controlnet()},
    ),
    "fill": Case(
        FluxFillPipeline,
        {"image": image(), "mask_image": image()[:, :1].round()},
        transformer={"in_channels": 12, "out_channels": 4},
    ),
    "kontext": Case(
        FluxKontextPipeline, {"image": image(24, 32), "_auto_resize": False, "max_area": 32 * 48},
        grids=((16, 24), (12, 16)),
    ),
    "redux": Case(FluxPipeline, redux_call, text=512 + 4),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILY)
def test_flux_family(name):
    case = FAMILY[name]
    pipe = flux_pipeline(case.cls, extra=case.extra(), **case.transformer)
    call = case.call() if callable(case.call) else case.call
    stock = run(pipe, steps=case.steps, **call)
    with masked_attention(pipe, mask_of(case.text, *case.grids)):
        expected = run(pipe, steps=case.steps, **call)
    assert (expected - stock).abs().max() > 0.01, "the mask must matter"
    pipe.enable_visionfuse("gna", **FLUX_RECIPE)
    close(run(pipe, steps=case.steps, **call), expected)
    report = visionfuse.report(pipe).denoisers[0]
    assert report.calls["plan"] > 0 == report.calls["dense"]
    assert not report.notes
    pipe.disable_visionfuse()
    assert torch.equal(run(pipe, steps=case.steps, **call), stock)


def test_image_to_image_counts_the_steps_it_runs():
    """Strength 0.5 of 8 steps is a run of 4: the share of dense steps is of those."""
    pipe = flux_pipeline(FluxImg2ImgPipeline)
    pipe.enable_visionfuse("gna", **{**FLUX_RECIPE, "dense_steps": None, "dense_start": 0.5})
    run(pipe, steps=8, image=image(), strength=0.5)
    assert visionfuse.report(pipe).denoisers[0].phases == ("steps 0-1 dense", "steps 2-3 plan")


# -- treatments, before and after enabling ----------------------------------------------------------


def add_lora(pipe):
    from peft import LoraConfig

    torch.manual_seed(7)
    pipe.transformer.add_adapter(
        LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
    )


def add_ip_adapter(pipe):
    pipe.transformer._load_ip_adapter_weights([ip_adapter_weights(pipe.transformer)])


IP_IMAGE = torch.linspace(-1, 1, TEXT_WIDTH).reshape(1, 1, -1)
IP_CALL = {
    "ip_adapter_image_embeds": [IP_IMAGE],
    "negative_ip_adapter_image_embeds": [torch.zeros_like(IP_IMAGE)],
}

TREATMENTS = {
    "nothing": lambda pipe: None,
    "lora": add_lora,
    "model_offload": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "sequential_offload": lambda pipe: cpu_offload(pipe.transformer, "cpu"),
    "group_offload_leaf": lambda pipe: pipe.transformer.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type="leaf_level"
    ),
    "group_offload_block": lambda pipe: pipe.transformer.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
    ),
    "first_block_cache": lambda pipe: pipe.transformer.enable_cache(
        FirstBlockCacheConfig(threshold=1.0)
    ),
    "attention_broadcast": lambda pipe: pipe.transformer.enable_cache(
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(0, 1000),
            spatial_attention_block_identifiers=["blocks", "transformer_blocks"],
            current_timestep_callback=lambda: 500,
        )
    ),
    "fused_projections": lambda pipe: pipe.transformer.fuse_qkv_projections(),
    "own_backend": lambda pipe: [
        layer.set_attention_backend("_native_math")
        for layer in pipe.transformer.modules()
        if hasattr(layer, "set_attention_backend") and layer is not pipe.transformer
    ],
}


@pytest.mark.parametrize("first", ["enable_first", "enable_last"])
@pytest.mark.parametrize("name", [*TREATMENTS, "ip_adapter"])
@pytest.mark.parametrize("family", ["flux", "wan"])
def test_treatments(family, name, first):
    treat = add_ip_adapter if name == "ip_adapter" else TREATMENTS[name]
    if family == "wan" and name == "ip_adapter":
        pytest.skip("Wan has no IP-Adapter")
    build, recipe, mask = {
        "flux": (flux_pipeline, FLUX_RECIPE, mask_of(48, (16, 24))),
        "wan": (wan_pipeline, WAN_RECIPE, mask_of(0, (3, 4, 6))),
    }[family]
    call = IP_CALL if name == "ip_adapter" else {}
    pipe = build()
    treat(pipe)
    with masked_attention(pipe, mask):
        expected = run(pipe, steps=4, **call)

    pipe = build()
    if first == "enable_first":
        pipe.enable_visionfuse("gna", **recipe)
        treat(pipe)
    else:
        treat(pipe)
        pipe.enable_visionfuse("gna", **recipe)
    close(run(pipe, steps=4, **call), expected)
    close(run(pipe, steps=4, **call), expected)  # hooks that vanish after a first call would show
    report = visionfuse.report(pipe).denoisers[0]
    assert report.calls["plan"] > 0 == report.calls["dense"]
    assert bool(report.notes) == (name == "ip_adapter")  # its second attention is told


@pytest.mark.parametrize("family", ["flux", "wan"])
def test_cached_residuals_survive_the_switch_of_phases(family):
    """FirstBlockCache adds residuals of dense steps in sparse ones: the order must be the same."""
    build, recipe, mask = {
        "flux": (flux_pipeline, FLUX_RECIPE, mask_of(48, (16, 24))),
        "wan": (wan_pipeline, WAN_RECIPE, mask_of(0, (3, 4, 6))),
    }[family]
    pipe, steps = build(), []
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1.0))
    layers = [d.site.layers(d.model)[-1] for d in denoisers(pipe)]
    layers[0].register_forward_pre_hook(lambda *_: steps.append(1))
    with masked_attention(pipe, None) as replace:
        expected = run(pipe, steps=8, callback_on_step_end=lambda pipe, step, time, tensors: (
            replace(mask) if step == 3 else None) or tensors)  # fmt: skip
    assert 0 < len(steps) < 8, "some steps must come from the cache"
    pipe.enable_visionfuse("gna", **{**recipe, "dense_steps": 4})
    close(run(pipe, steps=8), expected)


def test_resolution_and_batch_change_between_calls():
    pipe = flux_pipeline()
    sizes = [{"height": 32, "width": 48}, {"height": 48, "width": 32}, {"height": 24, "width": 24}]
    expected = []
    for size in sizes:
        with masked_attention(pipe, mask_of(48, (size["height"] // 2, size["width"] // 2))):
            expected.append(run(pipe, **size, prompt=["a", "b"]))
    pipe.enable_visionfuse("gna", **{**FLUX_RECIPE, "order": "auto"})
    for i in (0, 1, 2, 1, 0):
        close(run(pipe, **sizes[i], prompt=["a", "b"]), expected[i])
        close(run(pipe, **sizes[i])[0], run(pipe, **sizes[i], prompt=["a red cube", "b"])[0], 1)


# -- nothing else changes, and everything comes back ------------------------------------------------


def traces(pipe) -> dict:
    """What could remain: attributes of every processor, hooks, submodules, the class, the globals."""
    state = {"vars": sorted(vars(pipe)), "call": type(pipe).__call__}
    for name, module in pipe.components.items():
        if isinstance(module, torch.nn.Module):
            for path, child in module.named_modules():
                state[f"{name}.{path}"] = (
                    id(child), list(child._forward_hooks), list(child._forward_pre_hooks),
                    sorted(vars(child)), id(getattr(child, "processor", None)),
                    dict(vars(child.processor)) if hasattr(child, "processor") else None,
                )  # fmt: skip
    state["backend"] = _AttentionBackendRegistry._active_backend
    state["scheduler"] = sorted(vars(pipe.scheduler))
    return state


@pytest.mark.parametrize("build", [flux_pipeline, wan_pipeline], ids=["flux", "wan"])
def test_disable_restores_everything(build, tmp_path):
    pipe, recipe = build(), FLUX_RECIPE if build is flux_pipeline else WAN_RECIPE
    run(pipe)
    pipe.save_pretrained(tmp_path / "before")
    gc.collect()  # pipelines of other tests
    before, pickled = traces(pipe), pickle.dumps(pipe.transformer)
    pipe.enable_visionfuse("gna", **recipe)
    assert pickle.dumps(pipe.transformer) == pickled  # not even while enabled
    run(pipe)
    pipe.disable_visionfuse()
    pipe.disable_visionfuse()
    assert traces(pipe) == before
    assert pickle.dumps(pipe.transformer) == pickled
    pipe.save_pretrained(tmp_path / "after")
    files = sorted(p.relative_to(tmp_path / "before") for p in (tmp_path / "before").rglob("*.*"))
    assert files
    for file in files:
        assert (tmp_path / "before" / file).read_bytes() == (tmp_path / "after" / file).read_bytes()


def test_only_this_pipeline_and_only_self_attention():
    pipe, other = flux_pipeline(), flux_pipeline()
    shared = FluxImg2ImgPipeline.from_pipe(pipe)
    untouched = [traces(other)] + [
        pickle.dumps(m) for m in (pipe.vae, pipe.text_encoder, pipe.text_encoder_2)
    ]
    stock, stock_shared = run(pipe), run(shared, image=image())

    def look(pipe, step, time, tensors):
        now = [traces(other)] + [
            pickle.dumps(m) for m in (pipe.vae, pipe.text_encoder, pipe.text_encoder_2)
        ]
        for a, b in zip(now, untouched, strict=True):
            assert {**a, "call": 0} == {**b, "call": 0} if isinstance(a, dict) else a == b
        return tensors

    pipe.enable_visionfuse("gna", **FLUX_RECIPE)
    assert not torch.equal(run(pipe, callback_on_step_end=look), stock)
    assert torch.equal(run(other), stock)
    assert torch.equal(run(shared, image=image()), stock_shared)  # shares the transformer
    assert _AttentionBackendRegistry.get_active_backend()[0] == "native"
    other.enable_visionfuse("gna", **FLUX_RECIPE)
    pipe.disable_visionfuse()
    assert torch.equal(run(pipe), stock)
    assert not torch.equal(run(other), stock)
    other = None  # as good as disabling it
    gc.collect()
    assert not hasattr(FluxPipeline.__call__, "_visionfuse")


def test_an_exception_leaves_nothing_behind():
    pipe = flux_pipeline()
    stock = run(pipe)
    pipe.enable_visionfuse("gna", **FLUX_RECIPE)
    before = traces(pipe)

    def fail(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(pipe, callback_on_step_end=fail)
    assert traces(pipe) == before
    assert ACTIVE.variants == ()
    pipe.disable_visionfuse()
    assert torch.equal(run(pipe), stock)


def test_a_pipeline_inside_a_callback():
    """Another call in the middle of one, on the same transformer and with another recipe."""
    pipe = flux_pipeline()
    inner = FluxImg2ImgPipeline.from_pipe(pipe)
    inner.scheduler = copy.deepcopy(pipe.scheduler)
    with masked_attention(pipe, mask_of(48, (16, 24))):
        expected = run(pipe)
    with masked_attention(pipe, mask_of(48, (12, 12))):
        expected_inner = run(inner, image=image(24, 24), height=24, width=24)
    pipe.enable_visionfuse("gna", **FLUX_RECIPE)
    inner.enable_visionfuse("gna", **{**FLUX_RECIPE, "order": "row"})
    results = []

    def nested(p, step, time, tensors):
        results.append(run(inner, image=image(24, 24), height=24, width=24))
        return tensors

    close(run(pipe, callback_on_step_end=nested), expected)
    for result in results:
        close(result, expected_inner)


def test_threads_take_turns():
    pipes = [flux_pipeline(), flux_pipeline()]
    sizes = [{"height": 32, "width": 48}, {"height": 24, "width": 24}]
    expected = []
    for pipe, size in zip(pipes, sizes, strict=True):
        pipe.enable_visionfuse("gna", **FLUX_RECIPE)
        expected.append(run(pipe, **size))
    results = [[], []]

    def work(i):
        for _ in range(4):
            results[i].append(run(pipes[i], **sizes[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, want in zip(results, expected, strict=True):
        assert len(got) == 4
        assert all(torch.equal(g, want) for g in got)


def test_copies_and_pickles_keep_the_recipe():
    pipe = flux_pipeline()
    pipe.enable_visionfuse("gna", **FLUX_RECIPE)
    expected = run(pipe)
    twin, loaded = copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))
    pipe.disable_visionfuse()
    assert torch.equal(run(twin), expected)
    assert torch.equal(run(loaded), expected)
    assert not torch.equal(run(pipe), expected)
    assert torch.equal(twin.transformer.x_embedder.weight, pipe.transformer.x_embedder.weight)

"""CUDA graphs of whole forwards: where they are refused, here; what they compute, on a GPU."""

from __future__ import annotations

import pytest
import torch
from diffusers import FirstBlockCacheConfig

from visionfuse import captured, report
from visionfuse.captured import Captured, refusal
from visionfuse.patching import get
from visionfuse.pipelines.benchmark import random_weights
from visionfuse.sites import denoisers

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GNA = {"density": 0.3, "dense_steps": 4, "min_steps": 0}


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def micro(device: str = "cuda"):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return random_weights("assets/flux-micro", (256, 256), layers=1, device=device, dtype=dtype)


# -- refusals -----------------------------------------------------------------------------------------


def offload(pipe) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    add_hook_to_module(pipe.transformer, ModelHook())


def hook_inside(pipe) -> None:
    pipe.transformer.norm_out.register_forward_hook(lambda *_: None)


def adapter(pipe) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["to_q"])
    pipe.transformer.add_adapter(config)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda pipe: None, "elsewhere"),
        (lambda pipe: pipe.transformer.enable_cache(FirstBlockCacheConfig()), "caches"),
        (offload, "offloading"),
        (hook_inside, "hooks inside"),
        (adapter, "adapter"),
    ],
)
def test_refusals(change, reason):
    pipe, call = micro("cpu")
    expected = call(pipe, 1)
    change(pipe)
    (denoiser,) = denoisers(pipe)
    assert reason in refusal(denoiser.model, denoiser.site.layers(denoiser.model))
    made = Captured(denoiser)
    before = vars(pipe.transformer).copy()
    with made.during_call():
        got = call(pipe, 1)
    assert vars(pipe.transformer).keys() == before.keys()
    assert torch.allclose(got, expected, atol=1e-5)
    assert sum(made.notes.values()) == 1


def test_no_graphs_on_a_cpu():
    pipe, _ = micro("cpu")
    pipe.enable_visionfuse("sage", compile={"backend": "eager"})
    assert get(pipe).compiled["transformer"].captured is None
    pipe.disable_visionfuse()


# -- what a graph computes ----------------------------------------------------------------------------


@pytest.fixture
def eager_to_capture(monkeypatch):
    monkeypatch.setattr(captured, "ISSUING", 0.0)
    monkeypatch.setattr(captured, "FASTER", float("inf"))


def graphs(pipe) -> Captured:
    made = get(pipe).compiled["transformer"].captured
    assert made is not None
    return made


@gpu
@pytest.mark.parametrize("recipe", ["auto", "gna"])
def test_the_same_run(recipe, monkeypatch, eager_to_capture):
    pipe, call = micro()
    options = GNA if recipe == "gna" else {}
    pipe.enable_visionfuse(recipe, **options, compile=True)
    monkeypatch.setattr(captured, "ISSUING", 2.0)
    expected = call(pipe, 10)
    assert not graphs(pipe).graphs
    graphs(pipe).undo()
    monkeypatch.setattr(captured, "ISSUING", 0.0)
    assert torch.equal(call(pipe, 10), expected)
    count = 1 if recipe == "auto" else 2  # one of each phase
    assert len(graphs(pipe).graphs) == count, graphs(pipe).notes
    assert torch.equal(call(pipe, 10), expected)
    assert len(graphs(pipe).graphs) == count
    assert "as a CUDA graph" in str(report(pipe))
    assert "forward" not in vars(pipe.transformer)
    pipe.disable_visionfuse()
    pipe.enable_visionfuse(recipe, **options)
    eager = call(pipe, 10)
    assert float((expected - eager).abs().sum() / eager.abs().sum()) < 0.05


@gpu
def test_weights_that_move_and_change(eager_to_capture):
    pipe, call = micro()
    pipe.enable_visionfuse(compile=True)
    expected = call(pipe, 4)
    pipe.to("cpu")
    keep = torch.empty(1 << 20, device="cuda")  # takes a part of their place
    pipe.to("cuda")
    assert torch.equal(call(pipe, 4), expected)
    with torch.no_grad():  # in place: the graph reads what it finds
        pipe.transformer.proj_out.weight.mul_(2)
    assert not torch.equal(call(pipe, 4), expected)
    assert graphs(pipe).graphs
    del keep


@gpu
def test_every_size_has_its_graph(eager_to_capture):
    pipe, call = micro()
    pipe.enable_visionfuse(compile=True)
    for count, size in enumerate(({}, {"height": 128, "width": 256}), 1):
        call(pipe, 4, **size)
        assert len(graphs(pipe).graphs) == count, graphs(pipe).notes


@gpu
def test_a_forward_that_cannot_be_captured(monkeypatch, eager_to_capture):
    pipe, call = micro()
    pipe.enable_visionfuse(compile=True)
    monkeypatch.setattr(captured, "ISSUING", 2.0)
    expected = call(pipe, 4)
    graphs(pipe).undo()
    monkeypatch.setattr(captured, "ISSUING", 0.0)
    norm = pipe.transformer.norm_out

    class Reads(type(norm)):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            float(out.sum())  # no stream may be waited for in a capture
            return out

    norm.__class__ = Reads
    assert torch.equal(call(pipe, 4), expected)
    assert not graphs(pipe).graphs
    assert any("no CUDA graph" in note for note in graphs(pipe).notes)
    assert len(get(pipe).compiled["transformer"].blocks) > 0
    assert not get(pipe).compiled["transformer"].notes  # blocks were not blamed

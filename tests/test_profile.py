"""visionfuse profile: models of a configuration, a step taken apart, what recipes would save, the command."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from visionfuse.cli import app
from visionfuse.profile import NAMED, named, predict, profile, savings, subject
from visionfuse.profile import measure as parts
from visionfuse.profile.models import INPUTS, Architecture, Subject
from visionfuse.recipes import build
from visionfuse.testing_families import TINY
from visionfuse.testing_pipelines import FLUX_CONFIG, flux_transformer, single_thread, wan_pipeline


@pytest.fixture(autouse=True)
def _one_thread():
    with single_thread():
        yield


def tiny(cls: str, **config) -> Architecture:
    size = (64, 96, 9) if "FluxT" not in cls and "Qwen" not in cls else (64, 96)
    return Architecture(name="tiny", cls=cls, config=config, size=size, text=16)


FLUX = tiny("FluxTransformer2DModel", **FLUX_CONFIG, in_channels=4)


def on_cpu(architecture: Architecture, **options) -> Subject:
    return subject(architecture, device="cpu", dtype=torch.float32, **options)


def test_a_subject_has_the_whole_depth_and_the_layers_asked_for():
    made = on_cpu(FLUX, layers=1)
    assert made.depth == {"FluxTransformerBlock": 2, "FluxSingleTransformerBlock": 2}
    assert len(made.model.transformer_blocks) == len(made.model.single_transformer_blocks) == 1
    assert [s.shape for s in made.layout.segments] == [(16,), (4, 6)]
    assert made.step().sample.shape == (1, 24, 4)
    assert not any(p.is_meta or p.requires_grad for p in made.model.parameters())


@pytest.mark.parametrize("name", ["hunyuan_video", "qwen_image"])
def test_inputs_of_other_families(name):
    model = TINY[name]().pipe.transformer
    made = on_cpu(tiny(type(model).__name__, **model.config))
    assert made.step().sample.isfinite().all()
    assert made.layout.length > 16


def test_inputs_of_wan_and_what_stays_in_float32():
    config = dict(wan_pipeline().transformer.config)
    made = subject(tiny("WanTransformer3DModel", **config), device="cpu", dtype=torch.bfloat16)
    assert made.layout.segments[0].shape == (3, 4, 6)
    dtypes = {name: p.dtype for name, p in made.model.named_parameters()}
    assert dtypes["blocks.0.scale_shift_table"] == dtypes["blocks.0.norm2.weight"] == torch.float32
    assert dtypes["blocks.0.attn1.to_q.weight"] == torch.bfloat16
    assert (
        made.model.rope.freqs_cos.isfinite().all()
    )  # buffers are real, not memory that happened to be there


def test_two_subjects_are_the_same():
    a, b = on_cpu(FLUX), on_cpu(FLUX)
    assert torch.equal(a.step().sample, b.step().sample)


def test_names():
    assert set(INPUTS) >= {a.cls for a in NAMED.values()}
    assert named("FLUX.1-dev").cls == "FluxTransformer2DModel"
    micro = named("assets/flux-micro")
    assert micro.scale == 4
    assert named("vit_tiny_patch16_224").size == (224, 224)
    with pytest.raises(ValueError, match=r"flux\.1-dev, wan2"):
        named("flux-9")


def test_a_size_that_does_not_fit():
    with pytest.raises(ValueError, match="a size of 2 numbers such as 64x96"):
        on_cpu(FLUX, size=(64, 96, 9))


def test_parts_add_up_and_layers_count():
    made = on_cpu(FLUX, layers=1)
    found = profile(made, seconds=0.0)
    assert set(found.parts) == set(parts.PARTS)
    assert sum(found.parts.values()) == pytest.approx(found.ms)
    assert all(ms > 0 for ms in found.parts.values())
    assert found.ms > 1.2 * found.measured_ms  # the blocks that were left out
    # One attention for every block of the whole model, and all hooks are gone.
    assert found.kernels["attention"] >= 4
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in made.model.modules())


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q, self.norm = nn.Linear(8, 8), nn.RMSNorm(8)

    def forward(self, x):
        q = self.norm(self.to_q(x)) * 2.0  # a rotary embedding, say
        return nn.functional.scaled_dot_product_attention(q, q, q)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.act = Attention(), nn.GELU()

    def forward(self, x):
        return x + self.act(self.attn(x))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block()])

    def forward(self, x):
        return self.blocks[0](x).exp()


def test_every_operation_finds_its_part():
    model, seen = Model(), {}
    with parts._scopes(model), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as made:  # fmt: skip
        model(torch.randn(1, 4, 8))
    for event in made.events():
        seen.setdefault(event.name, set()).add(parts._place(event))
    block = "Block"
    assert seen["aten::addmm"] == {("linears", block)}
    assert {place[0] for name, places in seen.items() if "scaled_dot" in name for place in places} == {"attention"}  # fmt: skip
    assert seen["aten::gelu"] == {("rest", block)}
    assert seen["aten::rsqrt"] == {("norm, RoPE, modulation", block)}
    assert seen["aten::exp"] == {("rest", "")}
    assert ("norm, RoPE, modulation", block) in seen["aten::mul"]
    assert seen["aten::add"] >= {("norm, RoPE, modulation", block)}  # the residual


def test_predictions_follow_the_parts():
    """At a size where the simulator knows its GPU; the step itself is made up."""
    made = on_cpu(FLUX)
    from visionfuse import TokenLayout

    layout = TokenLayout.joint(text=512, grids=[(128, 128)])
    large = Subject(**{**vars(made), "layout": layout, "heads": 24, "head_dim": 128})
    times = {"attention": 500.0, "linears": 300.0, "norm, RoPE, modulation": 150.0, "rest": 50.0}
    found = parts.Profile(
        name="x", size=(2048, 2048), ms=1000.0, measured_ms=1000.0, parts=times,
        kernels=dict.fromkeys(times, 1), peak_gib=None,
    )  # fmt: skip
    left = {s.way.name: s for s in savings(large, found)}
    assert left["compile"].parts["linears"] == 300.0
    assert left["compile"].predicted_ms < 1000.0
    assert left["fp8 linears + compile"].parts["linears"] == pytest.approx(
        300 * predict.FP8_LINEARS
    )
    assert 250 < left["auto"].parts["attention"] < 500  # faster, and exact
    assert left["sage"].parts["attention"] < left["auto"].parts["attention"]
    assert left["gna, density 0.3"].parts["attention"] < 0.5 * left["auto"].parts["attention"]
    best = min(left.values(), key=lambda s: s.predicted_ms)
    assert best.way.name == "gna fp8 + compile + fp8 linears"
    few = Subject(**{**vars(made), "heads": 24, "head_dim": 128})
    assert predict.attention_ratio(few, build("sage")) == 1.0  # too few tokens for a prediction


def test_measured_recipes_leave_the_model_as_it_was():
    made = on_cpu(FLUX)
    before, classes = made.step().sample, [type(m) for m in made.model.modules()]
    found = profile(made, seconds=0.0)
    ways = tuple(w for w in predict.WAYS if w.name in ("sage", "gna, density 0.3"))
    wrong = predict.Way(name="wrong", recipe="gna", options={"window": (3, 3, 3)})
    with pytest.warns(UserWarning, match="wrong did not run"):
        saved = savings(made, found, ways=(*ways, wrong), measure=True)
    assert [s.measured_ms is not None for s in saved] == [True, True, False]
    assert "window=(3, 3, 3)" in saved[-1].reason
    assert torch.equal(made.step().sample, before)
    assert [type(m) for m in made.model.modules()] == classes


def test_the_command(tmp_path):
    folder = tmp_path / "pipeline" / "transformer"
    folder.mkdir(parents=True)
    config = dict(flux_transformer().config)
    (folder / "config.json").write_text(
        json.dumps({**config, "_class_name": "FluxTransformer2DModel"})
    )
    out = [str(tmp_path / name) for name in ("plot.png", "rows.csv")]
    command = [
        "profile",
        str(folder.parent),
        "--size",
        "64x96",
        "--device",
        "cpu",
        "--dtype",
        "float32",
    ]
    done = CliRunner().invoke(app, [*command, "--plot", out[0], "--csv", out[1]])
    assert done.exit_code == 0, done.output
    assert "norm, RoPE, modulation" in done.output
    with open(out[1], newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["case"] for row in rows} == {"pipeline 64x96"}
    ms = {row["impl"]: float(row["ms"]) for row in rows}
    assert sum(ms[f"part: {part}"] for part in parts.PARTS) == pytest.approx(ms["step"], rel=1e-2)
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_the_command_refuses_clearly():
    done = CliRunner().invoke(app, ["profile", "nothing-like-it"])
    assert done.exit_code == 2
    assert "Unknown model" in done.output


def test_a_model_of_timm():
    made = subject(named("vit_tiny_patch16_224"), device="cpu", dtype=torch.float32)
    assert made.layout.segments[-1].shape == (14, 14)
    assert (made.heads, made.head_dim) == (3, 64)
    found = profile(made, seconds=0.0)
    assert found.parts["linears"] > found.parts["norm, RoPE, modulation"] > 0

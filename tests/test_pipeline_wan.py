"""pipelines/wan.py: videos from tiny pipelines, and the benchmark at a size for a CPU."""

from __future__ import annotations

import csv
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
import typer
from diffusers import WanImageToVideoPipeline
from diffusers.pipelines.wan import pipeline_wan_i2v
from PIL import Image
from typer.testing import CliRunner

from visionfuse.pipelines import wan, wan_benchmark, wan_micro
from visionfuse.recipes import build
from visionfuse.testing_pipelines import single_thread, wan_pipeline

app = typer.Typer()
app.command()(wan.wan)
SIZE = ["--height", "64", "--width", "96", "--frames", "9", "--max-sequence-length", "16"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("wan") / "tiny"
    wan_pipeline().save_pretrained(path)
    return str(path)


def run(*arguments):
    with single_thread():
        result = CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "200"})
    return result.exit_code, result.output


def test_a_video_is_the_frames_that_the_pipeline_makes(folder, tmp_path):
    """And follows seed and recipe."""
    out = tmp_path / "clip.mp4"
    options = [
        "--recipe",
        "fps",
        "-o",
        "min_steps=0",
        "-o",
        "tile=2x2x2",
        "--steps",
        2,
        "--seed",
        3,
    ]
    code, said = run(folder, "a red cube", *SIZE, *options, "--output", out, "--fps", 8)
    assert code == 0, said
    assert "steps 0" in said or "step 0" in said
    reader = cv2.VideoCapture(str(out))
    assert reader.get(cv2.CAP_PROP_FRAME_COUNT) == 9
    assert reader.get(cv2.CAP_PROP_FPS) == 8

    def request(**changes):
        values = {
            "model": folder, "prompt": "a red cube", "height": 64, "width": 96, "frames": 9, "steps": 2,
            "max_sequence_length": 16, "seed": 3, "options": {"min_steps": 0, "tile": (2, 2, 2)},
        }  # fmt: skip
        return wan.Request(**values | changes)

    pipe = wan.load(request(), dtype="float32", device="cpu", offload=False)
    with single_thread():
        frames = {name: np.asarray(wan.generate(pipe, asked)) for name, asked in (
            ("fps", request()), ("again", request()), ("seed", request(seed=4)),
            ("stock", request(recipe="auto", options={})))}  # fmt: skip
    assert frames["fps"].shape == (9, 64, 96, 3)
    assert np.array_equal(frames["fps"], frames["again"])
    assert not np.array_equal(frames["fps"], frames["seed"])
    assert not np.array_equal(frames["fps"], frames["stock"])
    _, first = reader.read()
    difference = first[..., ::-1] / 255 - frames["fps"][0]
    assert np.abs(difference).mean() < 0.1  # H.264 is lossy


def test_the_model_alone_beside_the_recipe(folder, tmp_path):
    assert wan.films(folder)
    out = tmp_path / "both.mp4"
    code, said = run(folder, "a red cube", *SIZE, "--recipe", "auto", "--steps", 2, "--compare", "--output", out)  # fmt: skip
    assert code == 0, said
    assert "Left: the model alone" in said
    reader = cv2.VideoCapture(str(out))
    going, frame = reader.read()
    assert going
    assert frame.shape == (64, 192, 3)
    left, right = np.split(frame.astype(np.float32), 2, axis=1)
    assert np.abs(left - right).mean() < 3  # "auto" is exact; H.264 is lossy


def test_a_dry_run_reads_no_weights(folder, monkeypatch):
    monkeypatch.setattr(wan.DiffusionPipeline, "from_pretrained", None)
    code, said = run(folder, *SIZE, "--recipe", "fps", "--steps", 10, "--dry-run")
    assert code == 0, said
    assert "3x4x6 = 72" in said
    assert "steps 0-2 coarse" in said
    assert "fp8_tile" in said


def test_tokens_are_those_of_the_model(tmp_path):
    """One of wan-micro's is 8x8 pixels of four frames."""
    wan_micro.save(wan_micro.build(width=64, layers=1, vae_width=8), tmp_path)
    _, layout = wan.expect(
        wan.Request(model=str(tmp_path), prompt="", height=128, width=96, frames=17)
    )
    assert [segment.shape for segment in layout.segments] == [(5, 16, 12)]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--frames", "10"], "one more than a multiple of 4"),
        (["--height", "60"], "no multiple of 16"),
        (["--frames", "129"], "positions for 32 on an axis"),
        (["--recipe", "fbs"], "Did you mean 'fps'"),
        (["-o", "alpha3=0.5"], "no option 'alpha3'"),
        (["-o", "alpha1=0.9", "-o", "alpha2=0.1"], "alpha1 <= alpha2"),
        (["--image", "street.png"], "takes no --image"),
        (["--output", "clip.gif"], ".mp4"),
        ([*SIZE, "--dtype", "float8"], "Unknown dtype"),
    ],
)
def test_mistakes_are_told_before_anything_runs(folder, arguments, reason, monkeypatch):
    monkeypatch.setattr(wan.DiffusionPipeline, "from_pretrained", None)
    code, said = run(folder, *arguments)
    assert code == 2, said
    assert reason in " ".join(said.split())


def test_image_to_video(tmp_path, monkeypatch):
    parts = wan_pipeline(in_channels=36).components
    folder = str(tmp_path / "i2v")
    WanImageToVideoPipeline(**parts, image_encoder=None, image_processor=None).save_pretrained(
        folder
    )
    code, said = run(folder, *SIZE, "--dry-run")
    assert code == 2
    assert "needs --image" in " ".join(said.split())
    picture, out = tmp_path / "first.png", tmp_path / "clip.mp4"
    Image.fromarray(np.full((64, 96, 3), 120, np.uint8)).save(picture)
    call = [folder, *SIZE, "--image", picture, "--steps", 1, "--output", out, "-o", "min_steps=0"]
    if not wan.is_ftfy_available():
        code, said = run(*call)
        assert code == 2
        assert "pip install ftfy" in " ".join(said.split())
        monkeypatch.setattr(wan, "is_ftfy_available", lambda: True)
        as_it_is = SimpleNamespace(fix_text=lambda text: text)
        monkeypatch.setattr(pipeline_wan_i2v, "ftfy", as_it_is, raising=False)
    code, said = run(*call)
    assert code == 0, said
    assert cv2.VideoCapture(str(out)).get(cv2.CAP_PROP_FRAME_COUNT) == 9


def test_the_benchmark_on_a_cpu(tmp_path):
    path = tmp_path / "wan.csv"
    code, said = run("--benchmark", "--size", "32x64", "--frames", 5, "--layers", 1, "--dtype", "float32",
                     "--recipes", "fps tile=1x2x2,sage", "--csv", path, "--commit", "abc")  # fmt: skip
    assert code == 0, said
    rows = list(csv.DictReader(path.open()))
    steps = {row["recipe"]: row for row in rows if row["case"].endswith("a step")}
    calls = {row["recipe"]: row for row in rows if "attention" in row["case"]}
    phases = ["fps tile=1x2x2 coarse", "fps tile=1x2x2 fine", "fps tile=1x2x2 medium"]
    assert list(steps) == ["stock", *phases, "fps tile=1x2x2, mean of 50 steps", "sage", "sage, mean of 50 steps"]  # fmt: skip
    ms = [float(steps[name]["ms"]) for name in phases]
    mean = float(steps["fps tile=1x2x2, mean of 50 steps"]["ms"])
    assert mean == pytest.approx(0.3 * ms[0] + 0.3 * ms[1] + 0.4 * ms[2], rel=1e-3)
    errors = [float(steps[name]["rel_l1"]) for name in (*phases, "sage")]
    assert all(0 < error < 0.5 for error in errors)
    assert min(errors) == errors[-1]  # which leaves no pair out
    assert set(calls) == {"", *(f"{name}, all in{how}" for name in (*phases, "sage") for how in ("", ", with order"))}  # fmt: skip
    for name in phases:  # of the kernel with its rounding, against the rule in float64
        assert 0.01 < float(calls[f"{name}, all in"]["rel_l1"]) < 0.1
    assert {row["commit"] for row in rows} == {"abc"}
    code, said = run("--benchmark", "--size", "32x64", "--frames", 5, "--layers", 1, "--parts", "step",
                     "--recipes", "sage", "--csv", tmp_path / "new.csv", "--base", path)  # fmt: skip
    assert code == 0, said
    assert "now / before" in said
    code, said = run("--benchmark", "--size", "32x64", "--base", path)
    assert code == 2
    assert "name both" in said


def test_parts_of_a_recipe():
    parts, stock = wan_benchmark.parts_of(build("gna", density=0.5, dense_steps=10))
    assert stock == 0.2
    assert [(part.name, part.share) for part in parts] == [("gna", 0.8)]
    parts, stock = wan_benchmark.parts_of(build("fps", dense_start=0.1))
    assert [part.share for part in parts] == pytest.approx([0.2, 0.3, 0.4])
    assert stock == 0.1
    assert all(part.recipe.schedule.first_step(1) == 0 for part in parts)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model": "flux.1-dev"}, "no Wan model"),
        ({"frames": 6}, "one more than a multiple of 4"),
        ({"size": (40, 64)}, "multiples of 16"),
        ({"parts": ("steps",)}, "Unknown part"),
    ],
)
def test_tasks_are_checked(options, reason):
    values = {"model": "wan2.1-1.3b", "size": (32, 64), "recipes": (), "device": torch.device("cpu"), "dtype": torch.float32}  # fmt: skip
    with pytest.raises(ValueError, match=reason):
        wan_benchmark.Task(**values | options)


def test_a_gpu_size_is_refused_on_a_cpu():
    if torch.cuda.is_available():
        pytest.skip("it would run here")
    code, said = run("--benchmark", "--size", "720p")
    assert code == 2
    assert "takes hours on a CPU" in " ".join(said.split())
    code, said = run("--benchmark", "--size", "720")
    assert code == 2
    assert "height and width" in " ".join(said.split())

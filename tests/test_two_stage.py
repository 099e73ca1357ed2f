"""Large images in two stages, with a tiny model on a CPU: sizes, pictures on the way, and what stays as it was."""

import json

import cv2
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxImg2ImgPipeline
from PIL import Image
from typer.testing import CliRunner

import visionfuse
from visionfuse.cli import app
from visionfuse.pipelines import flux
from visionfuse.scale_dit import TwoStage, rounded, two_stages, unit_of
from visionfuse.scale_dit.two_stage import decode, encode, enlarge
from visionfuse.testing_pipelines import flux_pipeline

FEW = TwoStage(steps=4, fine_steps=2)


def draw(pipe, *, height=64, width=96, stages=FEW, seed=0, **arguments):
    generator = torch.Generator().manual_seed(seed)
    return two_stages(pipe, "words", height=height, width=width, stages=stages, generator=generator,
                      max_sequence_length=16, **arguments)  # fmt: skip


def quiet_pipe():
    pipe = flux_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_two_stages_and_the_pictures_on_the_way():
    pipe = quiet_pipe()
    scheduler, before = pipe.scheduler, dict(vars(pipe.transformer))
    result = draw(pipe)
    assert result.images[0].size == (96, 64)
    assert result.small[0].size == (24, 16)
    assert result.enlarged[0].size == (96, 64)
    said = result.report.denoisers[0]
    assert said.calls == {"plan": 2, "dense": 0}
    assert [segment.kind for segment in said.layout.segments] == ["text", "grid", "guidance"]
    assert pipe.scheduler is scheduler
    assert (
        vars(pipe.transformer).keys() - {"_diffusers_hook"} == before.keys()
    )  # that of its cache contexts
    assert visionfuse.report(pipe).recipe is None


def test_progress_bars_of_both_stages(capfd):
    pipe = flux_pipeline()
    pipe.set_progress_bar_config(disable=False)
    draw(pipe)
    said = capfd.readouterr().err
    assert "24x16: 100%" in said
    assert "96x64: 100%" in said


def test_a_seed_gives_one_image():
    pipe = quiet_pipe()
    first, again, other = (np.asarray(draw(pipe, seed=s).images[0]) for s in (0, 0, 1))
    assert (first == again).all()
    assert (first != other).any()


@pytest.mark.parametrize(
    "changes",
    [{"guided": False}, {"low_band": 0.0}, {"cached": True}, {"ntk": 1.0}, {"sharpen": 0.0}, {"tiling": True},
     {"shift": 3.0}, {"scale": 2}, {"fine_steps": 4}],
    ids=str,
)  # fmt: skip
def test_every_option_does_something(changes):
    """But for kept keys and values, which change nothing that one can see, and tiles of a VAE as large as one."""
    pipe = quiet_pipe()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    plain = np.asarray(draw(pipe).images[0]).astype(int)
    stages = TwoStage(**{"steps": 4, "fine_steps": 2, **changes})
    other = np.asarray(draw(pipe, stages=stages).images[0]).astype(int)
    if "cached" in changes:
        assert abs(plain - other).max() <= 1
    else:
        assert "tiling" in changes or (plain != other).any()
    assert pipe.vae.use_tiling is False


def test_the_recipe_of_the_pipeline_is_taken():
    pipe = quiet_pipe()
    pipe.enable_visionfuse("scale_dit", rule="released", window=8)
    draw(pipe)
    said = visionfuse.report(pipe).denoisers[0]
    assert said.order.tile == (8, 8)
    assert said.calls["plan"] == 2
    assert "guidance" in str(visionfuse.report(pipe))


def test_batches():
    generators = [torch.Generator().manual_seed(s) for s in (0, 1)]
    result = two_stages(quiet_pipe(), ["words", "more words"], height=64, width=64, stages=FEW,
                        generator=generators, max_sequence_length=16)  # fmt: skip
    assert len(result.images) == len(result.small) == 2


def test_offloaded_models():
    """Each is fetched when it is called, the VAE too, which is called outside of a pipeline: the same image."""
    pipe = quiet_pipe()
    plain = draw(pipe).images[0]
    pipe.enable_model_cpu_offload(device="cpu")
    assert (np.asarray(draw(pipe).images[0]) == np.asarray(plain)).all()
    assert hasattr(pipe.transformer, "_hf_hook")


def test_odd_sizes_and_ratios():
    result = draw(quiet_pipe(), height=72, width=104)  # grids of 36x52 and 9x13
    assert result.images[0].size == (104, 72)
    assert result.report.denoisers[0].layout.segments[-1].shape == (9, 13)


def test_sizes():
    pipe = quiet_pipe()
    assert unit_of(pipe, 4) == 8
    assert rounded(3000, 2000, 64) == (3008, 1984)
    assert rounded(4096, 2304, 64) == (4096, 2304)
    assert rounded(10, 10, 64) == (64, 64)
    with pytest.raises(ValueError, match="multiples of 8, got 60x96; 64x96 is near"):
        draw(pipe, height=60)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"fine_steps": 40}, "1 to 28"),
        ({"scale": 1}, "at least 2"),
        ({"low_band": 2.0}, "low_band"),
        ({"lora": "none"}, "everywhere"),
    ],
)
def test_bad_stages_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        TwoStage(**bad)


def test_fine_steps_follow_the_steps():
    assert TwoStage().fine == 18
    assert TwoStage(steps=14).fine == 9
    assert TwoStage(steps=1).fine == 1


def test_enlarging_sharpens_as_the_public_code_does():
    """2 * image - blur, which leaves flat areas alone."""
    pixels = np.full((8, 8, 3), 100, np.uint8)
    pixels[:, 4:] = 200
    large = np.asarray(enlarge(Image.fromarray(pixels), 4, 1.0)).astype(int)
    soft = cv2.resize(pixels, None, fx=4, fy=4, interpolation=cv2.INTER_CUBIC)
    expected = np.clip(2.0 * soft - cv2.GaussianBlur(soft, (3, 3), 0), 0, 255)
    assert abs(large - expected).max() <= 1
    assert (large[:, :8] == 100).all()
    assert np.diff(large[16, :, 0]).max() > np.diff(soft[16, :, 0].astype(int)).max()


@torch.no_grad()
def test_latents_come_back():
    pipe = quiet_pipe()
    latents = torch.randn(1, 1, 32, 48, generator=torch.Generator().manual_seed(0))
    packed = pipe._pack_latents(latents, *latents.shape)
    images = decode(pipe, packed, 32, 48)
    assert images[0].size == (48, 32)
    assert encode(pipe, images).shape == latents.shape


def test_a_users_own_second_stage():
    """enable_visionfuse alone: local attention without guidance."""
    pipe = flux_pipeline(FluxImg2ImgPipeline)
    pipe.set_progress_bar_config(disable=True)
    pipe.enable_visionfuse("scale_dit", window=8)
    pipe("words", image=Image.new("RGB", (96, 64), "red"), height=64, width=96, strength=0.5,
         num_inference_steps=4, max_sequence_length=16, generator=torch.Generator().manual_seed(0))  # fmt: skip
    said = visionfuse.report(pipe).denoisers[0]
    assert said.calls == {"plan": 2, "dense": 0}
    assert 0 < (said.visited_density or 0) < 0.9


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    quiet_pipe().save_pretrained(path)
    return path


def test_the_command_line(folder, tmp_path):
    out = tmp_path / "large.png"
    done = CliRunner().invoke(app, [
        "generate", str(folder), "words", "--recipe", "scale_dit", "--height", "60", "--width", "100",
        "--steps", "3", "--max-sequence-length", "16", "--dtype", "float32", "--device", "cpu", "--out", str(out),
        "-o", "window=8", "-o", "fine_steps=2", "-o", "low_band=1.0",
    ])  # fmt: skip
    assert done.exit_code == 0, done.output
    assert Image.open(out).size == (96, 64)  # the nearest
    assert "guidance 8x12" in " ".join(done.output.split())


def test_what_would_run(folder):
    done = CliRunner().invoke(app, [
        "generate", str(folder), "words", "--recipe", "scale_dit", "--height", "128", "--width", "128", "--dry-run",
        "--max-sequence-length", "16",
    ])  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "64x64 image" in " ".join(done.output.split())
    wrong = CliRunner().invoke(
        app, ["generate", str(folder), "--recipe", "scale_dit", "-o", "rules=released"]
    )
    assert wrong.exit_code == 2
    assert "Did you mean 'rule'" in " ".join(wrong.output.split())


def test_beside_direct_drawing(folder, tmp_path):
    request = flux.Request(
        model=str(folder), prompt="words", recipe="scale_dit", options={"window": 8}, height=64, width=64,
        steps=2, max_sequence_length=16, dtype="float32", device="cpu",
    )  # fmt: skip
    flux.expect(request)
    result = flux.compare(flux.load(request), request)
    assert result.stock.size == result.fused.size == (64, 64)
    figures = json.loads(flux.save(result, tmp_path / "both.png").read_text())
    assert figures["recipe"] == "scale_dit"

"""Large images in two stages, with a tiny model on a CPU: sizes, pictures on the way, and what stays as it was."""

import json
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import FlowMatchEulerDiscreteScheduler, FluxImg2ImgPipeline
from PIL import Image
from typer.testing import CliRunner

import visionfuse
from visionfuse.cli import app
from visionfuse.pipelines import flux
from visionfuse.scale_dit import TwoStage, rounded, two_stage, two_stages, unit_of
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


def test_large_images_are_decoded_in_tiles(monkeypatch):
    """From some size on by itself: the image that `tiling=True` gives, which differs at the seams of the tiles."""
    pipe = quiet_pipe()
    pipe.vae.tile_sample_min_size = pipe.vae.tile_latent_min_size = 32
    images = {}
    for tiling in (True, False):
        images[tiling] = np.asarray(draw(pipe, stages=replace(FEW, tiling=tiling)).images[0])
    assert (images[True] != images[False]).any()
    assert (np.asarray(draw(pipe).images[0]) == images[False]).all()
    monkeypatch.setattr(two_stage, "TILED_ABOVE", 64 * 96 - 1)
    assert (np.asarray(draw(pipe).images[0]) == images[True]).all()
    assert pipe.vae.use_tiling is False


def test_the_recipe_of_the_pipeline_is_taken():
    pipe = quiet_pipe()
    pipe.enable_visionfuse("scale_dit", guidance="linear", window=8)
    draw(pipe)
    columns = visionfuse.report(pipe)
    assert columns.recipe.plan.guidance == "linear"
    assert columns.denoisers[0].order.tile == (32, 4)
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


def by_model(pipe):
    pipe.enable_model_cpu_offload(device="cpu")


def by_layer(pipe):
    """As pipe.enable_sequential_cpu_offload, which names the device cpu:0, for accelerate another than cpu: it raises
    TypeError in every pipeline."""
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            cpu_offload(part, "cpu", offload_buffers=len(part._parameters) > 0)


@pytest.mark.parametrize("recipe", [{}, {"rule": "released"}], ids=str)
@pytest.mark.parametrize("offload", [by_model, by_layer])
def test_offloaded_models(offload, recipe):
    """Weights are fetched when they are used, those of the VAE too, which is called outside of a pipeline: the same
    image, with pictures on the way, which the VAE makes in between."""
    pipe = quiet_pipe()
    pipe.enable_visionfuse("scale_dit", window=8, **recipe)
    plain = draw(pipe).images[0]
    offload(pipe)
    seen = []
    stages = replace(FEW, preview_every=1)
    result = draw(pipe, stages=stages, watch=lambda name, images: seen.append(name))
    assert (np.asarray(result.images[0]) == np.asarray(plain)).all()
    assert seen == ["small", "enlarged", "step 1"]
    assert hasattr(pipe.transformer, "_hf_hook")


def test_previews_lead_to_the_image():
    pipe, seen = quiet_pipe(), {}
    stages = TwoStage(steps=6, fine_steps=6, preview_every=2)
    result = draw(pipe, stages=stages, watch=lambda name, images: seen.update({name: images}))
    assert list(seen) == ["small", "enlarged", "step 2", "step 4"]
    assert seen["small"] is result.small
    assert seen["enlarged"] is result.enlarged
    final = np.asarray(result.images[0]).astype(float)
    off = [abs(np.asarray(seen[f"step {n}"][0]) - final).mean() for n in (2, 4)]
    assert seen["step 2"][0].size == (96, 64)
    assert off[1] < off[0]


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
        ({"preview_every": 0}, "preview_every"),
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
    out, on_the_way = tmp_path / "large.png", tmp_path / "on" / "the way"
    done = CliRunner().invoke(app, [
        "generate", str(folder), "words", "--recipe", "scale_dit", "--height", "60", "--width", "100",
        "--steps", "3", "--max-sequence-length", "16", "--dtype", "float32", "--device", "cpu", "--out", str(out),
        "-o", "window=8", "-o", "fine_steps=2", "-o", "low_band=1.0", "--intermediates", str(on_the_way),
        "-o", "preview_every=1",
    ])  # fmt: skip
    assert done.exit_code == 0, done.output
    assert Image.open(out).size == (96, 64)  # the nearest
    sizes = {path.name: Image.open(path).size for path in on_the_way.iterdir()}
    assert sizes == {"small.png": (24, 16), "enlarged.png": (96, 64), "step_01.png": (96, 64)}
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


def test_other_recipes_have_no_intermediates(folder, tmp_path):
    done = CliRunner().invoke(
        app, ["generate", str(folder), "--recipe", "sage", "--intermediates", str(tmp_path)]
    )
    assert done.exit_code == 2
    assert "two stages" in " ".join(done.output.split())


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

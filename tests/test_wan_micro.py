"""The video model that ships with the project: loads in stock diffusers, small, and films what it is told."""

from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline

import visionfuse
from visionfuse.pipelines.compare import psnr
from visionfuse.pipelines.train_wan_micro import GUIDANCE, draw_videos
from visionfuse.recipe import Recipe
from visionfuse.shapes.video import held_out_clips
from visionfuse.shapes.video_fidelity import score_clips

FOLDER = Path(__file__).resolve().parents[1] / "assets" / "wan-micro"
TUNED = FOLDER.with_name("wan-micro-fps")
LARGER = FOLDER.with_name("wan-micro-256")
LARGER_TUNED = FOLDER.with_name("wan-micro-256-fps")
CAPTION = "a green triangle moves left while a red circle stays still on a white background"


@pytest.fixture(scope="module")
def pipe():
    pipe = WanPipeline.from_pretrained(FOLDER, dtype=torch.float32, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def film(pipe, captions, steps):
    return draw_videos(pipe, captions, side=128, steps=steps, guidance=GUIDANCE, seed=0)


@pytest.mark.parametrize(
    "folder", [FOLDER, TUNED, LARGER, LARGER_TUNED], ids=lambda folder: folder.name
)
def test_folder_is_small_and_names_no_machine(folder):
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    assert 16e6 < sum(path.stat().st_size for path in files) <= 25e6
    assert not any("_name_or_path" in path.read_text() for path in folder.rglob("config.json"))


def test_one_token_is_eight_pixels_and_four_frames(pipe):
    assert (pipe.vae_scale_factor_spatial, pipe.vae_scale_factor_temporal) == (8, 4)
    assert list(pipe.transformer.config.patch_size) == [1, 1, 1]
    assert 7e6 < sum(p.numel() for p in pipe.transformer.parameters()) < 9e6


def test_films_what_a_caption_says(pipe):
    videos = film(pipe, [CAPTION], 10)
    assert videos.shape == (1, 17, 128, 128, 3)
    (verdict,) = score_clips(videos, [CAPTION])
    assert verdict.right, verdict
    still = score_clips(videos[:, :1].repeat(17, axis=1), [CAPTION])[0]
    assert still.reason == "motion"


def test_the_shipped_recipe_follows_its_three_phases(pipe):
    recipe = Recipe.load(FOLDER / "recipes" / "fps.json")
    spans = recipe.schedule.spans(20)
    assert [(span.start, span.end) for span in spans] == [(0, 6), (6, 14), (14, 20)]
    formats = {variant.name: str(variant.precision) for variant in recipe.variants}
    for span, own in zip(spans, ("fp8_tile", "fp8", "fp8+q_warp"), strict=True):
        assert {formats[name] for name in span.names} == {own}
        assert len(span.names) == 8  # windows for every layer
    pipe.enable_visionfuse(recipe)
    try:
        film(pipe, [CAPTION], 3)
        (said,) = visionfuse.report(pipe).denoisers
    finally:
        pipe.disable_visionfuse()
    assert said.calls["dense"] == 0
    assert said.gain is not None
    assert 4.5 < said.gain < 6  # at 20 steps 80% of the pairs are left out


def test_the_tuned_transformer_stands_in_the_same_pipeline(pipe):
    tuned = WanPipeline.from_pretrained(TUNED, dtype=torch.float32, use_safetensors=True)
    for part, other in (("vae", pipe.vae), ("text_encoder", pipe.text_encoder)):
        theirs = other.state_dict()
        assert all(torch.equal(p, theirs[n]) for n, p in getattr(tuned, part).state_dict().items())
    mine, theirs = tuned.transformer.state_dict(), pipe.transformer.state_dict()
    assert mine.keys() == theirs.keys()
    assert not any(torch.equal(p, theirs[n]) for n, p in mine.items() if p.ndim == 2)


@pytest.mark.slow
def test_the_tuned_transformer_films_under_the_recipe(pipe):
    tuned = WanPipeline.from_pretrained(TUNED, dtype=torch.float32, use_safetensors=True)
    stock, near = film(pipe, [CAPTION], 12), []
    for one in (pipe, tuned):
        one.enable_visionfuse(Recipe.load(FOLDER / "recipes" / "fps.json"))
        try:
            videos = film(one, [CAPTION], 12)
        finally:
            one.disable_visionfuse()
        near.append(psnr(videos[0], stock[0]))
    assert score_clips(videos, [CAPTION])[0].right
    assert near[1] > near[0] + 3, near


@pytest.mark.slow
@pytest.mark.parametrize("folder", [LARGER, LARGER_TUNED], ids=lambda folder: folder.name)
def test_the_larger_size_films_what_a_caption_says(folder):
    larger = WanPipeline.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    larger.set_progress_bar_config(disable=True)
    assert larger.scheduler.config.flow_shift == 10
    if folder == LARGER_TUNED:
        larger.enable_visionfuse(Recipe.load(LARGER / "recipes" / "fps.json"))
    videos = draw_videos(larger, [CAPTION], side=256, steps=10, guidance=GUIDANCE, seed=0)
    assert score_clips(videos, [CAPTION])[0].right


@pytest.mark.slow
def test_most_held_out_captions_are_right(pipe):
    clips = held_out_clips(16)
    verdicts = score_clips(film(pipe, [clip.text for clip in clips], 20), clips)
    assert sum(verdict.right for verdict in verdicts) >= 12, verdicts

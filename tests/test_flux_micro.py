"""The model that ships with the project: loads in stock diffusers, small, and draws what it can draw."""

from pathlib import Path

import pytest
import torch

from visionfuse.shapes import score
from visionfuse.shapes.captions import parse

FOLDER = Path(__file__).resolve().parents[1] / "assets" / "flux-micro"


@pytest.fixture(scope="module")
def pipe():
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(FOLDER, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, captions, steps=8, **options):
    return pipe(
        captions,
        height=256,
        width=256,
        num_inference_steps=steps,
        max_sequence_length=64,
        generator=torch.Generator().manual_seed(0),
        **options,
    ).images


def test_folder_is_small_and_names_no_machine():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 20e6
    assert not any("_name_or_path" in path.read_text() for path in FOLDER.rglob("config.json"))


def test_one_token_is_eight_pixels(pipe):
    assert pipe.vae_scale_factor == 4
    assert 5e6 < sum(p.numel() for p in pipe.transformer.parameters()) < 7e6


def test_draws_what_captions_say(pipe):
    """One of each kind; no training picture shows a green triangle or a blue ring."""
    captions = [
        "a large red circle above a small blue square on a white background",
        "a green triangle in the top left corner and a yellow square at the bottom on a gray background",
        "three small orange squares on a black background",
        "a large blue ring on a beige background",
        "a cyan circle and a large pink square on a white background",
        "a purple cross in the center on a black background",
    ]
    verdicts = score(draw(pipe, captions), [parse(caption) for caption in captions])
    assert sum(verdict.right for verdict in verdicts) >= 5, verdicts


def test_recipe_with_the_whole_grid_changes_nothing(pipe):
    import visionfuse  # noqa: F401  (adds enable_visionfuse)

    caption = ["a large pink square on a black background"]
    stock = draw(pipe, caption, steps=4, output_type="pt")
    pipe.enable_visionfuse("gna", window=32, stride=1, dense_steps=0)
    same = draw(pipe, caption, steps=4, output_type="pt")
    pipe.enable_visionfuse("gna", window=12, stride=4, dense_steps=1)
    sparse = draw(pipe, caption, steps=4, output_type="pt")
    pipe.disable_visionfuse()
    torch.testing.assert_close(same, stock, atol=1e-4, rtol=0)
    assert 1e-4 < (sparse - stock).abs().mean() < 0.2

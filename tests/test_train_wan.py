"""Training Wan models: times and phases, resuming, recipes in the forward, data, and the parts of wan-micro."""

import csv
import json
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import WanPipeline
from safetensors.torch import load_file

import visionfuse
from visionfuse.pipelines import eval_video, train_wan, wan_micro_vae
from visionfuse.pipelines.muon import muon_and_adamw
from visionfuse.pipelines.train_wan_data import (
    Samples,
    draw_batch,
    embed,
    folder,
    padded,
    shapes,
    training_shapes,
)
from visionfuse.pipelines.train_wan_loop import Settings, Source, train
from visionfuse.pipelines.train_wan_micro import RATE, TIMES, Alignment
from visionfuse.pipelines.train_wan_phases import Phases, Times
from visionfuse.pipelines.train_wan_teacher import load as load_teacher
from visionfuse.pipelines.variants import Variant
from visionfuse.pipelines.wan_micro import build, decode, encode, save
from visionfuse.pipelines.wan_micro_text import answers
from visionfuse.shapes.captions import COLORS, SHAPES
from visionfuse.shapes.video import MOTIONS, held_out_clips, parse_clip
from visionfuse.shapes.video_render import pack_clips, render_clips

FPS = "fps coarse=0.2 fine=0.5 medium=0.3 tile=5x2x2 min_steps=0"
SIDE = 32
TINY = {"warmup": 2, "sampling_steps": 20, "log_steps": 1, "gap_steps": 4}


def tiny() -> WanPipeline:
    torch.manual_seed(0)
    pipe = build(width=64, layers=2, vae_width=8)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def samples() -> Samples:
    return training_shapes(tiny(), 6, side=SIDE, seed=0)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path, pipe = tmp_path_factory.mktemp("wan") / "tiny", tiny()
    for (
        parameter
    ) in pipe.transformer.parameters():  # begins as the identity, which no recipe changes
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    save(pipe, path)
    return path


def optimizers(trainee: torch.nn.Module) -> list[torch.optim.Optimizer]:
    return muon_and_adamw(trainee, RATE)


def run(recipe: str, samples: Samples, out: Path, *, precision: str = "no", align: float = 0.1,
        blocks: float | None = None, resume: bool = False, batch: int = 2, model: Path | None = None,
        peak: float = RATE, **settings):  # fmt: skip
    out.mkdir(exist_ok=True)
    pipe = tiny() if model is None else WanPipeline.from_pretrained(model, dtype=torch.float32)
    Variant.parse(recipe).enable(pipe)
    teacher = None if blocks is None else load_teacher(str(model), pipe.transformer, blocks=blocks)
    alignment = Alignment(pipe.transformer) if align else None
    log = train(
        pipe, [Source(samples, batch, TIMES[128])], samples, Settings(align=align, **TINY | settings), out,
        Accelerator(cpu=True, mixed_precision=precision),
        lambda trainee: muon_and_adamw(trainee, peak), alignment=alignment, teacher=teacher, resume=resume,
    )  # fmt: skip
    return pipe, log


def test_times_are_drawn_from_any_part_of_their_distribution():
    times = Times(((0.7, 12.0), (0.3, 2.0)))
    generator = torch.Generator().manual_seed(0)
    all_of_them = times.draw(50_000, generator, 0.0, 1.0)
    bounds = (0.0, 0.5, 0.9, 0.97, 1.0)
    assert sum(times.mass(*part) for part in pairwise(bounds)) == pytest.approx(1)
    for low, high in pairwise(bounds):
        inside = all_of_them[(all_of_them > low) & (all_of_them <= high)]
        assert len(inside) / 50_000 == pytest.approx(times.mass(low, high), abs=0.01)
        part = times.draw(20_000, generator, low, high)
        assert low <= part.min() <= part.max() <= high
        assert part.mean().item() == pytest.approx(inside.mean().item(), abs=0.01)


def test_a_time_belongs_to_the_phase_that_meets_it():
    pipe, steps = tiny(), 20
    assert [part.name for part in Phases(pipe, steps).parts] == ["stock"]
    Variant.parse(FPS).enable(pipe)
    phases = Phases(pipe, steps)
    assert [part.name for part in phases.parts] == ["coarse", "fine", "medium"]
    assert (phases.parts[0].high, phases.parts[-1].low) == (1.0, 0.0)
    assert all(a.low == b.high for a, b in pairwise(phases.parts))
    spans = visionfuse.report(pipe).recipe.schedule.spans(steps)
    for step, time in enumerate(pipe.scheduler.timesteps / 1000):
        span = next(span for span in spans if span.start <= step < span.end)
        assert phases.of(time.item()).name == span.variant


def test_settings_need_one_length():
    with pytest.raises(ValueError, match="either steps or minutes"):
        Settings()
    with pytest.raises(ValueError, match="either steps or minutes"):
        Settings(steps=1, minutes=1)


@pytest.mark.parametrize("recipe", ["stock", FPS], ids=["stock", "fps"])
def test_resuming_gives_the_same_losses(recipe, samples, tmp_path):
    whole, log = run(recipe, samples, tmp_path / "whole", steps=6)
    _, first = run(recipe, samples, tmp_path / "cut", steps=6, slice_steps=3)
    assert [row[0] for row in first.rows["loss"]] == [1, 2, 3]
    resumed, second = run(recipe, samples, tmp_path / "cut", steps=6, resume=True)
    assert second.rows["loss"] == log.rows["loss"]
    assert second.rows["gap"] == log.rows["gap"]
    theirs = resumed.transformer.state_dict()
    assert all(torch.equal(p, theirs[n]) for n, p in whole.transformer.state_dict().items())
    assert json.loads((tmp_path / "cut" / "log.json").read_text())["loss"] == log.rows["loss"]
    assert (tmp_path / "cut" / "loss.png").stat().st_size > 1000


def test_a_teacher_is_what_is_learned(model, samples, tmp_path):
    """Nothing is to be learned without a recipe; under one the distance to the teacher falls, and goes on falling
    where a run was cut. Blocks are compared token by token, though the student's lie in another order."""
    same = {"align": 0.0, "model": model}
    _, stock = run("stock", samples, tmp_path / "stock", steps=1, blocks=1.0, **same)
    assert stock.rows["loss"][0][2] < 1e-10
    wide = "sta window=4x2x2 tile=1x2x2 min_steps=0 dense_start=0"  # of 5x2x2 tiles
    _, near = run(wide, samples, tmp_path / "near", steps=1, blocks=1.0, **same)
    _, velocity = run(wide, samples, tmp_path / "velocity", steps=1, blocks=0.0, **same)
    assert 0 < near.rows["loss"][0][2] - velocity.rows["loss"][0][2] < 0.2
    how = same | {"blocks": 0.5, "batch": 4, "warmup": 1, "drop": 0.0, "peak": 5e-4}
    narrow = "sta window=1x2x2 tile=1x2x2 min_steps=0 dense_start=0"
    _, whole = run(narrow, samples, tmp_path / "whole", steps=20, **how)
    losses = [row[2] for row in whole.rows["loss"]]
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:10])
    run(narrow, samples, tmp_path / "cut", steps=20, slice_steps=3, **how)
    _, resumed = run(narrow, samples, tmp_path / "cut", steps=20, slice_steps=3, resume=True, **how)
    assert resumed.rows["loss"] == whole.rows["loss"][:6]


def test_sizes_take_turns(samples, tmp_path):
    small = training_shapes(tiny(), 4, side=16, seed=0)
    sources = [Source(samples, batch=2, share=0.5), Source(small, batch=3, share=0.5)]
    seen = []

    def both(out: Path, **settings):
        out.mkdir(exist_ok=True)
        pipe = tiny()
        pipe.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(tuple(kwargs["hidden_states"].shape)),
            with_kwargs=True,
        )
        return train(pipe, sources, samples, Settings(**TINY | {"gap_steps": 100} | settings), out,
                     Accelerator(cpu=True), optimizers, resume=True)  # fmt: skip

    whole = both(tmp_path / "whole", steps=6).rows["loss"]
    channels = samples.latents.shape[1]
    assert set(seen) == {(2, channels, 5, 4, 4), (3, channels, 5, 2, 2)}
    first, seen = seen, []
    both(tmp_path / "cut", steps=6, slice_steps=2)
    assert both(tmp_path / "cut", steps=6).rows["loss"] == whole
    assert seen == first


def test_the_forward_follows_the_recipe(samples, tmp_path):
    _, stock = run("stock", samples, tmp_path / "stock", steps=8, rate=1e-3)
    pipe, log = run(FPS, samples, tmp_path / "fps", steps=8, rate=1e-3)
    denoiser = visionfuse.report(pipe).denoisers[0]
    assert denoiser.calls["plan"] > 8  # and the forwards of the loss gap
    assert denoiser.calls["dense"] == 0
    assert {row[1] for row in log.rows["loss"]} <= {"coarse", "fine", "medium"}
    # Same seeds; other attention, once the layers do anything.
    pairs = zip(stock.rows["loss"], log.rows["loss"], strict=True)
    assert any(a[2] != b[2] for a, b in pairs)
    assert not hasattr(type(pipe.transformer.blocks[0].attn1.processor), "_visionfuse_stock")


def test_autocast_reaches_no_plan(samples, tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    _, log = run(FPS, samples, tmp_path / "bf16", steps=2, precision="bf16")
    assert all(np.isfinite(row[2]) for row in log.rows["loss"])
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_batch_is_that_of_its_seed(samples):
    cpu = torch.device("cpu")
    one, same, other = (draw_batch(samples, 4, seed, cpu, drop=0.5) for seed in ((0, 1), (0, 1), (0, 2)))  # fmt: skip
    for a, b in zip(one, same, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(one.noise, other.noise)
    all_dropped = draw_batch(samples, 4, (0, 1), cpu, drop=1.0)
    assert torch.equal(all_dropped.text, padded(samples.nothing).expand(4, -1, -1))


def test_embeddings_are_those_of_the_pipeline():
    pipe = tiny()
    texts = [clip.text for clip in held_out_clips(3)]
    theirs, nothing = pipe.encode_prompt(
        texts, negative_prompt=[""] * 3, max_sequence_length=512, device=torch.device("cpu")
    )
    ours = padded(embed(pipe, ["", *texts]))
    torch.testing.assert_close(ours[1:], theirs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours[:1], nothing[:1], rtol=1e-4, atol=1e-5)


def test_labels_name_what_moves_over_a_token():
    clip = parse_clip("a red circle moves left while a blue square bounces on a white background")
    labels = shapes(tiny(), [clip], side=128, seed=0).labels.view(3, 5, 16, 16)
    for shape, color, motion in (("circle", "red", "moves left"), ("square", "blue", "bounces")):
        index = 1 + SHAPES.index(shape)
        where = labels[0] == index
        assert (labels[1][where] == 1 + list(COLORS).index(color)).all()
        assert (labels[2][where] == 1 + MOTIONS.index(motion)).all()
        columns = [where[frame].any(0).nonzero().float().mean().item() for frame in range(5)]
        assert (columns[0] - columns[-1] > 2) == (motion == "moves left")


def test_windows_show_shapes_at_the_pixels_of_whole_videos():
    packed = pack_clips([parse_clip("a red square moves left on a white background")] * 16)
    generator = torch.Generator().manual_seed(0)
    videos = wan_micro_vae.windows(packed, generator, side=64, frames=9)
    assert videos.shape == (16, 9, 3, 64, 64)
    red = (videos[:, :, 1] < 0.5).sum((2, 3)).float()  # pixels of the square
    radius = 0.11 * 0.9 * 2  # the square's side, of a picture
    assert red.max() > 0.8 * (radius * 256) ** 2
    whole = red[(red > 0.8 * (radius * 128) ** 2) & (red < 1.2 * (radius * 128) ** 2)]
    assert len(whole) > 20
    assert (videos[:, 0] - videos[:, -1]).abs().amax((1, 2, 3)).min() > 0.3  # it moves


def test_vae_training_lowers_the_error_and_measures_its_latents(monkeypatch):
    vae, accelerator = tiny().vae, Accelerator(cpu=True)
    monkeypatch.setattr(wan_micro_vae, "SIDE", 32)
    monkeypatch.setattr(wan_micro_vae, "FRAMES", (5,))
    monkeypatch.setattr(wan_micro_vae, "WARMUP_STEPS", 5)
    settings = {"minutes": 1, "batch": 2, "clips": 8}
    before = wan_micro_vae.train_vae(vae, accelerator, steps=1, **settings)
    after = wan_micro_vae.train_vae(vae, accelerator, steps=25, **settings)
    assert after < 0.8 * before
    kept = {name: p.clone() for name, p in vae.state_dict().items()}
    wan_micro_vae.train_vae(vae, accelerator, steps=2, decoder_only=True, **settings)
    changed = {n.split(".")[0] for n, p in vae.state_dict().items() if not torch.equal(p, kept[n])}
    assert changed == {"decoder", "post_quant_conv"}
    said = wan_micro_vae.measure_latents(vae, torch.device("cpu"), clips=2, seed=0)
    assert "restored videos" in said
    videos = render_clips(held_out_clips(2, seed=0), 128)
    with torch.no_grad():
        latents = encode(vae, videos)
        assert latents.shape == (2, vae.config.z_dim, 5, 16, 16)
        assert latents.mean((0, 2, 3, 4)).abs().max() < 0.1
        assert decode(vae, latents).shape == videos.shape


def test_the_reader_is_asked_for_what_there_is():
    truth = answers(
        pack_clips([parse_clip("a red circle bounces")])
    )  # fmt: skip
    assert truth["shape"].tolist() == [[1 + SHAPES.index("circle"), 0]]
    assert truth["motion"].tolist() == [[MOTIONS.index("bounces"), -100]]
    assert truth["background"].tolist() == [[0, -100]]


def test_a_folder_of_videos(tmp_path):
    pipe, clips = tiny(), held_out_clips(2)
    videos = (render_clips(clips, 64) * 255).byte().permute(0, 1, 3, 4, 2).numpy()
    lines = []
    for index, video in enumerate(videos):
        name = f"{index}.avi"
        writer = cv2.VideoWriter(str(tmp_path / name), cv2.VideoWriter_fourcc(*"MJPG"), 8, (64, 64))
        for frame in video:
            writer.write(np.ascontiguousarray(frame[..., ::-1]))
        writer.release()
        lines.append(json.dumps({"file_name": name, "text": clips[index].text}))
    with pytest.raises(ValueError, match=r"no metadata\.jsonl"):
        folder(pipe, tmp_path, height=32, width=48)
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    found = folder(pipe, tmp_path, height=32, width=48)
    assert found.latents.shape == (2, pipe.vae.config.z_dim, 5, 4, 6)
    assert found.labels is None
    assert torch.equal(found.text, embed(pipe, [clip.text for clip in clips]))
    with pytest.raises(ValueError, match="17 readable frames; 33 are needed"):
        folder(pipe, tmp_path, height=32, width=48, frames=33)
    with pytest.raises(ValueError, match="4 k"):
        folder(pipe, tmp_path, height=32, width=48, frames=16)


def test_commands_train_and_measure(model, tmp_path, capsys):
    size = ["--height", str(SIDE), "--width", str(SIDE), "--device", "cpu"]
    train_wan.main([
        str(model), "--recipe", FPS, "--steps", "2", "--videos", "4", "--held-out", "2",
        "--batch", "2", "--rate", "1e-2", "--warmup", "1", "--out", str(tmp_path), *size,
        "--save-dtype", "float16", "--teacher", str(model),
    ])  # fmt: skip
    stock, tuned = (
        load_file(path / "transformer" / "diffusion_pytorch_model.safetensors")
        for path in (model, tmp_path / "model")
    )
    assert stock.keys() == tuned.keys()
    assert not any("_name_or_path" in path.read_text() for path in tmp_path.rglob("config.json"))
    assert any(not torch.equal(stock[name], tuned[name]) for name in stock)
    table = tmp_path / "video.csv"

    def evaluated(*more: str) -> list[dict[str, str]]:
        eval_video.main([
            str(model), "--tuned", str(tmp_path / "model"), "--variants", FPS, "--captions", "2",
            "--seeds", "0", "1", "--side", str(SIDE), "--steps", "2", "--batch", "2", "--device", "cpu",
            "--csv", str(table), "--strips", str(tmp_path / "strips"), "--strip-captions", "1", *more,
        ])  # fmt: skip
        with table.open(newline="") as file:
            return list(csv.DictReader(file))

    rows = evaluated()
    runs = [("stock", "stock"), ("stock", "fps"), ("tuned", "fps")]
    assert [(row["weights"], row["recipe"]) for row in rows] == runs * 2
    assert [row["seed"] for row in rows] == ["0"] * 3 + ["1"] * 3
    assert rows[0]["psnr"] == rows[0]["density"] == ""
    assert all(float(row["psnr"]) > 3 and 0 < float(row["density"]) < 1 for row in rows[1:3])
    assert all(float(row["loss"]) > 0 for row in rows[:3])
    assert len(list((tmp_path / "strips").glob("*.png"))) == 1
    table.write_text("\n".join(table.read_text().splitlines()[:-1]) + "\n")  # cut in its last run
    again = evaluated("--resume")
    assert all(row.pop("seconds_per_video") for row in rows + again)
    assert again == rows
    with pytest.raises(SystemExit):
        train_wan.main([str(model), "--recipe", "nothing", "--steps", "1", *size])
    assert "Unknown recipe" in capsys.readouterr().err


@pytest.mark.slow
def test_captions_come_to_matter(tmp_path):
    clips = [parse_clip(f"a red circle moves {way} on a white background")
             for way in ("left", "right", "up", "down")]  # fmt: skip
    found = shapes(tiny(), clips, side=SIDE, seed=0)
    latents = found.latents.float()
    axes = (0, 2, 3, 4)
    latents = (latents - latents.mean(axes, keepdim=True)) / latents.std(axes, keepdim=True)
    _, log = run("stock", found._replace(latents=latents.bfloat16()), tmp_path / "fit", steps=400,
                 batch=16, warmup=20, steady=0.5, ema=0.9, drop=0.0,
                 gap_steps=400)  # fmt: skip
    for _, time, right, wrong in log.rows["gap"]:
        assert wrong > 1.08 * right, time
        assert right < 0.4

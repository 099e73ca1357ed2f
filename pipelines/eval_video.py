"""Measure what recipes and fine-tuning do to a video model: captions drawn fully right, PSNR, loss gap.

    python pipelines/eval_video.py runs/wan-micro/model --tuned runs/wan-fps/model --variants "fps tile=5x4x4" \\
        --captions 300 --seeds 0 1 2 --csv assets/bench/video.csv --strips assets/images/wan-micro

For every seed the stock pipeline draws the held-out captions, then each variant draws the same captions from
the same noise, first with the model (training-free) and then with the `--tuned` one. OpenCV reads the videos
back (`visionfuse.shapes.video_fidelity`). Every run becomes one row of `--csv` as soon as it ends; with `--resume`
those that it has are not run again. `--strips` gets pictures of the first captions: frames of stock, training-free
and fine-tuned, one below the other.
"""

from __future__ import annotations

import argparse
import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import WanPipeline
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from visionfuse.bench.table import as_text, environment
from visionfuse.info import default_device, default_dtype, device_name
from visionfuse.pipelines.compare import psnr, timed
from visionfuse.pipelines.rows import append_row, check_columns
from visionfuse.pipelines.train_wan import DTYPES
from visionfuse.pipelines.train_wan_data import Samples, shapes
from visionfuse.pipelines.train_wan_loop import Trainee, loss_gap
from visionfuse.pipelines.train_wan_micro import GUIDANCE, draw_videos
from visionfuse.pipelines.train_wan_phases import Phases
from visionfuse.pipelines.variants import EXAMPLE, STOCK, Variant
from visionfuse.reporting import report
from visionfuse.shapes.fidelity import accuracy, breakdown
from visionfuse.shapes.video import Clip, held_out_clips
from visionfuse.shapes.video_fidelity import score_clips
from visionfuse.shapes.video_render import FRAMES

STRIP_FRAMES = 6  # of a video, in a strip
SEED_STEP = 100_000  # between the noise of two seeds
GAP_VIDEOS = 64


@dataclass(kw_only=True, slots=True)
class Row:
    """One run. Empty fields do not apply.

    weights: "stock", or "tuned" for those of --tuned. right, new, seen: share of the captions that are fully
    right, of all, of those with colour-shape pairs never trained on, and of the others. density: visited pairs
    over the whole run. psnr: of the whole videos against the stock ones of the seed, mean of those that differ.
    loss, loss_wrong: flow matching losses with the right and with a wrong caption, mean over three noise levels,
    under the recipe. seconds_per_video: median of the batches.
    """

    suite: str = "video"
    case: str
    weights: str
    size: int
    frames: int
    recipe: str
    options: str = ""
    density: float | None = None
    steps: int
    guidance: float
    captions: int
    right: float
    new: float
    seen: float
    psnr: float | None = None
    loss: float | None = None
    loss_wrong: float | None = None
    seconds_per_video: float | None = None
    batch: int
    seed: int
    dtype: str
    gpu: str
    torch: str
    triton: str = ""
    commit: str
    date: str
    note: str = ""


class Run(NamedTuple):
    """What one weights-and-recipe pair is called, and what it runs on."""

    weights: str
    pipe: WanPipeline
    variant: Variant

    def __str__(self) -> str:
        return f"{self.weights} weights, {self.variant}"

    @property
    def names(self) -> tuple[str, str, str]:
        """Weights, recipe and options, as in a row."""
        return self.weights, Path(self.variant.recipe).name, self.variant.options


def measured(args: argparse.Namespace) -> set[tuple[str, ...]]:
    """What `--csv` has of these captions: (weights, recipe, options, seed)."""
    if not (args.resume and args.csv and args.csv.exists()):
        return set()
    with args.csv.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    task = (_case(args), *map(str, (args.side, args.frames, args.steps, args.captions)))
    return {
        (row["weights"], row["recipe"], row["options"], row["seed"])
        for row in rows
        if (row["case"], row["size"], row["frames"], row["steps"], row["captions"]) == task
    }


def _case(args: argparse.Namespace) -> str:
    return Path(args.model).resolve().name


def draw_all(run: Run, clips: Sequence[Clip], args: argparse.Namespace, seed: int):
    """Videos, uint8 [N, F, H, W, 3], and seconds a video."""
    run.pipe.set_progress_bar_config(disable=True)
    videos, seconds = [], []
    for first in tqdm(range(0, len(clips), args.batch), desc=f"seed {seed}, {run}", unit="batch"):
        texts = [clip.text for clip in clips[first : first + args.batch]]
        done, spent = timed(lambda texts=texts, first=first: draw_videos(
            run.pipe, texts, side=args.side, steps=args.steps, guidance=args.guidance,
            seed=seed * SEED_STEP + first, frames=args.frames))  # fmt: skip
        videos.append(done)
        seconds.append(spent / len(texts))
    return np.concatenate(videos), median(seconds)


def gap(run: Run, samples: Samples, steps: int) -> tuple[float, float]:
    """Mean losses with right and wrong captions under the run's recipe."""
    device, dtype = run.pipe.transformer.device, run.pipe.transformer.dtype
    accelerator = Accelerator(cpu=device.type == "cpu")
    phases = Phases(run.pipe, steps)
    trainee = Trainee(_InDtype(run.pipe.transformer, dtype))
    with phases.session():
        rows = loss_gap(trainee, samples, phases, 0, accelerator)
    return fmean(right for _, right, _ in rows), fmean(wrong for _, _, wrong in rows)


class _InDtype(torch.nn.Module):
    """A transformer that takes float32 as its pipeline gives it: in its own format."""

    def __init__(self, transformer: torch.nn.Module, dtype: torch.dtype):
        super().__init__()
        self.transformer, self.dtype = transformer, dtype

    def forward(self, hidden_states, timestep, encoder_hidden_states, return_dict):
        return self.transformer(
            hidden_states=hidden_states.to(self.dtype),
            timestep=timestep,
            encoder_hidden_states=encoder_hidden_states.to(self.dtype),
            return_dict=return_dict,
        )


def strip(titles: Sequence[str], videos: Sequence[np.ndarray], caption: str) -> Image.Image:
    """Frames of `videos` `[F, H, W, 3]` of one caption, a row for each, with its title on the left."""
    frames, side = len(videos[0]), videos[0].shape[1]
    shown = np.linspace(0, frames - 1, min(STRIP_FRAMES, frames)).round().astype(int)
    margin, head = 120, 24
    width = margin + len(shown) * (side + 4)
    canvas = Image.new("RGB", (width, head + len(videos) * (side + 4)), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    pen.text((4, 4), caption, font=font, fill=(20, 20, 20))
    for row, (title, video) in enumerate(zip(titles, videos, strict=True)):
        top = head + row * (side + 4)
        pen.multiline_text((4, top + side // 2 - 8), title, font=font, fill=(60, 60, 60))
        for column, frame in enumerate(shown):
            canvas.paste(Image.fromarray(video[frame]), (margin + column * (side + 4), top))
    return canvas


def main(argv: Sequence[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(argv)
    device = torch.device(args.device) if args.device else default_device()
    dtype = DTYPES[args.dtype] if args.dtype else default_dtype(device)
    try:
        variants = list(dict.fromkeys(map(Variant.parse, args.variants)))
        check_columns(args.csv, Row)
        pipes = {"stock": _load(args.model, device, dtype)}
        if args.tuned:
            pipes["tuned"] = _load(args.tuned, device, dtype)
        runs = [Run("stock", pipes["stock"], Variant(STOCK))]
        runs += [Run(weights, pipe, v) for v in variants for weights, pipe in pipes.items()]
        for run in runs:  # what cannot work fails before minutes of stock denoising
            run.variant.enable(run.pipe)
    except (ValueError, OSError, NotImplementedError) as error:
        parser.error(str(error))
    for path in (args.csv and args.csv.parent, args.strips):
        if path:
            path.mkdir(parents=True, exist_ok=True)

    clips = held_out_clips(args.captions)
    samples = _gap_samples(pipes["stock"], clips, args)
    facts = environment() | {"gpu": device_name(device)}
    rows: list[Row] = []
    done = measured(args)
    for seed in args.seeds:
        missing = [run for run in runs if (*run.names, str(seed)) not in done]
        first: dict[str, np.ndarray] = {}
        stock: np.ndarray | None = None
        for run in runs if missing else ():
            if run not in missing and stock is not None:
                continue
            run.variant.enable(run.pipe)
            videos, seconds = draw_all(run, clips, args, seed)
            first[str(run)] = videos[: args.strip_captions]
            if run not in missing:  # the stock videos, with which others are compared
                stock = videos
                continue
            said = report(run.pipe).denoisers
            losses = gap(run, samples, args.steps) if seed == args.seeds[0] else (None, None)
            each = [] if stock is None else [psnr(*two) for two in zip(videos, stock, strict=True)]
            stock = videos if stock is None else stock
            verdicts = score_clips(videos, clips)
            differing = [value for value in each if value != float("inf")]
            gain = said[0].gain if said and run.variant.recipe != STOCK else None
            rows.append(Row(
                case=_case(args), weights=run.weights, size=args.side,
                frames=args.frames, recipe=run.names[1], options=run.variant.options,
                density=None if gain is None else 1 / gain, steps=args.steps,
                guidance=args.guidance, captions=len(clips), right=accuracy(verdicts),
                new=accuracy(verdicts[::2]), seen=accuracy(verdicts[1::2]),
                psnr=fmean(differing) if differing else None, loss=losses[0], loss_wrong=losses[1],
                seconds_per_video=seconds, batch=args.batch, seed=seed,
                dtype=str(dtype).removeprefix("torch."), note=args.note, **facts,
            ))  # fmt: skip
            table = breakdown(verdicts)
            print(f"seed {seed}, {run}: right {accuracy(verdicts):.1%} {table['accuracy']}; "
                  f"wrong: {table['reasons']}")  # fmt: skip
            for denoiser in said:
                for reason, count in denoiser.notes.items():
                    print(f"  own attention: {reason} ({count}x)")
            if args.csv:
                append_row(args.csv, rows[-1])
        if args.strips and first and seed == args.seeds[0]:
            _strips(first, clips, args.strips)
    if rows:
        _show(rows)


def _load(model: str | Path, device: torch.device, dtype: torch.dtype) -> WanPipeline:
    return WanPipeline.from_pretrained(model, dtype=dtype, use_safetensors=True).to(device)


@torch.no_grad()
def _gap_samples(pipe: WanPipeline, clips: Sequence[Clip], args: argparse.Namespace) -> Samples:
    return shapes(pipe, clips[:GAP_VIDEOS], side=args.side, seed=1, frames=args.frames)


def _strips(first: dict[str, np.ndarray], clips: Sequence[Clip], folder: Path) -> None:
    titles = [re.sub(r", ", ",\n", run)[:60] for run in first]
    count = len(next(iter(first.values())))
    for index in range(count):
        picture = strip(titles, [videos[index] for videos in first.values()], clips[index].text)
        name = re.sub(r"\W+", "-", clips[index].text)
        picture.save(folder / f"{index:02d}-{name}.png", optimize=True)


def _show(rows: Sequence[Row]) -> None:
    table = Table(title=f"{rows[0].case}, {rows[0].captions} captions, {rows[0].gpu}")
    table.add_column("run", overflow="fold")
    for title in ("density", "right", "PSNR", "loss", "wrong", "s"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        run = f"seed {row.seed}, {row.weights} weights, {row.recipe} {row.options}".strip()
        loss = (row.loss, row.loss_wrong, row.seconds_per_video)
        cells = (row.density, f"{row.right:.1%}", row.psnr and round(row.psnr, 1), *loss)
        table.add_row(run, *(as_text(cell) for cell in cells))
    Console().print(table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", nargs="?", default="runs/wan-micro/model",
        help="folder of a WanPipeline that draws shapes (default: %(default)s)")  # fmt: skip
    add("--tuned", type=Path, help="folder of the fine-tuned one")
    add("--variants", nargs="+", default=["fps"], metavar="VARIANT",
        help=f"each in quotes: a recipe and its options, such as {EXAMPLE}")  # fmt: skip
    add("--captions", type=int, default=300)
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the noise (default: 0 1 2)")
    add("--side", type=int, default=128)
    add("--frames", type=int, default=FRAMES)
    add("--steps", type=int, default=30, help="denoising steps (default: 30)")
    add("--guidance", type=float, default=GUIDANCE)
    add("--batch", type=int, default=50)
    add("--device", help="cuda or cpu (default: the fastest here)")
    add("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU")
    add("--csv", type=Path, help="append one row a run to this file")
    add("--resume", action="store_true", help="leave out the runs that --csv has")
    add("--strips", type=Path, metavar="FOLDER", help="write frames of the first captions there")
    add("--strip-captions", type=int, default=4)
    add("--note", default="", help="for the note column of the CSV")
    return parser


if __name__ == "__main__":
    main()

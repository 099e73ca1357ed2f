"""Measure what recipes do to a model: captions drawn fully right, and PSNR to the stock pictures.

    python pipelines/eval_fidelity.py assets/flux-micro --side 256 512 --batch 64 32 --captions 500 \\
        --variants "gna density=0.5" "gna density=0.3 stride=8" --csv assets/bench/fidelity.csv

For each side the stock pipeline draws `--captions` held-out captions, half of them with colour-shape
pairs that were never trained on; then every variant draws the same captions from the same noise in
the same batches. OpenCV reads the pictures back (`visionfuse.shapes.fidelity`). A variant is a
recipe (a name or a JSON file) and its options, `impl` among them. Every run becomes one row of
`--csv` as soon as it ends, so that an interrupted table keeps what it has.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from diffusers import FluxPipeline
from PIL import Image
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from visionfuse.bench.table import as_text, environment
from visionfuse.info import device_name
from visionfuse.kernels.plan import Neighborhood
from visionfuse.pipelines.compare import psnr, timed
from visionfuse.pipelines.flux import DTYPES, Request, enabled, expect, load
from visionfuse.pipelines.rows import append_row, check_columns, columns
from visionfuse.pipelines.variants import EXAMPLE, STOCK, Variant
from visionfuse.reporting import Report, report
from visionfuse.shapes import Scene, Verdict, accuracy, breakdown, held_out_scenes, judge

SHEET = 32  # pictures


@dataclass(kw_only=True, slots=True)
class Row:
    """One run. Empty fields do not apply, or were not measured.

    right: share of the captions that are fully right. density_asked: of the grid, as the recipe has
    it. density: mean over all attention calls of the sparse steps, from the plan that really ran.
    psnr: mean of the pictures that differ from stock, in dB; inf if none does. psnr_p10: the PSNR
    that a tenth of the pictures does not exceed. seconds_per_picture: whole calls of the pipeline,
    median of the batches, so that compilation in the first one does not count.
    """

    suite: str = "fidelity"
    case: str
    size: int
    recipe: str
    options: str = ""
    density_asked: float | None = None
    density: float | None = None
    sparse_steps: int | None = None
    steps: int
    captions: int
    right: float
    psnr: float | None = None
    psnr_p10: float | None = None
    seconds_per_picture: float | None = None
    batch: int | None = None
    text_length: int
    seed: int
    dtype: str
    gpu: str
    torch: str
    triton: str = ""
    commit: str
    date: str
    note: str = ""


COLUMNS = columns(Row)


def request(variant: Variant, args: argparse.Namespace, side: int) -> Request:
    """What `visionfuse generate` would be asked. Stock is asked for as the recipe that changes nothing."""
    options, impl = variant.parsed()
    return Request(
        model=args.model, prompt="", recipe="auto" if variant.recipe == STOCK else variant.recipe,
        options=options, impl=impl, height=side, width=side, steps=args.steps, seed=args.seed,
        max_sequence_length=args.text_length, dtype=args.dtype, device=args.device,
    )  # fmt: skip


def measure(
    pipe: FluxPipeline, request: Request, variant: Variant, scenes: list[Scene], *, batch: int
) -> tuple[np.ndarray, float, Report]:
    """Pictures, uint8 [N, H, W, 3], seconds a picture, and what the pipeline says it ran."""
    texts = [scene.text for scene in scenes]
    pictures, seconds = [], []
    pipe.set_progress_bar_config(disable=True)
    with (
        nullcontext() if variant.recipe == STOCK else enabled(pipe, request),
        tqdm(total=len(texts), unit="picture", desc=f"{request.height} {variant}") as bar,
    ):
        for first in range(0, len(texts), batch):
            part = texts[first : first + batch]
            done, spent = timed(partial(_draw, pipe, request, part, request.seed + first))
            pictures.append(done)
            seconds.append(spent / len(part))
            bar.update(len(part))
        return np.concatenate(pictures), median(seconds), report(pipe)


def _draw(pipe: FluxPipeline, request: Request, texts: list[str], seed: int) -> np.ndarray:
    """One batch. The noise of a picture depends on its own seed alone, not on the batch."""
    images = pipe(
        texts,
        height=request.height,
        width=request.width,
        num_inference_steps=request.steps,
        max_sequence_length=request.max_sequence_length,
        generator=[torch.Generator("cpu").manual_seed(seed + i) for i in range(len(texts))],
        output_type="pt",
    ).images
    # The same bytes as output_type="pil", without a detour through float pictures on the host.
    return (images.float() * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def sparse_part(said: Report, steps: int) -> tuple[float | None, int]:
    """Mean density over the attention calls of the sparse steps, and how many of `steps` those are.

    Phases count by their steps, and layers that stay dense as 1. Without a sparse step the density is None.
    """
    if not said.denoisers or said.recipe is None or not said.denoisers[0].calls.get("plan"):
        return None, 0
    denoiser, schedule = said.denoisers[0], said.recipe.schedule
    shares = {
        v.name: v.density for v in denoiser.variants if v.density is not None and not v.reason
    }
    runs = [(span, schedule.by_layer(span, denoiser.layers)) for span in schedule.spans(steps)]
    sparse = [(span.end - span.start, names) for span, names in runs if shares.keys() & set(names)]
    total = sum(count for count, _ in sparse)
    if not total:
        return None, 0
    density = [count * fmean(shares.get(name, 1.0) for name in names) for count, names in sparse]
    return sum(density) / total, total


def judge_all(pictures: np.ndarray, scenes: list[Scene]) -> list[Verdict]:
    """As `visionfuse.shapes.score`, on all cores: reading 500 pictures takes seconds on one."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(judge, pictures, scenes))


def summary(each: list[float]) -> tuple[float | None, float | None]:
    """Of the PSNR of every picture: mean of those that differ from stock, and the lowest tenth's bound."""
    if not each:
        return None, None
    differing = [value for value in each if value != float("inf")]
    mean = fmean(differing) if differing else float("inf")
    return mean, sorted(each)[(len(each) - 1) // 10]


def sheet(images: Sequence[Image.Image], columns: int = 8) -> Image.Image:
    """Pictures side by side, in rows of `columns`."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    canvas = Image.new("RGB", (columns * width, rows * height), "white")
    for index, image in enumerate(images):
        canvas.paste(image, (index % columns * width, index // columns * height))
    return canvas


def main(argv: Sequence[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        variants = list(dict.fromkeys(map(Variant.parse, [STOCK, *args.variants])))
        batches = _per_side(args.batch, args.side)
        for path in (args.csv, args.json, args.sheets and args.sheets / "any"):
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
        check_columns(args.csv, Row)
        expected = {
            (v, side): expect(request(v, args, side)) for side in args.side for v in variants
        }
        pipe = load(request(variants[0], args, args.side[0]))
        for variant in variants:  # what cannot run here fails before minutes of stock denoising
            with enabled(pipe, request(variant, args, args.side[0])):
                pass
    except (ValueError, OSError, NotImplementedError, ImportError) as error:
        parser.error(str(error))

    scenes = held_out_scenes(args.captions, seed=args.seed)
    facts = environment() | {"gpu": device_name(pipe._execution_device)}
    rows, details = [], []
    for side, batch in zip(args.side, batches, strict=True):
        stock: np.ndarray | None = None
        for variant in variants:
            asked = request(variant, args, side)
            pictures, seconds, said = measure(pipe, asked, variant, scenes, batch=batch)
            each = (
                [] if stock is None else [psnr(*two) for two in zip(pictures, stock, strict=True)]
            )
            stock = pictures if stock is None else stock
            verdicts = judge_all(pictures, scenes)
            plan = expected[variant, side].recipe.plan
            mean, tenth = summary(each)
            density, sparse_steps = sparse_part(said, args.steps)
            rows.append(Row(
                case=Path(args.model).resolve().name, size=side, recipe=variant.recipe,
                options=variant.options,
                density_asked=plan.density if isinstance(plan, Neighborhood) else None,
                density=density, sparse_steps=sparse_steps, steps=args.steps, captions=len(scenes),
                right=accuracy(verdicts), psnr=mean, psnr_p10=tenth, seconds_per_picture=seconds,
                batch=batch, text_length=args.text_length, seed=args.seed,
                dtype=str(pipe.transformer.dtype).removeprefix("torch."), note=args.note, **facts,
            ))  # fmt: skip
            details.append(_detail(rows[-1], verdicts, each))
            _say(f"{side} {variant}", said, verdicts)
            if args.csv:
                append_row(args.csv, rows[-1])
            if args.json:
                args.json.write_text(json.dumps(details, indent=1) + "\n", encoding="utf-8")
            if args.sheets:
                name = re.sub(r"[^\w.]+", "-", f"{side} {variant}")
                first = [Image.fromarray(picture) for picture in pictures[:SHEET]]
                sheet(first).save(args.sheets / f"{name}.png", optimize=True)
    _show(rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", nargs="?", default="assets/flux-micro",
        help="folder of a FluxPipeline that draws shapes (default: %(default)s)")  # fmt: skip
    add("--variants", nargs="+", default=[], metavar="VARIANT",
        help=f"each in quotes: a recipe and its options, such as {EXAMPLE}; stock runs in any case, "
        "once a side")  # fmt: skip
    add("--side", type=_count, nargs="+", default=[256], help="pixels, multiples of 8; 128 or more")
    add("--captions", type=_count, default=500, help="(default: %(default)s)")
    add("--steps", type=_count, default=20, help="denoising steps (default: %(default)s)")
    add("--batch", type=_count, nargs="+", default=[50],
        help="pictures at once: one number, or one for each side (default: 50)")  # fmt: skip
    add("--seed", type=int, default=0,
        help="of the captions; picture i starts from the noise of seed + i (default: 0)")  # fmt: skip
    add("--text-length", type=_count, default=64,
        help="max_sequence_length (default: %(default)s)")  # fmt: skip
    add("--device", help="cuda, mps or cpu (default: the fastest here)")
    add("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU")
    add("--csv", type=Path, help="append one row a run to this file")
    add("--json", type=Path, help="write every verdict and every PSNR to this file")
    add("--sheets", type=Path, metavar="FOLDER",
        help=f"save the first {SHEET} pictures of each run there, as one PNG")  # fmt: skip
    add("--note", default="", help="for the note column of the CSV")
    return parser


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of 1 or more, got {text!r}")
    return int(text)


def _per_side(batches: list[int], sides: list[int]) -> list[int]:
    if len(batches) not in (1, len(sides)):
        raise ValueError(
            f"--batch takes one number or one for each side, got {len(batches)} numbers for "
            f"{len(sides)} sides."
        )
    return batches * len(sides) if len(batches) == 1 else batches


def _detail(row: Row, verdicts: list[Verdict], each: list[float]) -> dict[str, Any]:
    """One run for `--json`: every verdict and PSNR. Equal pictures have null, as JSON has no infinity."""
    run = {name: getattr(row, name) for name in ("case", "size", "recipe", "options")}
    facts = [{"caption": v.caption, "right": v.right, "reason": v.reason} for v in verdicts]
    for fact, value in zip(facts, each, strict=False):  # stock has none
        fact["psnr"] = None if value == float("inf") else round(value, 2)
    return run | {"breakdown": breakdown(verdicts), "verdicts": facts}


def _say(run: str, said: Report, verdicts: list[Verdict]) -> None:
    """Right by kind of caption, and why the model's own attention ran where it did."""
    table = breakdown(verdicts)
    kinds = (f"{k} {v:.1%} of {table['count'][k]}" for k, v in table["accuracy"].items())
    print(f"{run}: right {accuracy(verdicts):.1%} ({', '.join(kinds)}); wrong: {table['reasons']}")
    for denoiser in said.denoisers:
        for reason, count in denoiser.notes.items():
            print(f"  own attention: {reason} ({count}x)")


def _show(rows: list[Row]) -> None:
    first = rows[0]
    table = Table(title=f"{first.case}, {first.captions} captions, {first.dtype}, {first.gpu}")
    table.add_column("run", overflow="fold")
    for title in ("right", "PSNR", "p10", "density", "sparse", "s"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            f"{row.size} {row.recipe} {row.options}",
            f"{row.right:.1%}",
            "" if row.psnr is None else f"{row.psnr:.1f}",
            "" if row.psnr_p10 is None else f"{row.psnr_p10:.1f}",
            "" if row.density is None else f"{row.density:.1%}",
            f"{row.sparse_steps} of {row.steps}",
            as_text(row.seconds_per_picture),
        )
    Console().print(table)


if __name__ == "__main__":
    main()

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
import csv
import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import FluxPipeline
from PIL import Image
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from visionfuse.bench.table import as_text, environment
from visionfuse.cli import parse_options
from visionfuse.info import device_name
from visionfuse.kernels.plan import Neighborhood
from visionfuse.pipelines.compare import psnr, timed
from visionfuse.pipelines.flux import DTYPES, Request, enabled, expect, load
from visionfuse.reporting import Report, report
from visionfuse.shapes import Scene, Verdict, accuracy, breakdown, held_out_scenes, judge

STOCK = "stock"
EXAMPLE = "'gna density=0.5 stride=8'"
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


COLUMNS = [field.name for field in fields(Row)]


class Variant(NamedTuple):
    """A recipe and its options as they were written: `Variant("gna", "density=0.5 stride=8")`."""

    recipe: str
    options: str = ""

    @classmethod
    def parse(cls, text: str) -> Variant:
        name, *pairs = text.split() or [""]
        wrong = not name or "=" in name or any(not re.match(r"[^=]+=.", pair) for pair in pairs)
        if wrong or (name == STOCK and pairs):
            raise ValueError(
                f"A variant is a recipe and its options, such as {EXAMPLE}, or {STOCK!r} alone; "
                f"got {text!r}."
            )
        return cls(name, " ".join(pairs))

    def __str__(self) -> str:
        return f"{self.recipe} {self.options}".strip()

    def request(self, args: argparse.Namespace, side: int) -> Request:
        """What `visionfuse generate` would be asked. Stock is asked for as the recipe that changes nothing."""
        options = parse_options(self.options.split())
        impl = options.pop("impl", "auto")
        return Request(
            model=args.model, prompt="", recipe="auto" if self.recipe == STOCK else self.recipe,
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

    Layers that stay dense count as 1. Without a sparse step the density is None.
    """
    if not said.denoisers:
        return None, 0
    denoiser = said.denoisers[0]
    planned, dense = denoiser.calls.get("plan", 0), denoiser.calls.get("dense", 0)
    if not planned or denoiser.density is None:
        return None, 0
    routed = denoiser.routed / denoiser.layers
    return 1 - routed * (1 - denoiser.density), round(steps * planned / (planned + dense))


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
        _check_csv(args.csv)
        expected = {
            (v, side): expect(v.request(args, side)) for side in args.side for v in variants
        }
        pipe = load(variants[0].request(args, args.side[0]))
        for variant in variants:  # what cannot run here fails before minutes of stock denoising
            with enabled(pipe, variant.request(args, args.side[0])):
                pass
    except (ValueError, OSError, NotImplementedError, ImportError) as error:
        parser.error(str(error))

    scenes = held_out_scenes(args.captions, seed=args.seed)
    facts = environment() | {"gpu": device_name(pipe._execution_device)}
    rows, details = [], []
    for side, batch in zip(args.side, batches, strict=True):
        stock: np.ndarray | None = None
        for variant in variants:
            request = variant.request(args, side)
            pictures, seconds, said = measure(pipe, request, variant, scenes, batch=batch)
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
                _append(args.csv, rows[-1])
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


def _check_csv(path: Path | None) -> None:
    """Before hours of denoising: an existing file must have the columns of `Row`."""
    if path is None or not path.exists():
        return
    with path.open(newline="", encoding="utf-8") as file:
        header = next(csv.reader(file), [])
    if header != COLUMNS:
        raise ValueError(
            f"{path} has other columns: {', '.join(header) or 'none'}. Rows of this script have "
            f"{', '.join(COLUMNS)}. Name another file, or give this one these columns."
        )


def _append(path: Path, row: Row) -> None:
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow({name: as_text(value) for name, value in asdict(row).items()})


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

"""Measure how many held-out captions a model draws fully right.

    python pipelines/eval_fidelity.py --model assets/flux-micro --side 256 --captions 500
    python pipelines/eval_fidelity.py --side 512 --recipe gna --option density=0.5

The stock pipeline draws `--captions` held-out captions, half of them with colour-shape pairs that
were never trained on; OpenCV reads the pictures back (`visionfuse.shapes.fidelity`). Prints a table
by kind of caption and appends one row to `--csv`. With `--recipe` the same pictures are drawn by
the accelerated pipeline.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
from diffusers import FluxPipeline
from PIL import Image
from tqdm import tqdm

from visionfuse.shapes import accuracy, breakdown, held_out_scenes, score


def generate(pipe: FluxPipeline, texts: list[str], args: argparse.Namespace) -> list[Image.Image]:
    """One picture a caption. The noise of picture i depends on `seed + i` alone, not on batches."""
    images: list[Image.Image] = []
    pipe.set_progress_bar_config(disable=True)
    for first in tqdm(range(0, len(texts), args.batch), unit="batch"):
        part = texts[first : first + args.batch]
        seeds = range(args.seed + first, args.seed + first + len(part))
        images += pipe(
            part,
            height=args.side,
            width=args.side,
            num_inference_steps=args.steps,
            max_sequence_length=args.text_length,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        ).images
    return images


def sheet(images: list[Image.Image], columns: int = 8) -> Image.Image:
    """Pictures side by side, in rows of `columns`."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    canvas = Image.new("RGB", (columns * width, rows * height), "white")
    for index, image in enumerate(images):
        canvas.paste(image, (index % columns * width, index // columns * height))
    return canvas


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="assets/flux-micro", help="folder of a FluxPipeline")
    parser.add_argument("--captions", type=int, default=500)
    parser.add_argument("--side", type=int, default=256, help="pixels, a multiple of 8")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--text-length", type=int, default=64, help="max_sequence_length")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--recipe", help="visionfuse recipe; without it the stock pipeline runs")
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="of the recipe"
    )
    parser.add_argument("--csv", type=Path, help="append the result to this file")
    parser.add_argument("--json", type=Path, help="write every verdict to this file")
    parser.add_argument("--sheet", type=Path, help="save the first 32 pictures as one PNG")
    args = parser.parse_args()

    scenes = held_out_scenes(args.captions, seed=args.seed)
    texts = [scene.text for scene in scenes]
    pipe = FluxPipeline.from_pretrained(args.model, torch_dtype=getattr(torch, args.dtype))
    pipe.to(args.device)
    if args.recipe:
        import visionfuse  # noqa: F401  (gives the pipeline its method)

        options = dict(option.split("=", 1) for option in args.option)
        pipe.enable_visionfuse(args.recipe, **{k: _value(v) for k, v in options.items()})
    started = time.time()
    images = generate(pipe, texts, args)
    seconds = time.time() - started
    verdicts = score(images, scenes)
    table = breakdown(verdicts)
    for kind, share in table["accuracy"].items():
        print(f"{kind:10} {share:6.1%} of {table['count'][kind]}")
    print(f"{'all':10} {accuracy(verdicts):6.1%} of {len(verdicts)}; wrong: {table['reasons']}")
    if args.csv:
        _append(args, accuracy(verdicts), seconds)
    if args.json:
        rows = [{"caption": v.caption, "right": v.right, "reason": v.reason} for v in verdicts]
        args.json.write_text(json.dumps({"breakdown": table, "verdicts": rows}, indent=1))
    if args.sheet:
        sheet(images[:32]).save(args.sheet, optimize=True)


def _append(args: argparse.Namespace, right: float, seconds: float) -> None:
    gpu = torch.cuda.get_device_name() if args.device.startswith("cuda") else "cpu"
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    row = {
        "suite": "fidelity",
        "case": f"flux-micro-{args.side}",
        "recipe": args.recipe or "stock",
        "options": " ".join(args.option),
        "captions": args.captions,
        "right": round(right, 4),
        "steps": args.steps,
        "text_length": args.text_length,
        "seed": args.seed,
        "dtype": args.dtype,
        "seconds": round(seconds, 1),
        "gpu": gpu,
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
        "date": datetime.now(UTC).date().isoformat(),
    }
    new = not args.csv.exists()
    with args.csv.open("a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if new:
            writer.writeheader()
        writer.writerow(row)


def _value(text: str) -> object:
    """Numbers and booleans as such, anything else as text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


if __name__ == "__main__":
    main()

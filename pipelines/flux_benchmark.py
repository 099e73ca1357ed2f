"""FLUX.1-dev with random weights, or a checkpoint, stock and accelerated: seconds a step and a call, memory, errors.

    python pipelines/flux.py --benchmark --size 1024x1024 --csv flux.csv
    python pipelines/flux.py --benchmark --size 4096x4096 --steps 4 --recipes "gna density=0.3 precision=fp8 dense_steps=1"
    python pipelines/flux.py --benchmark assets/flux-micro --size 256x256 --csv new.csv --base flux.csv

Of large images in two stages (the recipe scale_dit) see `pipelines/scale_dit_benchmark.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visionfuse.cli import parse_options
from visionfuse.pipelines.benchmark import (
    VARIANTS,
    Case,
    benchmark,
    compare_csv,
    random_weights,
    variants_of,
)
from visionfuse.pipelines.flux import Request, load
from visionfuse.recipes import build as build_recipe

PROMPT = "a large red circle above a small blue square on a white background"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("model", nargs="?", help="folder or Hugging Face name; random weights by default")  # fmt: skip
    parser.add_argument("--size", default="1024x1024", help="height x width, pixels")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument(
        "--recipes", default="", help="others than sage, with options, separated by commas"
    )
    parser.add_argument("--variants", nargs="+", help="of those in the table; all by default")
    parser.add_argument("--layers", type=int, help="with random weights, instead of the model's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--csv", type=Path, help="where rows go")
    parser.add_argument("--base", type=Path, help="earlier rows, to compare --csv with")
    parser.add_argument("--commit", default="")
    args = parser.parse_args(argv)
    if args.base and not args.csv:
        parser.error("--base is compared with --csv; name that file too.")
    variants = dict(VARIANTS)
    try:
        height, width = map(int, args.size.split("x"))
        for words in filter(None, map(str.strip, args.recipes.split(","))):
            name, *options = words.split()
            variants |= variants_of(words, recipe=build_recipe(name, **parse_options(options)))
    except (TypeError, ValueError) as wrong:
        parser.error(f"{wrong} A size is 1024x1024; a recipe is gna density=0.3.")
    if unknown := set(args.variants or ()).difference(variants):
        parser.error(f"Unknown variants {', '.join(unknown)}. Choose from: {'; '.join(variants)}.")
    variants = {name: variants[name] for name in args.variants or variants}

    def build() -> tuple[Any, Any]:
        if args.model is None:
            return random_weights(
                "flux.1-dev", (height, width), layers=args.layers, device=args.device
            )
        pipe = load(Request(model=args.model, prompt=PROMPT, device=args.device))
        pipe.set_progress_bar_config(disable=True)

        def call(pipe: Any, steps: int, **more: Any) -> Tensor:
            return pipe(
                PROMPT, height=height, width=width, num_inference_steps=steps, output_type="latent",
                generator=torch.Generator("cpu").manual_seed(0), max_sequence_length=64, **more,
            ).images  # fmt: skip

        return pipe, call

    case = Case(suite="flux", name=f"{args.model or 'FLUX.1-dev, random weights'}, {args.size}")
    benchmark(build, variants, steps=args.steps, case=case, csv=args.csv, commit=args.commit)
    if args.base:
        compare_csv(args.base, args.csv)


if __name__ == "__main__":
    main()

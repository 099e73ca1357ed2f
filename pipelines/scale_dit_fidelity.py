"""Large pictures of flux-micro, made in several ways: are captions still right, and are edges sharp?

    python pipelines/scale_dit_fidelity.py assets/flux-micro --side 1024 2048 --captions 100 --csv runs/scale_dit_micro.csv

Ways: `direct` draws at full size with the stock pipeline, `enlarged` draws small and enlarges (no second stage), the
others are two stages (`visionfuse.scale_dit`). Captions are judged by OpenCV on the picture shrunk to 512 pixels.
Sharpness is that of patches of 32x32 pixels at full size: the steepest step from pixel to pixel in patches with an
edge, in levels of 0 to 255; noise is the standard deviation in patches without. A drawn picture is the reference.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean, median

import cv2
import numpy as np
import torch
from diffusers import FluxPipeline
from PIL import Image

from visionfuse.bench.table import Row, show_rows, update_csv
from visionfuse.pipelines.compare import timed
from visionfuse.recipes import build
from visionfuse.scale_dit import TwoStage, two_stages
from visionfuse.shapes import Scene, arrange, draw, held_out_scenes, judge, pack

SUITE = "scale_dit_micro"
SCALES = {512: 2, 1024: 4, 2048: 4}
STAGES = TwoStage(steps=20, fine_steps=12, ntk=1.0, low_band=0.0)
WAYS = {
    "scale_dit": STAGES,
    "scale_dit, ntk 2": replace(STAGES, ntk=2.0),
    "scale_dit, ntk 4": replace(STAGES, ntk=4.0),
    "scale_dit, ntk 10": replace(STAGES, ntk=10.0),
    "scale_dit, 6 fine steps": replace(STAGES, fine_steps=6),
    "scale_dit, 16 fine steps": replace(STAGES, fine_steps=16),
    "scale_dit, low band": replace(STAGES, low_band=1.0),
    "scale_dit, 6 fine steps, low band": replace(STAGES, fine_steps=6, low_band=1.0),
    "scale_dit, ntk 4, low band": replace(STAGES, ntk=4.0, low_band=1.0),
    "scale_dit, no guidance": replace(STAGES, guided=False, ntk=1.0),
    "scale_dit, 6 fine steps, low band, released": replace(STAGES, fine_steps=6, low_band=1.0),
    "scale_dit, 6 fine steps, low band, numbered windows": replace(STAGES, fine_steps=6, low_band=1.0),
}  # fmt: skip
# Options of the recipe, of ways whose names end so.
RULES = {"released": {"rule": "released"}, "numbered windows": {"guidance": "linear"}}
PATCH, EDGE = 32, 48  # pixels; levels between the darkest and the brightest of a patch


def sharpness(picture: np.ndarray) -> tuple[float, float]:
    """(steepest step in patches with an edge, deviation in patches without), means over the patches."""
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY).astype(np.float32)
    side = grey.shape[0] // PATCH * PATCH
    steps = np.maximum(np.abs(np.diff(grey, axis=0, append=grey[-1:])),
                       np.abs(np.diff(grey, axis=1, append=grey[:, -1:])))  # fmt: skip
    cut = lambda x: x[:side, :side].reshape(side // PATCH, PATCH, -1, PATCH).swapaxes(1, 2).reshape(-1, PATCH**2)  # fmt: skip
    patches, steep = cut(grey), cut(steps).max(1)
    edge = np.ptp(patches, axis=1) >= EDGE
    return float(steep[edge].mean()) if edge.any() else 0.0, float(patches[~edge].std(1).mean())


def measure(name: str, pictures: list[np.ndarray], scenes: list[Scene], seconds: float, side: int) -> Row:  # fmt: skip
    right = [judge(cv2.resize(p, (512, 512), interpolation=cv2.INTER_AREA), s).right
             for p, s in zip(pictures, scenes, strict=True)]  # fmt: skip
    sharp, noise = (fmean(x) for x in zip(*map(sharpness, pictures), strict=True))
    return Row(suite=SUITE, case=f"flux-micro, {side}x{side}, {len(scenes)} captions", impl=name,
               ms=1e3 * seconds, note=f"{fmean(right):.0%} right, edges {sharp:.1f} levels a pixel, "
               f"flat patches {noise:.2f} levels")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("model")
    parser.add_argument("--side", type=int, nargs="+", default=[1024])
    parser.add_argument("--captions", type=int, default=100)
    parser.add_argument("--direct-captions", type=int, help="of the stock pipeline, which is slow")
    parser.add_argument("--ways", nargs="+", default=["direct", "enlarged", *WAYS])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument(
        "--lora", type=Path, help="folder of a LoRA of pipelines/train_scale_dit.py"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--csv", type=Path)
    parser.add_argument(
        "--sheets", type=Path, help="folder for pictures, one row of ways a caption"
    )
    parser.add_argument("--commit", default="")
    args = parser.parse_args()
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    pipe = FluxPipeline.from_pretrained(args.model, dtype=dtype, use_safetensors=True)
    pipe.to(args.device)
    pipe.set_progress_bar_config(disable=True)
    if args.lora:
        pipe.load_lora_weights(args.lora)
    for side in args.side:
        scenes = held_out_scenes(args.captions, seed=args.seed)
        rows, shown = [reference(scenes, side)], {}
        for way in args.ways:
            some = scenes[: args.direct_captions] if way == "direct" else scenes
            pictures, times = [], []
            for first in range(0, len(some), args.batch):
                part = some[first : first + args.batch]
                seed = args.seed + first
                made, seconds = timed(partial(make, pipe, way, part, side, seed))
                pictures += made
                times.append(seconds / len(part))
            name = f"{way}, LoRA" if args.lora else way
            rows.append(measure(name, pictures, some, median(times), side))
            shown[name] = pictures[:4]
            show_rows(rows[-1:], title=f"{SUITE}, {side}")
            if args.csv:
                update_csv(rows, args.csv, commit=args.commit)
            if args.sheets:
                write_sheet(shown, args.sheets / f"{side}.png")


def make(pipe: FluxPipeline, way: str, scenes: list[Scene], side: int, seed: int) -> list[np.ndarray]:  # fmt: skip
    texts = [scene.text for scene in scenes]
    generators = [torch.Generator("cpu").manual_seed(seed + i) for i in range(len(texts))]
    if way == "direct":
        images = pipe(texts, height=side, width=side, num_inference_steps=STAGES.steps,
                      generator=generators, max_sequence_length=64).images  # fmt: skip
    else:
        stages = replace(WAYS.get(way, STAGES), scale=SCALES.get(side, 4))
        if way == "enlarged":
            stages = replace(stages, fine_steps=1)
        recipe = build("scale_dit", **RULES.get(way.rpartition(", ")[2], {}))
        made = two_stages(pipe, texts, height=side, width=side, stages=stages, recipe=recipe,
                          generator=generators, max_sequence_length=64)  # fmt: skip
        images = made.enlarged if way == "enlarged" else made.images
    return [np.asarray(image.convert("RGB")) for image in images]


def reference(scenes: list[Scene], side: int) -> Row:
    """Drawn pictures of the same captions."""
    generator = torch.Generator().manual_seed(0)
    some = scenes[:8]
    drawn = (draw(arrange(pack(some), generator), side) * 255).round().byte()
    return measure("drawn", list(drawn.permute(0, 2, 3, 1).numpy()), some, 0.0, side)


def write_sheet(shown: dict[str, list[np.ndarray]], path: Path) -> None:
    """Ways from left to right, captions from top to bottom; under each whole picture its sharpest detail."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = []
    for way, pictures in shown.items():
        title = np.full((28, 384, 3), 255, np.uint8)
        column = [
            cv2.putText(
                title, way, (6, 20), cv2.FONT_HERSHEY_SIMPLEX, 0.55, (0, 0, 0), 1, cv2.LINE_AA
            )
        ]
        for picture in pictures:
            whole = cv2.resize(picture, (384, 384), interpolation=cv2.INTER_AREA)
            column += [whole, detail(picture)]
        columns.append(np.concatenate(column))
    tallest = max(len(column) for column in columns)
    columns = [np.pad(c, ((0, tallest - len(c)), (0, 0), (0, 0))) for c in columns]
    Image.fromarray(np.concatenate(columns, 1)).save(path)


def detail(picture: np.ndarray, side: int = 192) -> np.ndarray:
    """The part of a picture with most edges, twice enlarged without smoothing."""
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    edges = cv2.boxFilter(np.abs(cv2.Laplacian(grey, cv2.CV_32F)), -1, (side, side))
    half = side // 2
    y, x = np.unravel_index(
        edges[half:-half, half:-half].argmax(), edges[half:-half, half:-half].shape
    )
    return cv2.resize(
        picture[y : y + side, x : x + side], (384, 384), interpolation=cv2.INTER_NEAREST
    )


if __name__ == "__main__":
    main()

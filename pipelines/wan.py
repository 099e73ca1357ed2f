"""Wan, stock and accelerated: text to video, image to video, and a benchmark at full size with random weights.

python pipelines/wan.py Wan-AI/Wan2.1-T2V-1.3B-Diffusers "a cat runs" --recipe fps --output cat.mp4
python pipelines/wan.py Wan-AI/Wan2.1-I2V-14B-480P-Diffusers "it rains" --image street.png --recipe sage
python pipelines/wan.py --benchmark --model wan2.1-1.3b --size 480p --recipes "fps, sage" --csv wan.csv
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from inspect import signature
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers import (
    AutoencoderKLWan,
    DiffusionPipeline,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.utils import export_to_video, is_ftfy_available, load_image
from rich.console import Console

from visionfuse.cli import parse_options, parse_shape, user_errors
from visionfuse.info import default_device, default_dtype
from visionfuse.kernels.plan import Dense, TokenLayout, plan_attention
from visionfuse.pipelines.compare import psnr, timed
from visionfuse.recipe import Recipe
from visionfuse.recipes import build
from visionfuse.reporting import report

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
CLASSES = {cls.__name__: cls for cls in (WanPipeline, WanImageToVideoPipeline)}
FPS = 16  # of Wan's videos
console = Console()


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One video. None leaves a value to the model's own pipeline.

    model: a folder or a name on the Hugging Face Hub. image: the first frame, a file or an address. recipe: a name,
    with its options, or a JSON file.
    """

    model: str
    prompt: str
    image: str | None = None
    negative: str | None = None
    recipe: str = "fps"
    options: dict[str, Any] = field(default_factory=dict)
    impl: str = "auto"
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    steps: int | None = None
    guidance: float | None = None
    max_sequence_length: int | None = None
    seed: int = 0

    @property
    def call(self) -> dict[str, Any]:
        """Arguments of the pipeline."""
        given = {
            "negative_prompt": self.negative, "height": self.height, "width": self.width,
            "num_frames": self.frames, "num_inference_steps": self.steps,
            "guidance_scale": self.guidance, "max_sequence_length": self.max_sequence_length,
        }  # fmt: skip
        return {name: value for name, value in given.items() if value is not None}


def films(model: str) -> bool:
    """Whether `model`, a folder or a name on the Hugging Face Hub, is a pipeline for this file."""
    return DiffusionPipeline.load_config(model).get("_class_name") in CLASSES


def recipe_of(request: Request) -> Recipe:
    """Raises ValueError for what is no recipe or no option of it."""
    if request.recipe.endswith(".json"):
        if request.options:
            raise ValueError(f"{request.recipe} already holds its options; edit the file instead.")
        return Recipe.load(request.recipe)
    try:
        return build(request.recipe, **request.options)
    except TypeError as error:  # an unknown option is the user's mistake, as a wrong value is
        raise ValueError(str(error)) from error


def expect(request: Request) -> tuple[Recipe, TokenLayout]:
    """The recipe and the tokens of a request, before any weight is read. Raises ValueError where they do not fit,
    or OSError where a model cannot be fetched."""
    recipe = recipe_of(request)
    index = DiffusionPipeline.load_config(request.model)
    cls = CLASSES.get(index["_class_name"])
    if cls is None:
        raise ValueError(
            f"{request.model} is a {index['_class_name']}; this command runs {' and '.join(CLASSES)}. In Python, "
            "pipe.enable_visionfuse() works on other pipelines too."
        )
    if (request.image is None) == (cls is WanImageToVideoPipeline):
        needs = "needs --image, its first frame" if request.image is None else "takes no --image"
        raise ValueError(f"{request.model} is a {cls.__name__}, which {needs}.")
    if request.image is not None and not is_ftfy_available():
        raise ValueError("Image to video cleans its prompt with ftfy: pip install ftfy.")
    defaults = signature(cls.__call__).parameters
    sizes = [defaults[name].default if given is None else given for name, given in (
        ("num_frames", request.frames), ("height", request.height), ("width", request.width))]  # fmt: skip
    transformer = WanTransformer3DModel.load_config(request.model, subfolder="transformer")
    patch = transformer.get("patch_size", (1, 2, 2))
    vae = AutoencoderKLWan.load_config(request.model, subfolder="vae")
    time, side = vae.get("scale_factor_temporal") or 4, vae.get("scale_factor_spatial") or 8
    frames, height, width = sizes
    if frames % time != 1:
        raise ValueError(f"frames={frames} must be one more than a multiple of {time}.")
    for name, pixels, p in zip(("height", "width"), (height, width), patch[1:], strict=True):
        if pixels % (side * p):
            raise ValueError(
                f"{name}={pixels} is no multiple of {side * p}, the pixels of a token."
            )
    grid = ((frames - 1) // time + 1, height // (side * patch[1]), width // (side * patch[2]))
    most = transformer.get("rope_max_seq_len", max(grid))
    if max(grid) > most:
        raise ValueError(
            f"{frames} frames of {height}x{width} pixels are {grid} tokens, and the model has positions for "
            f"{most} on an axis. Give --frames, --height and --width."
        )
    return recipe, TokenLayout.joint(grids=[grid])


def load(request: Request, *, dtype: str | None, device: str | None, offload: bool) -> Any:
    """The pipeline on its device."""
    where = default_device() if device is None else torch.device(device)
    kind = default_dtype(where) if dtype is None else DTYPES.get(dtype)
    if kind is None:
        raise ValueError(f"Unknown dtype {dtype!r}. Choose one of {', '.join(DTYPES)}.")
    pipe = DiffusionPipeline.from_pretrained(request.model, dtype=kind, use_safetensors=True)
    if offload:
        pipe.enable_model_cpu_offload(device=where)
        return pipe
    return pipe.to(where)


def frames_of(pipe: Any, request: Request) -> np.ndarray:
    """The frames of one video with the pipeline as it is: float [frames, height, width, 3] in 0..1."""
    more = {} if request.image is None else {"image": load_image(request.image)}
    # On the CPU, so that one seed gives one video on every device.
    generator = torch.Generator("cpu").manual_seed(request.seed)
    return pipe(prompt=request.prompt, generator=generator, **request.call, **more).frames[0]


def generate(pipe: Any, request: Request) -> np.ndarray:
    """The frames of one video, with the recipe."""
    pipe.enable_visionfuse(recipe_of(request), impl=request.impl)
    return frames_of(pipe, request)


def film(
    request: Request, output: Path, *, fps: int = FPS, dtype: str | None = None, device: str | None = None,
    offload: bool = False, compare: bool = False, dry_run: bool = False,
) -> None:  # fmt: skip
    """Check a request, make its video and write it as an MP4. compare: the model alone on the left, from the same
    noise. dry_run: only say what would run. Raises ValueError, or OSError where a model cannot be fetched."""
    if output.suffix != ".mp4":
        raise ValueError(f"The file of a video must end in .mp4, got {output}.")
    recipe, layout = expect(request)
    if dry_run:
        _say(recipe, layout, request.steps)
        return
    pipe = load(request, dtype=dtype, device=device, offload=offload)
    stock, alone = timed(lambda: frames_of(pipe, request)) if compare else (None, 0.0)
    made, seconds = timed(lambda: generate(pipe, request))
    shown = made if stock is None else np.concatenate([stock, made], axis=2)
    output.parent.mkdir(parents=True, exist_ok=True)
    export_to_video(list(shown), str(output), fps=fps)
    console.print(str(report(pipe)), markup=False, highlight=False, soft_wrap=True)
    if stock is not None:
        levels = [(video * 255).round().astype(np.uint8) for video in (stock, made)]
        console.print(
            f"Left: the model alone, {alone:.1f} s. Right: {request.recipe}, {seconds:.1f} s, PSNR "
            f"{psnr(*levels):.1f} dB.", highlight=False, soft_wrap=True,
        )  # fmt: skip
    console.print(f"Video: {output}", highlight=False, soft_wrap=True)


def _say(recipe: Recipe, layout: TokenLayout, steps: int | None) -> None:
    grid = layout.segments[0].shape
    console.print(f"tokens: {'x'.join(map(str, grid))} = {layout.length}", highlight=False)
    for span in recipe.schedule.spans(steps or 50):
        console.print(str(span), highlight=False)
    for way in recipe.ways:
        if way.name not in recipe.schedule.names or isinstance(way.plan, Dense):
            continue
        plan = plan_attention(layout, way.plan, order=recipe.order, impl="gluon_sm90", head_dim=128,
                              precision=way.precision.name)  # fmt: skip
        console.print(
            f"{way.name}: {way.precision}, {plan.density:.1%} of the pairs, in tiles of "
            f"{'x'.join(map(str, plan.tile or ()))} tokens", highlight=False,
        )  # fmt: skip


def wan(
    model: Annotated[
        str, typer.Argument(help="Folder or Hugging Face name; unused by --benchmark.")
    ] = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    prompt: Annotated[str, typer.Argument(help="What to show.")] = "a cat runs through snow",
    image: Annotated[str | None, typer.Option(help="First frame, for image to video.")] = None,
    negative: Annotated[str | None, typer.Option(help="What not to show.")] = None,
    recipe: Annotated[str, typer.Option(help="Name of a recipe, or its JSON file.")] = "fps",
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", help="key=value of the recipe; repeatable."),
    ] = None,
    impl: Annotated[str, typer.Option(help="Attention implementation.")] = "auto",
    height: Annotated[int | None, typer.Option(help="Pixels.", min=16)] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.", min=16)] = None,
    frames: Annotated[int | None, typer.Option(help="One more than a multiple of 4.", min=1)] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", min=1)] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.")] = None,
    max_sequence_length: Annotated[int | None, typer.Option(help="Text tokens.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    fps: Annotated[int, typer.Option(help="Frames a second of the file.", min=1)] = FPS,
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda, mps or cpu.")] = None,
    offload: Annotated[bool, typer.Option("--offload", help="Keep idle parts in CPU memory.")] = False,
    output: Annotated[Path, typer.Option(help="Where the MP4 goes.")] = Path("out.mp4"),
    compare: Annotated[
        bool, typer.Option("--compare", help="The model alone and accelerated, side by side.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, and say what would run.")] = False,
    benchmark: Annotated[
        bool, typer.Option("--benchmark", help="Random weights: times, errors, memory.")
    ] = False,
    of: Annotated[
        str, typer.Option("--model", help="With --benchmark: wan2.1-1.3b or wan2.1-14b.")
    ] = "wan2.1-1.3b",
    size: Annotated[str, typer.Option(help="With --benchmark: 480p, 720p or a size such as 480x832.")] = "480p",
    recipes: Annotated[
        str, typer.Option(help="With --benchmark: recipes with options, separated by commas.")
    ] = "fps, sage",
    parts: Annotated[str, typer.Option(help="With --benchmark: attention, step, combined (with compile= and linear=).")] = "attention,step",
    layers: Annotated[
        int | None, typer.Option(help="With --benchmark: instead of the model's.", min=1)
    ] = None,
    repeats: Annotated[int, typer.Option(help="With --benchmark: timed calls of a step.", min=1)] = 1,
    csv: Annotated[Path | None, typer.Option(help="With --benchmark: where rows go.")] = None,
    base: Annotated[
        Path | None, typer.Option(help="With --csv: rows of an earlier run, to compare with.")
    ] = None,
    commit: Annotated[str, typer.Option(help="With --csv, where there is no git.")] = "",
) -> None:  # fmt: skip
    """Make a video with Wan, accelerated, or measure what a recipe would bring."""
    with user_errors():
        if benchmark:
            _benchmark(of, size, recipes, parts, frames, layers, repeats, dtype, device, csv,
                       base, commit, dry_run)  # fmt: skip
            return
        request = Request(
            model=model, prompt=prompt, image=image, negative=negative, recipe=recipe,
            options=parse_options(option or []), impl=impl, height=height, width=width, frames=frames,
            steps=steps, guidance=guidance, max_sequence_length=max_sequence_length, seed=seed,
        )  # fmt: skip
        film(request, output, fps=fps, dtype=dtype, device=device, offload=offload, compare=compare,
             dry_run=dry_run)  # fmt: skip


def _benchmark(
    model: str, size: str, recipes: str, parts: str, frames: int | None, layers: int | None, repeats: int,
    dtype: str | None, device: str | None, csv: Path | None, base: Path | None, commit: str,
    dry_run: bool,
) -> None:  # fmt: skip
    from visionfuse.bench.table import update_csv
    from visionfuse.pipelines import wan_benchmark
    from visionfuse.pipelines.benchmark import compare_csv

    if base is not None and csv is None:
        raise ValueError("--base compares with what --csv writes; name both.")
    where = default_device() if device is None else torch.device(device)
    task = wan_benchmark.Task(
        model=model, size=_size(size), recipes=tuple(map(_recipe, recipes.split(","))), frames=frames or 81,
        layers=layers, repeats=repeats, parts=tuple(part.strip() for part in parts.split(",")),
        device=where, dtype=default_dtype(where) if dtype is None else DTYPES[dtype],
    )  # fmt: skip
    if where.type == "cpu" and size in wan_benchmark.SIZES and not dry_run:
        raise ValueError(
            f"{task.case} takes hours on a CPU; try --size 32x64 --frames 5 --layers 1."
        )
    if dry_run:
        console.print(f"{task.case} on {where}", highlight=False)
        for recipe in task.recipes:
            console.print(recipe.name, highlight=False)
            _say(recipe, TokenLayout.joint(grids=[task.grid]), wan_benchmark.RUN)
        return
    for rows in wan_benchmark.measure(task):
        wan_benchmark.show(rows)
        if csv is not None:
            update_csv(rows, csv, commit=commit)
    if base is not None and csv is not None:
        compare_csv(base, csv)


def _size(text: str) -> tuple[int, int]:
    from visionfuse.pipelines.wan_benchmark import SIZES

    if text in SIZES:
        return SIZES[text]
    sides = parse_shape(text, "--size")
    if len(sides) != 2:
        raise ValueError(
            f"--size is 480p, 720p, or height and width such as 480x832, not {text!r}."
        )
    return sides


def _recipe(text: str) -> Recipe:
    """ "sta window=3x3x3" as a recipe of that name."""
    name, *pairs = text.split()
    found = recipe_of(Request(model="", prompt="", recipe=name, options=parse_options(pairs)))
    return replace(found, name=text.strip())


if __name__ == "__main__":
    typer.run(wan)

"""FLUX, stock and accelerated: what `visionfuse generate` does. The script form takes the same options.

python pipelines/flux.py assets/flux-micro "a large red circle" --recipe gna --compare
python pipelines/flux.py black-forest-labs/FLUX.1-dev "a lighthouse" --recipe scale_dit --height 4096 --width 4096
python pipelines/flux.py --benchmark        # times and errors, see pipelines/flux_benchmark.py
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from inspect import signature
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FluxPipeline, FluxTransformer2DModel
from PIL import Image

from visionfuse.info import default_device, default_dtype, device_name
from visionfuse.kernels.plan import Local, Neighborhood, Segment, TokenLayout
from visionfuse.patching import get
from visionfuse.pipelines.compare import (
    AMPLIFY,
    Difference,
    amplified_difference,
    difference,
    save_metrics,
    side_by_side,
    timed,
)
from visionfuse.recipe import Recipe
from visionfuse.recipes import build
from visionfuse.reporting import Report, report
from visionfuse.scale_dit import Result, TwoStage, rounded, two_stages
from visionfuse.schedule import Span

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
DEFAULT_LATENTS = 128  # the side of FluxPipeline's default image, in latents
# Options of the recipe scale_dit that say how an image is made in two stages, beside those of its attention.
STAGES = [part.name for part in fields(TwoStage) if part.name not in ("steps", "guidance_scale")]
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One image. None leaves a value to the model's own pipeline, or (dtype, device) to this machine.

    model: a folder or a name on the Hugging Face Hub. recipe: a name, with its options, a JSON file, or a recipe.
    impl: the attention implementation, "auto" or a name. intermediates: a folder for the pictures on the way to an
    image in two stages: small.png, enlarged.png, and previews step_06.png and so on, every `preview_every` steps.
    """

    model: str
    prompt: str
    recipe: str | Recipe = "gna"
    options: dict[str, Any] = field(default_factory=dict)
    impl: str = "auto"
    height: int | None = None
    width: int | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    max_sequence_length: int | None = None
    dtype: str | None = None
    device: str | None = None
    offload: bool = False
    intermediates: Path | None = None

    @property
    def recipe_name(self) -> str:
        return self.recipe.name if isinstance(self.recipe, Recipe) else self.recipe

    @property
    def stages(self) -> TwoStage:
        """Of an image that is made in two: the recipe "scale_dit"."""
        given: dict[str, Any] = {n: v for n, v in self.options.items() if n in STAGES}
        if self.steps is not None:
            given["steps"] = self.steps
        if self.guidance is not None:
            given = {"fine_guidance_scale": self.guidance, **given, "guidance_scale": self.guidance}
        return TwoStage(**given)


@dataclass(frozen=True, kw_only=True, slots=True)
class Expected:
    """What a request will run, known from the model's configuration alone."""

    recipe: Recipe
    layout: TokenLayout
    head_dim: int
    phases: tuple[Span, ...]

    @property
    def grid(self) -> tuple[int, ...]:
        return next(s.shape for s in self.layout.segments if s.kind == "grid")


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Two images of one request. Times are whole calls of the pipeline, in seconds."""

    request: Request
    stock: Image.Image
    fused: Image.Image
    stock_seconds: float
    fused_seconds: float
    change: Difference
    report: Report
    device: str
    dtype: str
    steps: int

    @property
    def speedup(self) -> float:
        return self.stock_seconds / self.fused_seconds

    @property
    def density(self) -> float | None:
        """Of the steps that follow the plan; None if none did."""
        return self.report.denoisers[0].density if self.report.denoisers else None

    @property
    def planned_steps(self) -> int:
        if self.density is None or self.report.recipe is None:
            return 0
        return self.steps - self.report.recipe.schedule.first_step(self.steps)


def expect(request: Request) -> Expected:
    """Check a request before any weight is read: recipe, model, and whether the plan fits the grid.

    Raises ValueError, or OSError where a model cannot be fetched.
    """
    recipe = _recipe(request)
    if request.intermediates is not None and not isinstance(recipe.plan, Local):
        raise ValueError(
            f"Only images in two stages (recipe scale_dit) have intermediates; {recipe.name} has none."
        )
    _check_model(request.model)
    transformer = FluxTransformer2DModel.load_config(request.model, subfolder="transformer")
    vae = AutoencoderKL.load_config(request.model, subfolder="vae")
    defaults = signature(FluxPipeline.__call__).parameters
    scale = 2 ** len(vae["block_out_channels"])  # the VAE's own factor, and two latents a token
    pixels = [side or DEFAULT_LATENTS * scale // 2 for side in (request.height, request.width)]
    text = request.max_sequence_length or defaults["max_sequence_length"].default
    steps = request.steps or defaults["num_inference_steps"].default
    if isinstance(recipe.plan, Local):
        unit, steps = scale * request.stages.scale, request.stages.fine
        small = [side // unit for side in large_size(request, scale)]
        grid = tuple(n * request.stages.scale for n in small)
        layout = TokenLayout((Segment("text", (text,)), Segment("grid", grid),
                              Segment("guidance", tuple(small))))  # fmt: skip
    else:
        for name, side in zip(("height", "width"), pixels, strict=True):
            if side % scale:
                raise ValueError(f"{name}={side} is no multiple of {scale}, the pixels of a token.")
        layout = TokenLayout.joint(text=text, grids=[tuple(side // scale for side in pixels)])
    if isinstance(recipe.plan, Neighborhood):
        recipe.plan.resolve(layout.segments[-1].shape)
    return Expected(
        recipe=recipe,
        layout=layout,
        head_dim=transformer["attention_head_dim"],
        phases=recipe.schedule.spans(steps),
    )


def _recipe(request: Request) -> Recipe:
    recipe = request.recipe
    if isinstance(recipe, Recipe) or recipe.endswith(".json"):
        if request.options:
            raise ValueError(
                f"Options go with a recipe's name; {request.recipe_name} already holds them, got "
                f"{', '.join(request.options)}. Edit the recipe instead."
            )
        return recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    staged = STAGES if recipe == "scale_dit" else []
    try:
        return build(recipe, **{n: v for n, v in request.options.items() if n not in staged})
    except TypeError as error:  # an unknown option is the user's mistake, as a wrong value is
        raise ValueError(str(error)) from error


def _check_model(model: str) -> None:
    if not (Path(model) / "model_index.json").is_file():
        if Path(model).exists():
            raise ValueError(
                f"{model} is not a diffusers pipeline: it has no model_index.json. Name the folder "
                "that save_pretrained wrote."
            )
        if not HUB_NAME.fullmatch(model):
            raise ValueError(
                f"There is no folder {model}, and it is no name on the Hugging Face Hub (owner/name)."
            )
    config = DiffusionPipeline.load_config(model)
    if config["_class_name"] != FluxPipeline.__name__:
        raise ValueError(
            f"{model} is a {config['_class_name']}; this command runs text-to-image FLUX. In Python, "
            "pipe.enable_visionfuse() works on other pipelines too."
        )


def load(request: Request) -> FluxPipeline:
    """The pipeline on its device. Raises ValueError for an unknown dtype or device."""
    device = default_device() if request.device is None else _device(request.device)
    dtype = default_dtype(device) if request.dtype is None else DTYPES.get(request.dtype)
    if dtype is None:
        raise ValueError(f"Unknown dtype {request.dtype!r}. Choose one of {', '.join(DTYPES)}.")
    pipe = FluxPipeline.from_pretrained(request.model, dtype=dtype, use_safetensors=True)
    if request.offload:
        pipe.enable_model_cpu_offload(device=device)
        return pipe
    return pipe.to(device)


def _device(name: str) -> torch.device:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"The device {name!r} cannot be used here: {reason}") from error
    return torch.device(name)


def enable(pipe: FluxPipeline, request: Request) -> None:
    pipe.enable_visionfuse(_recipe(request), impl=request.impl)


@contextmanager
def enabled(pipe: FluxPipeline, request: Request) -> Iterator[None]:
    enable(pipe, request)
    try:
        yield
    finally:
        pipe.disable_visionfuse()


def generate(pipe: FluxPipeline, request: Request, *, steps: int | None = None) -> Image.Image:
    """One image with the pipeline as it is: in two stages where it is enabled with local attention.

    `steps` overrides the request's, for warm-ups.
    """
    own = get(pipe)
    if own is not None and isinstance(own.recipe.plan, Local):
        return in_two_stages(pipe, request, steps=steps).images[0]
    given = {
        "height": request.height,
        "width": request.width,
        "num_inference_steps": steps or request.steps,
        "guidance_scale": request.guidance,
        "max_sequence_length": request.max_sequence_length,
    }
    # On the CPU, so that one seed gives one image on every device.
    generator = torch.Generator("cpu").manual_seed(request.seed)
    given = {name: value for name, value in given.items() if value is not None}
    return pipe(request.prompt, generator=generator, **given).images[0]


def large_size(request: Request, token: int) -> tuple[int, int]:
    """Height and width that are nearest to the request's, for two stages. token: its side in pixels."""
    scale = request.stages.scale
    default = scale * DEFAULT_LATENTS * token // 2
    return rounded(request.height or default, request.width or default, scale * token)


def in_two_stages(pipe: FluxPipeline, request: Request, *, steps: int | None = None) -> Result:
    """One large image and what it was made from, at the size that is nearest to the request's."""
    if steps is not None:
        options = request.options | {"fine_steps": None}
        request = replace(request, steps=steps, options=options, intermediates=None)
    stages = request.stages
    height, width = large_size(request, 2 * pipe.vae_scale_factor)
    more = {}
    if request.max_sequence_length is not None:
        more["max_sequence_length"] = request.max_sequence_length
    return two_stages(
        pipe, request.prompt, height=height, width=width, stages=stages,
        generator=torch.Generator("cpu").manual_seed(request.seed),
        watch=None if request.intermediates is None else partial(_keep, request.intermediates), **more,
    )  # fmt: skip


def _keep(folder: Path, name: str, images: list[Image.Image]) -> None:
    """One picture on the way; those of steps are numbered so that files lie in their order."""
    what, _, step = name.partition(" ")
    folder.mkdir(parents=True, exist_ok=True)
    images[0].save(folder / (f"{what}_{int(step):02d}.png" if step else f"{what}.png"))


def compare(pipe: FluxPipeline, request: Request, *, repeats: int = 1) -> Comparison:
    """The same prompt and seed stock and with the recipe; medians of `repeats` runs, taken in turns.

    Both have a warm-up of one step. Leaves the pipeline as it was, also after an error.
    """
    if isinstance(_recipe(request).plan, Local):
        height, width = large_size(request, 2 * pipe.vae_scale_factor)
        request = replace(request, height=height, width=width, intermediates=None)
    with enabled(pipe, request):  # what cannot work fails here, before minutes of stock denoising
        pipe.set_progress_bar_config(disable=True)
        generate(pipe, request, steps=1)
    generate(pipe, request, steps=1)

    stock_seconds, fused_seconds = [], []
    for _ in range(repeats):
        pipe.set_progress_bar_config(disable=False, desc="stock")
        stock, seconds = timed(lambda: generate(pipe, request))
        stock_seconds.append(seconds)
        pipe.set_progress_bar_config(disable=False, desc=f"visionfuse {request.recipe_name}")
        with enabled(pipe, request):
            fused, seconds = timed(lambda: generate(pipe, request))
            said = report(pipe)
        fused_seconds.append(seconds)
    return Comparison(
        request=request,
        stock=stock,
        fused=fused,
        stock_seconds=median(stock_seconds),
        fused_seconds=median(fused_seconds),
        change=difference(stock, fused),
        report=said,
        device=device_name(pipe._execution_device),
        dtype=str(pipe.dtype).removeprefix("torch."),
        steps=len(pipe.scheduler.timesteps),
    )


def picture(result: Comparison) -> Image.Image:
    """stock | visionfuse | amplified difference, with the figures as captions."""
    change, request = result.change, result.request
    panels = [
        ("stock", f"{result.stock_seconds:.2f} s", result.stock),
        (
            f"visionfuse {request.recipe_name}",
            f"{result.fused_seconds:.2f} s, {result.speedup:.2f}x, {density_line(result)}",
            result.fused,
        ),
        (
            f"difference x{AMPLIFY}",
            f"PSNR {change.psnr_text}, SSIM {change.ssim:.3f}",
            amplified_difference(result.stock, result.fused),
        ),
    ]
    footer = f"“{request.prompt}”, seed {request.seed}, {result.device}, {result.dtype}"
    return side_by_side(panels, footer)


def density_line(result: Comparison) -> str:
    if result.density is None:
        return "the model's own attention"
    return f"density {result.density:.0%} in {result.planned_steps} of {result.steps} steps"


def metrics(result: Comparison) -> dict[str, Any]:
    """The figures of a comparison as plain values."""
    request = result.request
    return {
        "model": request.model,
        "prompt": request.prompt,
        "recipe": request.recipe_name,
        "options": request.options,
        "seed": request.seed,
        "width": result.stock.width,
        "height": result.stock.height,
        "steps": result.steps,
        "planned_steps": result.planned_steps,
        "device": result.device,
        "dtype": result.dtype,
        "stock_s": round(result.stock_seconds, 4),
        "visionfuse_s": round(result.fused_seconds, 4),
        "speedup": round(result.speedup, 4),
        "density": result.density,
        "report": str(result.report),
    }


def save(result: Comparison, out: Path) -> Path:
    """Write the picture to `out` and the figures beside it; returns where those are."""
    picture(result).save(out)
    figures = out.with_suffix(".json")
    save_metrics(figures, result.change, **metrics(result))
    return figures


if __name__ == "__main__":
    import sys

    import typer

    from visionfuse.cli import generate as command
    from visionfuse.pipelines.flux_benchmark import main as benchmark

    if "--benchmark" in sys.argv:
        benchmark([given for given in sys.argv[1:] if given != "--benchmark"])
    else:
        typer.run(command)

"""FLUX, stock and accelerated: what `visionfuse generate` does. The script form takes the same options.

python pipelines/flux.py assets/flux-micro "a large red circle" --recipe gna --compare
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, FluxPipeline
from PIL import Image

import visionfuse
from visionfuse.info import default_device, default_dtype, device_name
from visionfuse.pipelines.compare import (
    AMPLIFY,
    Difference,
    amplified_difference,
    difference,
    save_metrics,
    side_by_side,
    timed,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One image. None leaves a value to the model's own pipeline, or (dtype, device) to this machine.

    model: a folder or a name on the Hugging Face Hub. options: of the recipe, as for enable_visionfuse.
    """

    model: str
    prompt: str
    recipe: str = "gna"
    options: dict[str, Any] = field(default_factory=dict)
    height: int | None = None
    width: int | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    max_sequence_length: int | None = None
    dtype: str | None = None
    device: str | None = None
    offload: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Two images of one request. Times are whole calls of the pipeline, in seconds."""

    request: Request
    stock: Image.Image
    fused: Image.Image
    stock_seconds: float
    fused_seconds: float
    change: Difference
    report: Any
    device: str
    dtype: str

    @property
    def speedup(self) -> float:
        return self.stock_seconds / self.fused_seconds

    @property
    def density(self) -> float | None:
        return self.report.density


def load(request: Request) -> FluxPipeline:
    """Raises ValueError for a model that is not there or is no FLUX, an unknown dtype or device."""
    device = torch.device(request.device) if request.device else default_device()
    dtype = getattr(torch, request.dtype, None) if request.dtype else default_dtype(device)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"Unknown dtype {request.dtype!r}. Choose bfloat16, float16 or float32.")
    _check_model(request.model)
    pipe = DiffusionPipeline.from_pretrained(request.model, torch_dtype=dtype)
    if not isinstance(pipe, FluxPipeline):
        raise ValueError(
            f"{request.model} is a {type(pipe).__name__}; this command runs text-to-image FLUX. "
            "In Python, pipe.enable_visionfuse() works on other pipelines too."
        )
    if request.offload:
        pipe.enable_model_cpu_offload(device=device)
        return pipe
    return pipe.to(device)


def _check_model(model: str) -> None:
    if (Path(model) / "model_index.json").is_file():
        return
    if Path(model).exists():
        raise ValueError(
            f"{model} is not a diffusers pipeline: it has no model_index.json. Name the folder that "
            "save_pretrained wrote."
        )
    if model.count("/") != 1 or model.startswith((".", "/", "~", "assets/")):
        raise ValueError(
            f"There is no folder {model}, and it is no name on the Hugging Face Hub (owner/name)."
        )


def generate(pipe: FluxPipeline, request: Request, *, steps: int | None = None) -> Image.Image:
    """One image with the pipeline as it is. `steps` overrides the request's, for warm-ups."""
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


def compare(pipe: FluxPipeline, request: Request, *, repeats: int = 1) -> Comparison:
    """The same prompt and seed stock and with the recipe, each after a warm-up of one step.

    Leaves the pipeline as it was, also after an error.
    """
    # Wrong options fail here, before minutes of work.
    pipe.enable_visionfuse(request.recipe, **request.options)
    pipe.disable_visionfuse()

    stock, stock_seconds = _timed_run(pipe, request, "stock", repeats)
    pipe.enable_visionfuse(request.recipe, **request.options)
    try:
        fused, fused_seconds = _timed_run(pipe, request, f"visionfuse {request.recipe}", repeats)
        report = visionfuse.report(pipe)
    finally:
        pipe.disable_visionfuse()
    device = pipe._execution_device
    return Comparison(
        request=request,
        stock=stock,
        fused=fused,
        stock_seconds=stock_seconds,
        fused_seconds=fused_seconds,
        change=difference(stock, fused),
        report=report,
        device=device_name(device),
        dtype=str(pipe.transformer.dtype).removeprefix("torch."),
    )


def _timed_run(pipe, request: Request, name: str, repeats: int) -> tuple[Image.Image, float]:
    pipe.set_progress_bar_config(disable=True)
    generate(pipe, request, steps=1)
    pipe.set_progress_bar_config(disable=False, desc=name)
    return timed(lambda: generate(pipe, request), repeats)


def picture(result: Comparison) -> Image.Image:
    """stock | visionfuse | amplified difference, with the figures as captions."""
    change, request = result.change, result.request
    density = "" if result.density is None else f", density {result.density:.0%}"
    panels = [
        ("stock", f"{result.stock_seconds:.2f} s", result.stock),
        (
            f"visionfuse {request.recipe}",
            f"{result.fused_seconds:.2f} s, {result.speedup:.2f}x{density}",
            result.fused,
        ),
        (
            f"difference x{AMPLIFY}",
            f"PSNR {change.psnr:.1f} dB, SSIM {change.ssim:.3f}",
            amplified_difference(result.stock, result.fused),
        ),
    ]
    footer = f"“{request.prompt}”, seed {request.seed}, {result.device}, {result.dtype}"
    return side_by_side(panels, footer)


def metrics(result: Comparison) -> dict[str, Any]:
    """The figures of a comparison as plain values."""
    request = result.request
    return {
        "model": request.model,
        "prompt": request.prompt,
        "recipe": request.recipe,
        "options": request.options,
        "seed": request.seed,
        "width": result.stock.width,
        "height": result.stock.height,
        "steps": request.steps,
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
    import typer

    from visionfuse.cli import generate as command

    typer.run(command)

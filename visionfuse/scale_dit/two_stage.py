"""Large images from FLUX in two stages: a small one that decides what is where, then the large one around it.

    result = two_stages(pipe, "a lighthouse in a storm", height=4096, width=4096)
    result.images[0].save("lighthouse.png")

The small image is drawn by the stock pipeline, enlarged and sharpened in pixels, encoded again, and noised to
where the last `fine_steps` of a run begin. These steps run at full size, with local attention and the latents of the
small image as guidance. "Scale-DiT" (arXiv 2510.16325), section 3; defaults are those of the public code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from math import cos, pi
from typing import Any, Literal

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..kernels.plan import Local
from ..patching import get
from ..recipe import Recipe
from ..reporting import Report, report
from .guidance import NTK_FACTOR, Guidance, guided
from .lora import lora_layers

FINE_SHARE = 18 / 28  # of the steps, those that the large image runs
TILED_ABOVE = 2048 * 2048  # pixels, from which on the VAE works in tiles

Watch = Callable[[str, list[Image.Image]], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class TwoStage:
    """How a large image is made.

    scale: by which the small image is smaller. steps, guidance_scale: of its run.
    fine_steps, fine_guidance_scale: of the large image; it is noised as it is before the last `fine_steps` of `steps`,
        18 of 28 by default. As many as `steps` start from noise alone.
    sharpen: of the enlarged image, against its blur; 0 leaves it as it is.
    guided: whether the small image travels along as guidance.
    ntk: factor of the rotary base in the large image.
    low_band: how far the low frequencies of its first step are drawn to those of the enlarged image, 0 to 1; less in
        later ones, as half a cosine. Without, flux-micro paints blobs of other colours into large shapes.
    shift: of the noise schedule of the large image; None takes that of the longest sequence the scheduler knows.
    cached: keep keys and values of the guidance from step to step, see `Guidance`.
    tiling: whether the VAE works in tiles; None decides by the size.
    preview_every: steps of the large image from one preview to the next, for who watches.
    lora: where LoRA acts, if there is any: on the guidance everywhere, on the image only where queries, keys and values
        are made, and not on the small image ("guidance", as that of Scale-DiT), or "everywhere", as one of a style.
    """

    scale: int = 4
    steps: int = 28
    fine_steps: int | None = None
    guidance_scale: float = 3.5
    fine_guidance_scale: float = 4.5
    sharpen: float = 1.0
    guided: bool = True
    ntk: float = NTK_FACTOR
    low_band: float = 1.0
    shift: float | None = None
    cached: bool = False
    tiling: bool | None = None
    preview_every: int = 6
    lora: Literal["guidance", "everywhere"] = "guidance"

    def __post_init__(self):
        if self.fine_steps is not None and not 1 <= self.fine_steps <= self.steps:
            raise ValueError(
                f"fine_steps are the last of steps={self.steps}, hence 1 to {self.steps}, got {self.fine_steps}."
            )
        if self.lora not in ("guidance", "everywhere"):
            raise ValueError(f"lora is 'guidance' or 'everywhere', got {self.lora!r}.")
        if self.preview_every < 1:
            raise ValueError(f"preview_every must be at least 1, got {self.preview_every}.")
        if self.scale < 2:
            raise ValueError(f"scale must be at least 2, got {self.scale}.")
        if not 0 <= self.low_band <= 1:
            raise ValueError(f"low_band must lie in [0, 1], got {self.low_band}.")

    @property
    def fine(self) -> int:
        """Steps of the large image."""
        return self.fine_steps or max(1, round(self.steps * FINE_SHARE))


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """images: the large ones. small, enlarged: what they were made from. report: of the second stage."""

    images: list[Image.Image]
    small: list[Image.Image]
    enlarged: list[Image.Image]
    report: Report


def rounded(height: int, width: int, unit: int) -> tuple[int, int]:
    """The nearest size whose sides are whole multiples of `unit` pixels: (3000, 2000) -> (3008, 1984) for 64."""
    return max(unit, round(height / unit) * unit), max(unit, round(width / unit) * unit)


def unit_of(pipe: Any, scale: int) -> int:
    """Pixels of a token of the small image in the large one: sides are multiples of it. 64 for FLUX."""
    return scale * pipe.vae_scale_factor * 2


@torch.no_grad()
def two_stages(
    pipe: Any,
    prompt: str | list[str],
    *,
    height: int,
    width: int,
    stages: TwoStage | None = None,
    recipe: str | Recipe | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    watch: Watch | None = None,
    **arguments: Any,
) -> Result:
    """Large images of a FluxPipeline, which stays as it is.

    height, width: pixels, multiples of `unit_of`. recipe: of the attention of the second stage; None takes what the
        pipeline is enabled with, if that is local attention, and "scale_dit" otherwise.
    watch: gets pictures on the way as they are made: "small", "enlarged", and while the large ones are drawn, every
        `stages.preview_every` steps, where they are going: "step 6" and so on.
    arguments: more for both stages, such as max_sequence_length. Offloading is that of `pipe`. Raises ValueError for
    sizes that do not fit.
    """
    from diffusers import FluxImg2ImgPipeline, FluxPipeline

    stages = stages or TwoStage()
    unit = unit_of(pipe, stages.scale)
    if height % unit or width % unit:
        near = "x".join(map(str, rounded(height, width, unit)))
        raise ValueError(
            f"Sides of a large image must be multiples of {unit}, got {height}x{width}; {near} is near."
        )
    parts = dict(pipe.components)
    first, second = FluxPipeline(**parts), FluxImg2ImgPipeline(**parts)
    second.scheduler = _scheduler(
        pipe.scheduler, height * width * stages.scale**2 // unit**2, stages
    )
    low_height, low_width = height // stages.scale, width // stages.scale
    bars = getattr(pipe, "_progress_bar_config", {})
    first.set_progress_bar_config(**{**bars, "desc": f"{low_width}x{low_height}"})
    second.set_progress_bar_config(**{**bars, "desc": f"{width}x{height}"})

    with _without_lora(pipe.transformer) if stages.lora == "guidance" else nullcontext():
        latents = first(
            prompt, height=low_height, width=low_width, num_inference_steps=stages.steps,
            guidance_scale=stages.guidance_scale, generator=generator, output_type="latent", **arguments,
        ).images  # fmt: skip
    with _tiles(pipe.vae, stages.tiling, height * width):
        small = decode(pipe, latents, low_height, low_width)
        enlarged = [enlarge(image, stages.scale, stages.sharpen) for image in small]
        more = dict(arguments)
        if watch is not None:
            watch("small", small)
            watch("enlarged", enlarged)
            more["callback_on_step_end"] = _Previews(pipe, stages, (height, width), watch)
        clean = encode(pipe, enlarged)
        packed = FluxPipeline._pack_latents(clean, *clean.shape)
        rows, columns = height // unit, width // unit
        guidance = Guidance(
            latents=latents, coarse=(rows, columns), image=(stages.scale * rows, stages.scale * columns),
            low_band=packed if stages.low_band else None, strength=_strength(second, stages), ntk=stages.ntk,
            cached=stages.cached, split_lora=stages.lora == "guidance",
        )  # fmt: skip
        own = get(pipe)
        if recipe is None and own is not None and isinstance(own.recipe.plan, Local):
            second.enable_visionfuse(own.recipe, impl=own.impl)
            vars(second)["_visionfuse"].ran = own.ran  # so that `report(pipe)` tells what ran
        else:
            second.enable_visionfuse(recipe or "scale_dit")
        with guided(pipe.transformer, guidance) if stages.guided else nullcontext():
            images = second(
                prompt, image=clean, height=height, width=width, num_inference_steps=stages.steps,
                strength=stages.fine / stages.steps, generator=generator,
                guidance_scale=stages.fine_guidance_scale, **more,
            ).images  # fmt: skip
        said = report(second)
        second.disable_visionfuse()
    pipe.maybe_free_model_hooks()
    return Result(images=images, small=small, enlarged=enlarged, report=said)


class _Previews:
    """A callback of the second stage that shows, every so many steps, where its image is going: the point at the time
    0 of the straight line through the last two latents."""

    def __init__(self, pipe: Any, stages: TwoStage, size: tuple[int, int], watch: Watch):
        self.pipe, self.stages, self.size, self.watch = pipe, stages, size, watch
        self.before: Tensor | None = None

    def __call__(self, pipe: Any, step: int, timestep: Any, given: dict[str, Tensor]) -> dict:
        latents, scheduler, done = given["latents"], pipe.scheduler, step + 1
        if done % self.stages.preview_every == 0 and done < self.stages.fine:
            clean = latents
            if self.before is not None:
                last, now = scheduler.sigmas[scheduler.step_index - 1 : scheduler.step_index + 1]
                clean = torch.lerp(self.before.float(), latents.float(), float(last / (last - now)))
            self.watch(f"step {done}", decode(self.pipe, clean, *self.size))
        self.before = latents
        return {}


def enlarge(image: Image.Image, scale: int, sharpen: float) -> Image.Image:
    """Bicubic, then more of what a blur takes away."""
    pixels = np.asarray(image.convert("RGB"))
    large = cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
    if sharpen:
        blurred = cv2.GaussianBlur(large, (3, 3), 0)
        large = cv2.addWeighted(large, 1 + sharpen, blurred, -sharpen, 0)
    return Image.fromarray(large)


def decode(pipe: Any, packed: Tensor, height: int, width: int) -> list[Image.Image]:
    """The images of packed latents."""
    latents = pipe._unpack_latents(packed, height, width, pipe.vae_scale_factor)
    latents = latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    pixels = pipe.vae.decode(latents.to(pipe.vae.dtype), return_dict=False)[0]
    return pipe.image_processor.postprocess(pixels, output_type="pil")


def encode(pipe: Any, images: list[Image.Image]) -> Tensor:
    """The latents [B, C, H, W] of images, one at a time."""
    latents = []
    for image in images:
        pixels = pipe.image_processor.preprocess(image, *image.size[::-1])
        pixels = pixels.to(pipe._execution_device, pipe.vae.dtype)
        latents.append(pipe.vae.encode(pixels).latent_dist.mode())
    return (torch.cat(latents) - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor


def _scheduler(scheduler: Any, tokens: int, stages: TwoStage) -> Any:
    """Of the large image. Schedules shift with the length of the sequence, along a line that FLUX was not trained
    beyond: at 4096x4096 it would leave no time for detail."""
    config = scheduler.config
    shift = stages.shift
    if shift is None:
        low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        share = (min(tokens, high) - low) / (high - low)
        shift = config.get("base_shift", 0.5) * (1 - share) + config.get("max_shift", 1.15) * share
    return type(scheduler).from_config(config, base_shift=shift, max_shift=shift)


def _strength(pipe: Any, stages: TwoStage):
    """How far the low band is drawn at a time: half a cosine over the steps of the run."""

    def strength(t: float) -> float:
        times = pipe.scheduler.timesteps[-stages.fine :].tolist()
        step = min(range(len(times)), key=lambda i: abs(times[i] / 1000 - t))
        return stages.low_band * 0.5 * (1 + cos(pi * step / len(times)))

    return strength


@contextmanager
def _tiles(vae: Any, tiling: bool | None, pixels: int) -> Iterator[None]:
    before, vae.use_tiling = vae.use_tiling, pixels > TILED_ABOVE if tiling is None else tiling
    try:
        yield
    finally:
        vae.use_tiling = before


@contextmanager
def _without_lora(model: Any) -> Iterator[None]:
    """The small image is that of the base model."""
    with ExitStack() as stack:
        if lora_layers(model):
            model.disable_lora()
            stack.callback(model.enable_lora)
        yield

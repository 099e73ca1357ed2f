"""The video tab: one prompt and seed, as the model is and with a recipe, side by side."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory
from typing import Any

import gradio as gr
import numpy as np
from diffusers.utils import export_to_video
from gradio.utils import get_upload_folder
from PIL import Image

from visionfuse.info import device_name
from visionfuse.pipelines import wan
from visionfuse.pipelines.compare import AMPLIFY, amplified_difference, difference, timed
from visionfuse.reporting import Report, report
from visionfuse.shapes.video import held_out_clips, parse_clip
from visionfuse.shapes.video_fidelity import judge_clip

from . import figures
from .form import recipe_form
from .image import HEAD, asked_for
from .jobs import MODEL, Jobs, Loaded, before_forwards, user_errors, within
from .recipes import parsed
from .settings import Settings

LEAST_SIDE, SIDE = 64, 128
FRAMES, STEPS, RATE = 17, 20, 8  # RATE: frames a second
PROMPT = "a green triangle moves left while a red circle stays still on a white background"
GUIDANCE = {"wan-micro": 3.0, "wan-micro-fps": 3.0}  # other models have their pipeline's own
Frames = np.ndarray  # uint8 [frames, height, width, 3]


def video_tab(settings: Settings, jobs: Jobs, load: Loaded) -> None:
    labels = list(settings.models["video"])
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            prompt = gr.Textbox(PROMPT, label="What to film", lines=2, max_length=settings.max_prompt,
                                elem_id="video-prompt")  # fmt: skip
            another = gr.Button("Another caption", size="sm")
            model = gr.Dropdown(labels, value=labels[0], label="Model", visible=len(labels) > 1)
            with gr.Row():
                side = gr.Slider(LEAST_SIDE, settings.max_side, SIDE, step=32, label="Size in pixels",
                                 min_width=240)  # fmt: skip
                frames = gr.Slider(
                    1, settings.max_frames, FRAMES, step=4, label="Frames", min_width=240
                )
                steps = gr.Slider(
                    1, settings.max_steps, STEPS, step=1, label="Steps", min_width=240
                )
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31 - 1)
            # Windows break a small model that was not trained for them.
            recipe = recipe_form(settings, "video", first="sage")
            with gr.Row():
                run = gr.Button("Generate both", variant="primary", elem_id="video-run")
                stop = gr.Button("Cancel", variant="stop", elem_id="video-cancel")
        with gr.Column(scale=3, min_width=300):
            said = gr.HTML(figures.status("Press “Generate both”."), elem_id="video-status")
            with gr.Row():
                films = [
                    gr.Video(label=label, autoplay=True, loop=True, interactive=False, min_width=200,
                             elem_id=f"video-{name}")
                    for label, name in (("Model alone", "stock"), ("visionfuse", "fused"))
                ]  # fmt: skip
            slider = gr.ImageSlider(label="The middle frame: model alone (left) and visionfuse (right)", format="png",
                                    interactive=False, elem_id="video-slider")  # fmt: skip
            numbers = gr.HTML(elem_id="video-figures")
            apart = gr.Video(
                label=f"Difference, {AMPLIFY} times", autoplay=True, loop=True, interactive=False
            )
            with gr.Accordion("What ran where", open=False):
                told = gr.Textbox(label="Report", lines=12, interactive=False)

    def compare(
        label,
        prompt,
        side,
        frames,
        steps,
        seed,
        recipe,
        request: gr.Request,
        progress=gr.Progress(),
    ):
        with user_errors(), jobs.job(request.session_hash) as check, TemporaryDirectory() as folder:
            within("Frames", frames, 1, settings.max_frames)
            asked = asked_for(settings, prompt, side, steps, seed, least=LEAST_SIDE)
            file = Path(folder) / "recipe.json"
            parsed(recipe, at_most=settings.max_recipe).save(file)
            wanted = wan.Request(
                model=settings.path("video", label),
                recipe=str(file),
                frames=int(frames),
                guidance=GUIDANCE.get(label),
                **asked,
            )
            wan.expect(wanted)
            progress(0, desc="reading the model")
            pipe = load(wanted.model)
            return _shown(
                wanted, *_both(pipe, wanted, check, progress), device=device_name(pipe.device)
            )

    def stopped(request: gr.Request) -> str:
        return figures.status(
            "Cancelled." if jobs.cancel(request.session_hash) else "Nothing was running."
        )

    started = gr.on(
        [run.click, prompt.submit], compare, [model, prompt, side, frames, steps, seed, recipe],
        [*films, slider, apart, said, numbers, told], api_name="video_compare", concurrency_id=MODEL,
        concurrency_limit=1, show_progress_on=films,
    )  # fmt: skip
    another.click(_caption, None, prompt, api_visibility="private", show_progress="hidden")
    gr.on(
        [run.click, prompt.submit], None, js=figures.look_at("video-status"), api_visibility="private",
        queue=False,
    )  # fmt: skip
    stop.click(stopped, None, said, cancels=[started], queue=False, api_name="video_cancel")


def _both(
    pipe: Any, request: wan.Request, check: Callable[[], None], progress: Callable[..., Any]
) -> tuple[tuple[Frames, float], tuple[Frames, float], Report, int]:
    """Frames and seconds, stock and with the recipe. Leaves the pipeline as it was, also after an error."""
    phase, steps = "model alone", request.steps or 1

    def count() -> None:
        check()
        step = pipe.scheduler.step_index or 0
        progress((step, steps), desc=f"{phase}, step {step + 1} of {steps}", unit="steps")

    with before_forwards(pipe.transformer, count):
        stock = timed(lambda: wan.frames_of(pipe, request))
        phase = "visionfuse"
        try:
            fused = timed(lambda: wan.generate(pipe, request))
            said = report(pipe)
        finally:
            pipe.disable_visionfuse()
    (a, a_seconds), (b, b_seconds) = (
        (_levels(frames), seconds) for frames, seconds in (stock, fused)
    )
    return (a, a_seconds), (b, b_seconds), said, len(pipe.scheduler.timesteps)


def _levels(frames: np.ndarray) -> Frames:
    return (np.asarray(frames) * 255).round().astype(np.uint8)


def _tall(frames: Frames) -> Image.Image:
    """All frames below one another, for what compares pictures."""
    return Image.fromarray(frames.reshape(-1, *frames.shape[2:]))


def _shown(
    request: wan.Request, stock, fused, said: Report, steps: int, *, device: str
) -> tuple[Any, ...]:
    (a, a_seconds), (b, b_seconds) = stock, fused
    change = difference(_tall(a), _tall(b))
    apart = np.asarray(amplified_difference(_tall(a), _tall(b))).reshape(a.shape)
    words = [
        figures.speed(a_seconds, b_seconds), figures.work(said, steps), figures.change(change, "videos"),
    ]  # fmt: skip
    rows = [
        ("time", f"{a_seconds:.2f} s", f"{b_seconds:.2f} s"),
        ("speed-up", "1.00x", f"{a_seconds / b_seconds:.2f}x"),
        ("density", "100%", figures.density(said)),
        ("PSNR", "", change.psnr_text),
        ("mean difference", "", f"{change.mean:.2f} of 255"),
        ("caption right", *(_fidelity(frames, request.prompt) for frames in (a, b))),
    ]
    caption = f"{a.shape[0]} frames of {a.shape[2]}x{a.shape[1]} on {device}"
    middle = len(a) // 2
    return (
        _film(a), _film(b), (Image.fromarray(a[middle]), Image.fromarray(b[middle])), _film(apart),
        figures.status(" ".join(words)), figures.table(rows, HEAD, caption=caption), str(said),
    )  # fmt: skip


def _fidelity(frames: Frames, caption: str) -> str:
    """Whether OpenCV reads the caption in the video; only captions of the shapes data set can be read."""
    try:
        clip = parse_clip(caption)
    except ValueError:
        return "unknown: no caption of shapes"
    verdict = judge_clip(list(frames), clip)
    return "yes" if verdict.right else f"no: {verdict.reason}"


def _caption() -> str:
    return random.choice(held_out_clips(64)).text


def _film(frames: Frames) -> str:
    """An MP4 in the folder that Gradio serves from, and empties."""
    folder = Path(get_upload_folder())
    folder.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(suffix=".mp4", dir=folder, delete=False) as file:
        return export_to_video([frame / 255 for frame in frames], file.name, fps=RATE)

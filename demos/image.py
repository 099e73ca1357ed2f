"""The picture tab: one prompt and seed, as the model is and with a recipe, side by side."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import gradio as gr
from diffusers import FluxPipeline
from PIL import Image

from visionfuse.kernels.plan import Local
from visionfuse.pipelines import flux
from visionfuse.pipelines.compare import AMPLIFY, amplified_difference
from visionfuse.shapes import held_out_scenes, parse, score
from visionfuse.sites import denoisers

from . import figures
from .form import recipe_form
from .jobs import MODEL, Jobs, Loaded, before_forwards, user_errors, within
from .recipes import parsed
from .settings import Settings

PROMPT = "a large red circle above a small blue square on a white background"
LEAST_SIDE, SIDE = 128, 256
STEPS = 12
WARM_UP = 2  # forwards: one step of each
TEXT = {"flux-micro": 64}  # tokens that it was trained with; other models have their pipeline's 512
SHOW = {"both": 50, "the model alone": 100, "visionfuse": 0}
HEAD = ("", "model alone", "visionfuse")


def image_tab(settings: Settings, jobs: Jobs, load: Loaded) -> None:
    labels = list(settings.models["image"])
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            prompt = gr.Textbox(
                PROMPT, label="What to draw", lines=2, max_length=settings.max_prompt, elem_id="image-prompt",
                info="The shipped model draws shapes, at 256 and 512 pixels: two small red circles above a large blue star ...",
            )  # fmt: skip
            another = gr.Button("Another caption", size="sm")
            model = gr.Dropdown(labels, value=labels[0], label="Model", visible=len(labels) > 1)
            with gr.Row():
                side = gr.Slider(LEAST_SIDE, settings.max_side, SIDE, step=128, label="Size in pixels",
                                 min_width=240)  # fmt: skip
                steps = gr.Slider(
                    1, settings.max_steps, STEPS, step=1, label="Steps", min_width=240
                )
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31 - 1)
            recipe = recipe_form(settings, "image")
            with gr.Row():
                run = gr.Button("Generate both", variant="primary", elem_id="image-run")
                stop = gr.Button("Cancel", variant="stop", elem_id="image-cancel")
        with gr.Column(scale=3, min_width=300):
            said = gr.HTML(figures.status("Press “Generate both”."), elem_id="image-status")
            slider = gr.ImageSlider(
                label="Model alone (left) and visionfuse (right)", format="png", interactive=False,
                elem_id="image-slider", max_height=640, buttons=["download", "fullscreen"],
            )  # fmt: skip
            show = gr.Radio(list(SHOW), value="both", label="Show", elem_id="image-show")
            numbers = gr.HTML(elem_id="image-figures")
            apart = gr.Image(
                label=f"Difference, {AMPLIFY} times", format="png", interactive=False, elem_id="image-difference",
                alt_text="Where the two pictures differ; black where they are equal", buttons=["download"],
            )  # fmt: skip
            with gr.Accordion("What ran where", open=False):
                report = gr.Textbox(label="Report", lines=12, interactive=False)

    def compare(
        label, prompt, side, steps, seed, recipe, request: gr.Request, progress=gr.Progress()
    ):
        with user_errors(), jobs.job(request.session_hash) as check:
            asked = asked_for(settings, prompt, side, steps, seed)
            mine = parsed(recipe, at_most=settings.max_recipe)
            wanted = flux.Request(
                model=settings.path("image", label), recipe=mine, max_sequence_length=TEXT.get(label), **asked,
            )  # fmt: skip
            progress(0, desc="reading the model")
            pipe = load(wanted.model)
            if isinstance(pipe, FluxPipeline):
                flux.expect(wanted)
            elif isinstance(mine.plan, Local):
                raise ValueError(
                    "Only FLUX makes pictures in two stages here; choose another recipe."
                )
            with before_forwards(
                next(denoisers(pipe)).model, _counted(check, progress, int(steps))
            ):
                return _shown(flux.compare(pipe, wanted))

    def stopped(request: gr.Request) -> str:
        return figures.status(
            "Cancelled." if jobs.cancel(request.session_hash) else "Nothing was running."
        )

    outputs = [slider, apart, said, numbers, report]
    started = gr.on(
        [run.click, prompt.submit], compare, [model, prompt, side, steps, seed, recipe], outputs,
        api_name="image_compare", concurrency_id=MODEL, concurrency_limit=1, show_progress_on=[slider],
    )  # fmt: skip
    gr.on(
        [run.click, prompt.submit],
        None,
        js=figures.look_at("image-status"),
        api_visibility="private",
        queue=False,
    )
    stop.click(stopped, None, said, cancels=[started], queue=False, api_name="image_cancel")
    another.click(_caption, None, prompt, api_visibility="private", show_progress="hidden")
    show.input(lambda name: gr.update(slider_position=SHOW[name]), show, slider,
               api_visibility="private", show_progress="hidden", queue=False)  # fmt: skip


def asked_for(
    settings: Settings,
    prompt: str,
    side: float,
    steps: float,
    seed: float,
    *,
    least: int = LEAST_SIDE,
) -> dict[str, Any]:
    """The visitor's values, checked once more here: a page can be by-passed. Raises ValueError."""
    within("Size", side, least, settings.max_side)
    within("Steps", steps, 1, settings.max_steps)
    within("Seed", seed, 0, 2**31 - 1)
    within("The characters of a prompt", len(prompt), 1, settings.max_prompt)
    return {
        "prompt": prompt, "height": int(side), "width": int(side), "steps": int(steps), "seed": int(seed),
    }  # fmt: skip


def _counted(
    check: Callable[[], None], progress: Callable[..., Any], steps: int
) -> Callable[[], None]:
    """Called before every forward of a comparison: ends a cancelled one, tells how far it is."""
    phases = ["warming up"] * WARM_UP
    for name in ("model alone", "visionfuse"):
        phases += [f"{name}, step {step + 1} of {steps}" for step in range(steps)]
    done = 0

    def count() -> None:
        nonlocal done
        check()
        now = min(done, len(phases) - 1)  # two stages have more forwards
        progress((now, len(phases)), desc=phases[now], unit="forwards")
        done += 1

    return count


def _shown(result: flux.Comparison) -> tuple[Any, ...]:
    words = [
        figures.speed(result.stock_seconds, result.fused_seconds),
        figures.work(result.report, result.steps),
        figures.change(result.change, "pictures"),
    ]
    rows = [
        ("time", f"{result.stock_seconds:.2f} s", f"{result.fused_seconds:.2f} s"),
        ("speed-up", "1.00x", f"{result.speedup:.2f}x"),
        ("density", "100%", figures.density(result.report)),
        ("PSNR", "", result.change.psnr_text),
        ("SSIM", "", f"{result.change.ssim:.4f}"),
        (
            "caption right",
            *(_fidelity(image, result.request.prompt) for image in (result.stock, result.fused)),
        ),
    ]
    return (
        (result.stock, result.fused),
        amplified_difference(result.stock, result.fused),
        figures.status(" ".join(words)),
        figures.table(
            rows, HEAD, caption=f"{result.stock.width}x{result.stock.height} on {result.device}"
        ),
        str(result.report),
    )


def _fidelity(image: Image.Image, caption: str) -> str:
    """Whether OpenCV reads the caption in the picture; only captions of the shapes data set can be read."""
    try:
        parse(caption)
    except ValueError:
        return "unknown: no caption of shapes"
    (verdict,) = score([image], [caption])
    return "yes" if verdict.right else f"no: {verdict.reason}"


def _caption() -> str:
    return random.choice(held_out_scenes(64)).text

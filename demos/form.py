"""The recipe of a tab: controls that write JSON, JSON to copy, edit, upload and download. What runs is the JSON."""

from __future__ import annotations

from typing import Any

import gradio as gr

from visionfuse.recipes import options_of

from .jobs import user_errors
from .recipes import CONTROLS, DEFAULT, FORMATS, STRIDES, about, names, uploaded, written
from .settings import Settings


def recipe_form(settings: Settings, tab: str, first: str = DEFAULT) -> gr.Code:
    """Draws the form and returns the component that holds the JSON. tab: makes names of the API unique. first: the
    recipe that it begins with."""
    name = gr.Dropdown(names(), value=first, label="Recipe", info=about(first))
    controls = _controls(first)
    with gr.Accordion("Recipe as JSON: copy, edit, upload, download", open=False):
        text = gr.Code(
            written(first, **CONTROLS), language="json", label="Recipe (JSON). This is what runs.",
            interactive=True, max_lines=18, buttons=["copy", "download"], elem_id=f"{tab}-recipe",
        )  # fmt: skip
        upload = gr.UploadButton(
            "Upload a recipe (.json)", file_types=[".json"], size="sm", elem_id=f"{tab}-upload"
        )

    def write(name: str, *values: Any) -> str:
        with user_errors():
            return written(name, **dict(zip(CONTROLS, values, strict=True)))

    def show(name: str) -> list[Any]:
        visible = [gr.update(visible=control in options_of(name)) for control in CONTROLS]
        return [gr.update(info=about(name)), *visible]

    def receive(path: str | None) -> str:
        with user_errors():
            return uploaded(path, at_most=settings.max_recipe)

    name.input(show, name, [name, *controls], api_visibility="private", show_progress="hidden")
    gr.on(
        [part.input for part in (name, *controls)], write, [name, *controls], text,
        api_name=f"{tab}_recipe", show_progress="hidden", trigger_mode="always_last",
    )  # fmt: skip
    upload.upload(receive, upload, text, api_name=f"{tab}_upload", show_progress_on=upload)
    return text


def _controls(recipe: str) -> list[Any]:
    """One for every name of CONTROLS, in that order; those that `recipe` has are visible."""
    known = options_of(recipe)
    density = gr.Slider(
        0.05, 1, CONTROLS["density"], step=0.05, label="Density", visible="density" in known,
        info="Share of the picture that a token looks at. Less is faster and less exact.",
    )  # fmt: skip
    stride = gr.Dropdown(
        list(STRIDES), value=CONTROLS["stride"], label="Stride", visible="stride" in known,
        info="Tokens that share a window. More is faster; auto follows the size.",
    )  # fmt: skip
    dense_start = gr.Slider(
        0, 1, CONTROLS["dense_start"], step=0.02, label="Exact steps at the start", visible="dense_start" in known,
        info="Share of the run. The first steps decide where things are.",
    )  # fmt: skip
    precision = gr.Dropdown(
        list(FORMATS), value=CONTROLS["precision"], label="Number format", visible="precision" in known,
        info="model: as the model has it. Without a GPU the others are emulated: same quality, slower.",
    )  # fmt: skip
    qk = gr.Dropdown(
        ["int8", "int4", "fp8"], value=CONTROLS["qk"], label="Format of queries and keys", visible="qk" in known,
    )  # fmt: skip
    return [density, stride, dense_start, precision, qk]

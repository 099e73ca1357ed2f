"""The explorer tab: what a window, a stride and an order do to a grid of tokens, live."""

from __future__ import annotations

from math import prod
from typing import Any

import gradio as gr

from visionfuse.kernels.order import Order
from visionfuse.kernels.plan import Neighborhood
from visionfuse.presets import PRESETS, named
from visionfuse.simulate.gpus import MEASURED

from . import figures, plans
from .jobs import user_errors, within
from .settings import Settings

GRID, WINDOW, STRIDE, TEXT = "64x64", "24x24", "8x8", 128
ORDERS = ("auto", "row", "tiled", "hilbert")
OWN_CHOICE = "none: my own"
AXES = ("frame", "row", "column")
LEGEND = (
    ("the chosen token", plans.TOKEN), ("its tile: tokens multiplied together", plans.OWN),
    ("of its tile, seen too", plans.OWN_SEEN),
    ("keys that it sees", plans.VISIBLE), ("keys that its tile visits, masked for this token", plans.VISITED),
    ("not visited: no work", plans.UNSEEN),
)  # fmt: skip
BLOCKS = (
    ("full block: no mask", plans.FULL), ("partial block: with a mask", plans.PARTIAL),
    ("not visited: no work", plans.NONE),
)  # fmt: skip
DERIVED = (
    "Derived: our kernels were not timed on that GPU. An H100 computes as an H200 does; the others have the portable kernel's "
    "share of their published peak."
)


def explorer_tab(app: gr.Blocks, settings: Settings) -> None:
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            preset = gr.Dropdown(
                [OWN_CHOICE, *(p.name for p in PRESETS)], value=OWN_CHOICE, label="Start from a preset",
                info="Windows of the GNA paper, and some that are fast by prediction.",
            )  # fmt: skip
            with gr.Row():
                grid = gr.Textbox(GRID, label="Grid of tokens", max_length=32, elem_id="explorer-grid", min_width=130,
                                  info="Rows x columns, or frames first. A FLUX token is 16x16 pixels.")  # fmt: skip
                text = gr.Number(TEXT, label="Text tokens", precision=0, minimum=0, maximum=4096, min_width=130,
                                 info="They see everything and are seen by everything.")  # fmt: skip
            with gr.Row():
                window = gr.Textbox(WINDOW, label="Window", max_length=32, elem_id="explorer-window", min_width=130,
                                    info="Keys that a token sees on each axis; - is all of it.")  # fmt: skip
                stride = gr.Textbox(STRIDE, label="Stride", max_length=32, info="Tokens that share a window.",
                                    min_width=130)  # fmt: skip
            with gr.Row():
                dilation = gr.Textbox(
                    "1", label="Dilation", max_length=32, info="Steps between keys.", min_width=130
                )
                order = gr.Dropdown(list(ORDERS), value="auto", label="Order", min_width=130,
                                    info="How tokens lie in memory. auto: the least work.")  # fmt: skip
            with gr.Row():
                token = [
                    gr.Number(value, label=f"Token: {name}", precision=0, minimum=0, min_width=80)
                    for name, value in zip(AXES, (0, 20, 30), strict=True)
                ]
        with gr.Column(scale=3, min_width=300):
            said = gr.HTML(elem_id="explorer-status")
            gr.HTML(figures.heading("What the token sees (click another one)"))
            seen = figures.picture(
                "The grid of tokens; the colours are named below", elem_id="explorer-token"
            )
            gr.HTML(_legend(LEGEND))
            gr.HTML(
                figures.heading(
                    "Blocks: a row for every tile of queries, a column for every run of keys"
                )
            )
            blocks = figures.picture(
                "Which blocks are visited; the text above has their numbers",
                elem_id="explorer-blocks",
            )
            gr.HTML(_legend(BLOCKS))
            times = gr.HTML(elem_id="explorer-speeds")

    def explore(grid, window, stride, dilation, order, text, frame, row, column):
        with user_errors():
            asked = _asked(settings, grid, window, stride, dilation, order, text)
            chosen = _token(asked.grid, (frame, row, column))
            return _shown(asked, chosen)

    def start_from(name):
        if name == OWN_CHOICE:
            return [gr.skip()] * 6
        found = named(name)
        sizes = ["x".join(map(str, values)) for values in (found.grid, found.window, found.stride)]
        middle = [n // 2 for n in (0,) * (3 - len(found.grid)) + found.grid]
        return [*sizes, *middle]

    def clicked(grid, event: gr.SelectData):
        with user_errors():
            found = plans.Sheet(_sizes(grid, "The grid")).token(*event.index)
            return found or [gr.skip()] * 3

    values = [grid, window, stride, dilation, order, text, *token]
    shown = [said, seen, blocks, times]
    changed: Any = {"fn": explore, "inputs": values, "outputs": shown, "show_progress": "hidden"}
    gr.on([part.input for part in (order, text, *token)] + [part.submit for part in values[:4]]
          + [part.blur for part in values[:4]], api_name="explore", trigger_mode="always_last",
          **changed)  # fmt: skip
    preset.input(start_from, preset, [grid, window, stride, *token], api_visibility="private").then(
        api_visibility="private", **changed
    )
    seen.select(clicked, grid, token, api_visibility="private", show_progress="hidden").then(
        api_visibility="private", **changed
    )
    app.load(api_visibility="private", **changed)


def _sizes(text: str, name: str) -> tuple[int, ...]:
    from visionfuse.cli import parse_shape

    return parse_shape(text.strip(), name)


def _asked(settings: Settings, grid, window, stride, dilation, order, text) -> plans.Asked:
    from visionfuse.cli import parse_value

    sizes = _sizes(grid, "The grid")
    within("The tokens of a grid", prod(sizes), 1, settings.max_tokens)
    within("Text tokens", text, 0, 4096)
    words = {"window": window, "stride": stride, "dilation": dilation}
    parts = {name: parse_value(value.strip()) for name, value in words.items()}
    for name, value in parts.items():
        if not isinstance(value, (int, tuple)) and not (name == "window" and value is None):
            raise ValueError(f"{name} takes sizes such as 12x12 or 8, not {words[name]!r}.")
    if parts["window"] is None:  # "-", the whole grid
        parts["window"] = (None,) * len(sizes)
    spec = Neighborhood(**parts)
    spec.resolve(sizes)
    return plans.Asked(grid=sizes, spec=spec, order=Order(kind=order), text=int(text))


def _token(grid: tuple[int, ...], chosen: tuple[float, ...]) -> tuple[int, ...]:
    """The chosen token, moved into the grid where it lies outside."""
    own = chosen[3 - len(grid) :]
    return tuple(min(max(0, int(c or 0)), n - 1) for c, n in zip(own, grid, strict=True))


def _shown(asked: plans.Asked, token: tuple[int, ...]) -> tuple[Any, ...]:
    made, rule = plans.plan(asked), asked.rule
    blocks = made.blocks
    full, partial = blocks.full.start.numel(), blocks.partial.start.numel()
    tile = "x".join(map(str, made.order.tile)) if made.order.tile else "rows"
    kind = made.order.kind
    words = (
        f"Token {token} of {asked.grid} sees {plans.visible(rule, token).sum():,} of {prod(asked.grid):,} tokens. Density "
        f"{blocks.density:.1%} of all pairs, text included; {blocks.visited_density:.1%} are visited, in {full:,} full "
        f"and {partial:,} partial blocks. Order: {kind}, {tile}."
    )
    rows = [
        (_named(each), f"{each.ms:.3g} ms", f"{each.dense / each.ms:.2f}x",
         f"{each.cudnn / each.ms:.2f}x" if each.cudnn else "unknown")
        for each in plans.speeds(asked)
    ]  # fmt: skip
    caption = (
        f"Predicted for 24 heads of 128 channels. Counting pairs alone: {1 / blocks.density:.2f}x"
    )
    head = ("", "time", "against the same kernel, dense", "against cuDNN")
    times = figures.table(rows, head, caption=caption) + f"<p>{DERIVED}</p>"
    return (
        figures.status(words), plans.picture_of_token(asked, token), plans.picture_of_blocks(made),
        times,
    )  # fmt: skip


def _named(speed: plans.Speed) -> str:
    kind = "16 bits" if speed.precision == "model" else speed.precision
    how = "" if speed.gpu.basis == MEASURED else " (derived)"
    return f"{speed.gpu.name.removeprefix('NVIDIA ')}, {speed.impl}, {kind}{how}"


def _legend(entries) -> str:
    parts = "".join(
        f'<li><span style="background:rgb{color}" aria-hidden="true"></span>{name}</li>'
        for name, color in entries
    )
    return f'<ul class="vf-legend">{parts}</ul>'

"""What a comparison says in words and in a table that a screen reader can read."""

from __future__ import annotations

from html import escape

import gradio as gr

from visionfuse.pipelines.compare import Difference
from visionfuse.reporting import Report

SMALL_GAIN = 1.1
HINT = "With few tokens attention is a small part of the work, and without a GPU 8 bits are emulated, which takes longer."


def table(rows: list[tuple[str, ...]], head: tuple[str, ...] = (), *, caption: str) -> str:
    """HTML of rows whose first cell is their name."""
    top = "".join(f'<th scope="col">{escape(cell)}</th>' if cell else "<td></td>" for cell in head)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{escape(c)}</td>" for c in cells)}</tr>'
        for name, *cells in rows
    )
    head_row = f"<thead><tr>{top}</tr></thead>" if head else ""
    return (
        f'<table class="vf-figures"><caption>{escape(caption)}</caption>'
        f"{head_row}<tbody>{body}</tbody></table>"
    )


def heading(text: str) -> str:
    return f'<h2 class="vf-heading">{escape(text)}</h2>'


def status(text: str) -> str:
    """Text that a screen reader says when it changes."""
    return f'<p class="vf-status" role="status" aria-live="polite">{escape(text)}</p>'


def speed(stock: float, fused: float) -> str:
    words = f"visionfuse took {fused:.2f} s, the model alone {stock:.2f} s: {stock / fused:.2f}x."
    return words if stock > SMALL_GAIN * fused else f"{words} {HINT}"


def work(said: Report, steps: int) -> str:
    """How much attention did, in words."""
    shares = densities(said)
    if not shares or said.recipe is None:
        return "Attention met every pair of tokens in all steps."
    if len(shares) > 1:
        listed = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
        return f"Attention met different shares of the pairs of tokens in turn: {listed}."
    planned = steps - said.recipe.schedule.first_step(steps)
    (share,) = shares.values()
    return f"In {planned} of {steps} steps attention met {share:.0%} of all pairs of tokens."


def densities(said: Report) -> dict[str, float]:
    """Of the first denoiser, by variant, of those that ran."""
    variants = said.denoisers[0].variants if said.denoisers else ()
    return {each.name: each.density for each in variants if each.density is not None}


def density(said: Report) -> str:
    return ", ".join(f"{share:.1%}" for share in densities(said).values()) or "100%"


def change(difference: Difference, what: str) -> str:
    if not difference.largest:
        return f"Both {what} are equal, bit by bit."
    return (
        f"The {what} differ by {difference.mean:.2f} of 255 levels on average, PSNR {difference.psnr:.1f} dB "
        "(from about 40 dB on, differences are hard to see)."
    )


def look_at(elem_id: str) -> str:
    """JavaScript that brings it into view: on a phone, results are below the form."""
    return f"() => document.getElementById('{elem_id}').scrollIntoView({{block: 'start'}})"


def picture(alt_text: str, *, elem_id: str) -> gr.Image:
    """A picture without Gradio's label, which would hide a corner of it; a heading above says what it is."""
    return gr.Image(
        show_label=False, format="png", interactive=False, elem_id=elem_id, alt_text=alt_text,
        buttons=["download", "fullscreen"],
    )  # fmt: skip

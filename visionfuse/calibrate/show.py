"""What a calibration found: a table for the terminal, and a picture of every error by layer and step."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import numpy as np

from ..schedule import STOCK
from .run import Calibrated, Part


def rows(found: Calibrated) -> list[tuple[str, ...]]:
    """Per phase and class of blocks: steps, blocks, what runs, time against stock, error of attention, share of
    the predicted error of the picture."""
    total = max(found.chosen.selection.error, 1e-30)
    out = []
    for part, chosen in zip(found.parts, found.chosen.selection.variants, strict=True):
        errors = part.rel_l1[np.arange(len(chosen)), list(chosen)]
        own = sum(part.times[v] for v in chosen)
        out.append(
            (
                f"{part.steps[0]}-{part.steps[1] - 1}",
                part.block,
                _what(part, chosen),
                f"{own / (part.times[0] * len(chosen)):.0%}",
                f"{errors.mean():.4f}",
                f"{(part.weights[list(chosen)] * errors).sum() / total:.0%}",
            )
        )
    return out


def _what(part: Part, chosen: tuple[int, ...]) -> str:
    counts = {part.names[v]: chosen.count(v) for v in dict.fromkeys(sorted(chosen))}
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{name} ({n})" for name, n in counts.items())


def table(found: Calibrated):
    """Everything needed to judge a recipe, as a table of rich."""
    from rich.table import Table

    shown = Table(title=f"{found.recipe.name}: what runs", title_justify="left")
    for name in ("steps", "blocks"):
        shown.add_column(name, no_wrap=True)
    shown.add_column("variant (layers)")
    for name in ("time of stock", "rel. L1", "share of error"):
        shown.add_column(name, justify="right")
    before = None
    for row in rows(found):
        if before not in (None, row[0]):
            shown.add_section()
        before = row[0]
        shown.add_row(*row)
    return shown


def lines(found: Calibrated, gpu: str) -> list[str]:
    """The sums below the table."""
    how = "measured on" if found.measured_times else "predicted for"
    out = [
        f"Attention of a run, {how} {gpu}: {found.ms:.3g} ms, stock {found.stock_ms:.3g} ms, "
        f"{found.stock_ms / found.ms:.2f}x",
        f"PSNR to stock: {found.chosen.psnr:.1f} dB on the measured prompts, budget {found.budget:g} dB"
        + (
            f"; {fmean(found.held_out):.1f} dB on {len(found.held_out)} held-out prompts "
            f"({min(found.held_out):.1f} to {max(found.held_out):.1f})"
            if found.held_out
            else ""
        ),
        "Predicted and measured, every recipe that was tried: "
        + ", ".join(f"{t.predicted:.1f} and {t.psnr:.1f} dB" for t in found.tries),
    ]
    return out + [f"Left out: {name}: {why}" for name, why in found.left_out.items()]


def plot(found: Calibrated, candidates: list[str], path: Path) -> None:
    """A map of relative L1 by layer and step for every candidate, and what was chosen. Needs matplotlib."""
    try:
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "--plot needs matplotlib, which is not installed: pip install matplotlib"
        ) from error
    errors = found.errors.rel_l1
    measured = [i for i in range(len(candidates)) if not np.isnan(errors[i]).all()]
    columns = min(3, len(measured) + 1)
    count = -(-(len(measured) + 1) // columns)
    figure = Figure(figsize=(4.2 * columns, 0.9 + 2.4 * count), layout="constrained")
    axes = figure.subplots(count, columns, squeeze=False, sharex=True, sharey=True).ravel()
    known = errors[measured][errors[measured] > 0]
    norm = LogNorm(vmin=float(np.nanmin(known)), vmax=float(np.nanmax(known)))
    image = None
    for ax, index in zip(axes, measured, strict=False):
        image = ax.imshow(errors[index], aspect="auto", norm=norm, cmap="viridis", origin="lower")
        ax.set_title(candidates[index], fontsize=9)
    if image is not None:
        bar = figure.colorbar(image, ax=axes.tolist(), shrink=0.8)
        bar.set_label("relative L1 error of attention")
    _plot_choice(axes[len(measured)], found)
    for ax in axes[len(measured) + 1 :]:
        ax.set_visible(False)
    for ax in axes[-columns:]:
        ax.set_xlabel("step")
    for ax in axes[::columns]:
        ax.set_ylabel("layer")
    figure.savefig(path, dpi=110)


def _plot_choice(ax, found: Calibrated) -> None:
    from matplotlib import colormaps
    from matplotlib.patches import Patch

    names = [STOCK, *(v.name for v in found.recipe.variants)]
    layers, steps = found.errors.rel_l1.shape[1:]
    chosen = np.zeros((layers, steps), dtype=int)
    for part, own in zip(found.parts, found.chosen.selection.variants, strict=True):
        for layer, variant in zip(part.layers, own, strict=True):
            chosen[layer, slice(*part.steps)] = names.index(part.names[variant])
    colours = colormaps["tab10"]
    ax.imshow(chosen, aspect="auto", cmap=colours, vmin=0, vmax=9, origin="lower")
    ax.set_title("chosen", fontsize=9)
    patches = [Patch(color=colours(i), label=name) for i, name in enumerate(names)]
    ax.legend(handles=patches, fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)

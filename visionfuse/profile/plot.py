"""A step and what recipes leave of it, as stacked bars."""

from __future__ import annotations

from pathlib import Path

from .measure import PARTS, Profile
from .predict import Saving


def stacked(found: Profile, saved: list[Saving], path: Path) -> None:
    """A bar for the step, and one for every way with its predicted parts; a diamond where it was measured."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("--plot needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    bars = {"stock": found.parts, **{s.way.name: s.parts for s in saved}}
    names = list(bars)[::-1]  # the first one on top
    figure, axes = plt.subplots(figsize=(8, 1 + 0.45 * len(bars)), layout="constrained")
    left = [0.0] * len(names)
    for part in PARTS:
        widths = [bars[name][part] for name in names]
        axes.barh(names, widths, left=left, label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    ran = {s.way.name: s.measured_ms for s in saved if s.measured_ms is not None}
    if ran:
        axes.plot(list(ran.values()), list(ran), "D", color="black", ms=5, label="measured")
    size = "x".join(map(str, found.size))
    axes.set(xlabel="ms a step", title=f"{found.name} {size}: measured, and predicted for recipes")
    figure.legend(ncols=5, fontsize="small", loc="outside lower center")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)

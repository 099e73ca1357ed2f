"""Pictures of the simulator: predicted speed-up by density, and predicted by measured time."""

from __future__ import annotations

from pathlib import Path

from .measured import Prediction
from .model import Setting, Simulation


def speedup_by_density(found: list[Simulation], setting: Setting, path: Path) -> None:
    """Every window that was found, and the line of those that no other beats in both. The dashed line is what
    counting FLOPs promises."""
    plt = _pyplot()
    from matplotlib.ticker import LogLocator

    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    points = sorted((one.density, one.dense_ms / one.ms) for one in found)
    best, front = 0.0, []
    for density, speedup in points[::-1]:  # from the densest down
        if speedup > best:
            best = speedup
            front.append((density, speedup))
    axes.plot(*zip(*points, strict=True), "o", ms=3, alpha=0.5, label="found")
    axes.plot(*zip(*front, strict=True), "-", lw=1.5, label="Pareto front")
    xs = [0.01 * i for i in range(max(1, int(100 * points[0][0])), 101)]
    axes.plot(xs, [1 / x for x in xs], "--", color="grey", lw=1, label="by FLOPs")
    axes.set(
        xscale="log", yscale="log", xlabel="density: visible pairs of all pairs",
        ylabel=f"speed-up over dense {setting.impl}",
        title=f"{'x'.join(map(str, setting.grid))}, {_bits(setting.precision)}, {setting.gpu.name}, predicted",
    )  # fmt: skip
    for axis, form in ((axes.xaxis, "{x:.0%}"), (axes.yaxis, "{x:g}x")):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(form)
        axis.set_minor_formatter("")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def predicted_by_measured(found: list[Prediction], path: Path) -> None:
    """Predicted over measured time of every kernel, in the band of 10%: dots by the constants in use, rings by a
    fit that did not see the row. cuDNN's rows are left out."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    shown = [one for one in found if one.row.plan is not None]
    groups = dict.fromkeys((one.row.impl, one.row.precision, one.row.head_dim) for one in shown)
    for number, group in enumerate(groups):
        own = [one for one in shown if (one.row.impl, one.row.precision, one.row.head_dim) == group]
        times = [one.row.ms for one in own]
        impl, precision, head_dim = group
        label = f"{impl}, {_bits(precision)}, head dim {head_dim}"
        axes.plot(times, [1 + one.error for one in own], "o", ms=4, color=f"C{number}", label=label)
        rings = [(one.row.ms, 1 + e) for one in own if (e := one.error_left_out) is not None]
        if rings:
            axes.plot(
                *zip(*rings, strict=True), "o", ms=7, mfc="none", alpha=0.6, color=f"C{number}"
            )
    axes.axhspan(0.9, 1.1, color="grey", alpha=0.15, lw=0)
    axes.axhline(1, color="grey", lw=1)
    axes.set(xscale="log", xlabel="measured, ms", ylabel="predicted / measured")
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.85), max(high, 1.15))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small", ncols=2)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _bits(precision: str) -> str:
    return "16 bits" if precision == "model" else precision


def _pyplot():
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("--plot needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot

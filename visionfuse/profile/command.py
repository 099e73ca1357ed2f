"""`visionfuse profile`: the options, the table, the CSV. What it imports, it imports when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from ..bench.table import Row
    from .measure import Profile
    from .predict import Saving


def profile(
    model: Annotated[
        str,
        typer.Argument(
            help="flux.1-dev, wan2.1-1.3b, wan2.1-14b, hunyuan, qwen-image, a folder or Hub name of a diffusers "
            "pipeline (its configuration alone is read), or a model of timm."
        ),
    ],
    size: Annotated[
        str | None, typer.Option(help="Pixels: 1024x1024, or rows x columns x frames: 720x1280x81.")
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option(help="Run so many of each kind of block, and count the rest.", min=1),
    ] = None,
    batch: Annotated[int, typer.Option(help="Batch.", min=1)] = 1,
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Also run what the recipes save, besides predicting it."),
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="A picture: stacked bars.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write the rows into this file.")] = None,
    commit: Annotated[str, typer.Option(help="For a copy of the tree without git.")] = "",
    device: Annotated[str | None, typer.Option(help="cuda or cpu.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32.")] = None,
) -> None:
    """Where a denoising step goes, with random weights, and what each recipe would save of it."""
    from rich.console import Console
    from rich.markup import escape

    try:
        import torch

        from ..bench.table import update_csv
        from ..info import default_device, default_dtype
        from .measure import profile as take_apart
        from .models import named, subject
        from .predict import gpu_of, savings

        place = default_device() if device is None else torch.device(device)
        made = subject(
            named(model),
            None if size is None else tuple(int(n) for n in size.split("x")),
            layers=layers, batch=batch, device=place,
            dtype=default_dtype(place) if dtype is None else getattr(torch, dtype),
        )  # fmt: skip
        found = take_apart(made)
        saved = savings(made, found, measure=measure)
        if plot:
            from .plot import stacked

            stacked(found, saved, plot)
        if csv:
            update_csv(rows(found, saved), csv, commit=commit)
    except (ValueError, OSError, ImportError, AttributeError) as error:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]Error:[/] {escape(str(error))}")
        raise typer.Exit(2) from error
    console = Console()
    console.print(_parts(found))
    if saved:
        console.print(_savings(found, saved, f"predicted for one {gpu_of(made.device).name}"))
    for saving in saved:
        if saving.reason:
            console.print(f"{saving.way.name}: {saving.reason}", highlight=False, soft_wrap=True)


def case(found: Profile) -> str:
    return f"{found.name} {'x'.join(map(str, found.size))}"


def rows(found: Profile, saved: list[Saving]) -> list[Row]:
    """In the schema of all benchmarks: the step, its parts, and what every way leaves of it."""
    from ..bench.table import Row

    def row(impl: str, ms: float, note: str = "", **more) -> Row:
        return Row(suite="profile", case=case(found), impl=impl, ms=ms, note=note, **more)

    made = [row("step", found.ms, peak_gib=found.peak_gib)]
    for part, ms in found.parts.items():
        made.append(row(f"part: {part}", ms, f"{ms / found.ms:.1%}, {found.kernels[part]} kernels"))
    for saving in saved:
        name = saving.way.name
        facts = {"recipe": saving.way.recipe, "baseline": "step"}
        ms = saving.predicted_ms
        made.append(row(f"{name}, predicted", ms, speedup=found.ms / ms, **facts))
        if saving.measured_ms is not None:
            ms = saving.measured_ms
            made.append(row(name, ms, saving.reason, speedup=found.ms / ms, **facts))
    return made


def _parts(found: Profile) -> Table:
    from rich.table import Table

    memory = "" if found.peak_gib is None else f", {found.peak_gib:.1f} GiB at most"
    table = Table("part", title=f"{case(found)}: a step of {found.ms:.4g} ms{memory}")
    for name in ("ms", "share", "kernels"):
        table.add_column(name, justify="right")
    for part, ms in found.parts.items():
        table.add_row(part, f"{ms:.4g}", f"{ms / found.ms:.1%}", str(found.kernels[part]))
    return table


def _savings(found: Profile, saved: list[Saving], title: str) -> Table:
    from rich.table import Table

    table = Table("what", title=f"What is left of it, {title}")
    measured = any(s.measured_ms is not None for s in saved)
    for name in ("predicted ms", "speed-up", *(("measured ms", "speed-up") if measured else ())):
        table.add_column(name, justify="right")
    for saving in saved:
        cells = [f"{saving.predicted_ms:.4g}", f"{found.ms / saving.predicted_ms:.2f}x"]
        if measured:
            ms = saving.measured_ms
            cells += ["", ""] if ms is None else [f"{ms:.4g}", f"{found.ms / ms:.2f}x"]
        table.add_row(saving.way.name, *cells)
    return table

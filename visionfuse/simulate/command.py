"""`visionfuse simulate`: the options and the tables. What they import, they import when they run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from .measured import Measured
    from .model import Setting, Simulation, TileCount
    from .search import Wanted

_CALL, _SEARCH, _OUTPUT = "The call", "Search", "Output"


def simulate(
    grid: Annotated[
        str | None, typer.Option(help="Token grid: 256x256, or frames first: 21x45x80.")
    ] = None,
    window: Annotated[str | None, typer.Option(help="Keys a query sees per axis.")] = None,
    stride: Annotated[str | None, typer.Option(help="Queries that share a window.")] = None,
    dilation: Annotated[str | None, typer.Option(help="Steps between keys.")] = None,
    density: Annotated[
        float | None, typer.Option(help="Instead of a window: the share of the grid a query sees.")
    ] = None,
    q_tile: Annotated[
        str | None, typer.Option(help="Count tiles of these sizes, as the GNA paper does.")
    ] = None,
    kv_tile: Annotated[str | None, typer.Option(help="The same for keys.")] = None,
    text: Annotated[
        int, typer.Option(help="Text tokens that everything sees.", min=0, rich_help_panel=_CALL)
    ] = 0,
    heads: Annotated[int, typer.Option(help="Heads.", min=1, rich_help_panel=_CALL)] = 24,
    head_dim: Annotated[
        int, typer.Option(help="Channels of a head.", min=8, rich_help_panel=_CALL)
    ] = 128,
    batch: Annotated[int, typer.Option(help="Batch.", min=1, rich_help_panel=_CALL)] = 1,
    impl: Annotated[
        str | None,
        typer.Option(help="gluon_sm90 or triton; default: the faster.", rich_help_panel=_CALL),
    ] = None,
    precision: Annotated[
        str, typer.Option(help="model, fp8 or int8_fp8.", rich_help_panel=_CALL)
    ] = "model",
    gpu: Annotated[
        str,
        typer.Option(
            help="H200, what you tuned; derived: H100, A100, L40S, RTX 4090, B200.",
            rich_help_panel=_CALL,
        ),
    ] = "H200",
    mhz: Annotated[
        float | None,
        typer.Option(
            help="Clock of the SMs; default: what it holds.", min=1, rich_help_panel=_CALL
        ),
    ] = None,
    search: Annotated[
        bool,
        typer.Option("--search", help="The fastest of --density.", rich_help_panel=_SEARCH),
    ] = False,
    tolerance: Annotated[
        float, typer.Option(help="How far above --density, as a share.", rich_help_panel=_SEARCH)
    ] = 0.05,
    stride_share: Annotated[
        float,
        typer.Option(help="Longest stride, as a share of its window.", rich_help_panel=_SEARCH),
    ] = 0.5,
    window_share: Annotated[
        float,
        typer.Option(help="Least window; 1: the grid's proportions.", rich_help_panel=_SEARCH),
    ] = 0.6,
    count: Annotated[int, typer.Option(help="How many.", min=1, rich_help_panel=_SEARCH)] = 10,
    measured: Annotated[
        Path | None,
        typer.Option(
            help="Instead: predict the rows of a benchmark's CSV.", rich_help_panel=_OUTPUT
        ),
    ] = None,
    csv: Annotated[
        Path | None, typer.Option(help="Write what was found.", rich_help_panel=_OUTPUT)
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw what --search or --measured found.", rich_help_panel=_OUTPUT),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON.", rich_help_panel=_OUTPUT)
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check, and say what would run.", rich_help_panel=_OUTPUT),
    ] = False,
) -> None:
    """How fast a neighbourhood will be: tiles, the bounds they set, and the predicted time."""
    from visionfuse.cli import console, user_errors

    with user_errors():
        from ..kernels.plan import Neighborhood
        from .gpus import find_gpu

        _check_files(csv, plot)
        if measured is not None:
            _measured(measured, gpu, plot, csv, as_json, dry_run)
            return
        setting, shape = _setting(grid, text, heads, head_dim, batch, impl, precision,
                                  find_gpu(gpu), mhz)  # fmt: skip
        if search:
            wanted = _wanted(
                density, window, stride, dilation, tolerance, stride_share, window_share
            )
            _search(wanted, setting, count, plot, csv, as_json, dry_run)
            return
        if plot is not None:
            raise ValueError("--plot draws what --search or --measured found; give one of them.")
        spec = Neighborhood(
            **_options(window=window, stride=stride, dilation=dilation, density=density)
        )
        rule = spec.resolve(shape)
        if (q_tile is None) != (kv_tile is None):
            raise ValueError("Tiles of one's own need both --q-tile and --kv-tile.")
        if dry_run:
            console.print(f"Window {_times(rule.window)}, stride {_times(rule.stride)} on {_times(shape)}, "
                          f"density {rule.density:.1%}", highlight=False)  # fmt: skip
            return
        if q_tile is not None and kv_tile is not None:
            from .model import box_tiles

            tiles = box_tiles(rule, _tile(q_tile), _tile(kv_tile), calls=setting.calls,
                              sms=setting.gpu.sms)  # fmt: skip
            _show_tiles(tiles, 1 / rule.density, csv, as_json)
            return
        from .model import simulate as run

        _show_one(run(spec, setting), setting, csv, as_json)


def _options(**named: str | float | None) -> dict[str, Any]:
    from visionfuse.cli import parse_options

    return parse_options([], **named)


def _tile(text: str) -> tuple[int, ...]:
    from visionfuse.cli import parse_shape

    return parse_shape(text, "A tile")


def _setting(grid, text, heads, head_dim, batch, impl, precision, gpu, mhz):
    from visionfuse.cli import parse_shape

    from .model import Setting

    if grid is None:
        raise ValueError("--grid is needed: the token grid, for example 256x256 or 21x45x80.")
    shape = parse_shape(grid, "--grid")
    impl = impl or gpu.impl
    gpu.rate(impl, precision, head_dim)  # raises where nothing is known
    setting = Setting(grid=shape, text=text, heads=heads, head_dim=head_dim, batch=batch, impl=impl,
                      precision=precision, gpu=gpu, mhz=mhz)  # fmt: skip
    return setting, shape


def _wanted(density, window, stride, dilation, tolerance, stride_share, window_share) -> Wanted:
    from .search import Wanted

    if density is None or any(x is not None for x in (window, stride, dilation)):
        raise ValueError(
            "--search finds window and stride itself: give --density, and none of these."
        )
    return Wanted(density=density, tolerance=tolerance, stride_share=stride_share,
                  window_share=window_share)  # fmt: skip


def _check_files(csv: Path | None, plot: Path | None) -> None:
    if plot is not None and plot.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--plot needs a name that ends in .png, .svg or .pdf, not {plot}.")
    for path in (csv, plot):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)


# -- one neighbourhood ------------------------------------------------------------------------------


def _show_one(found: Simulation, setting: Setting, csv: Path | None, as_json: bool) -> None:
    from rich.table import Table

    from visionfuse.cli import console

    gpu = setting.gpu
    facts = found.to_dict() | {"gpu": gpu.name, "impl": setting.impl, "speed": gpu.basis}
    if _written([facts], csv, as_json, one=True):
        return
    tiles = found.tile_count
    table = Table(box=None, show_header=False)
    rows = {
        "window, stride": f"{_times(found.window)}, {_times(found.stride)}",
        "density": f"{found.density:.1%} of the pairs visible, {found.visited_density:.1%} visited",
        "tiles": f"{_times(tiles.q_tile)} queries, {_times(tiles.kv_tile)} keys",
        "visited": f"{tiles.visited:,} tiles: {tiles.full:,} full, {tiles.partial:,} partial",
        "at most, by FLOPs": f"{found.flop_bound:.2f}x",
        "at most, by tiles": f"{tiles.bound:.2f}x, the query tile that visits most",
        "dealt evenly": f"{tiles.balanced:.2f}x, on {gpu.sms} SMs",
        "predicted": f"{found.ms:.3g} ms on {gpu.name} at {setting.mhz or gpu.mhz:.0f} MHz",
        "against dense": f"{found.dense_ms / found.ms:.2f}x, {found.dense_ms:.3g} ms",
    }
    if found.cudnn_ms is not None:
        rows["against cuDNN"] = (
            f"{found.cudnn_ms / found.ms:.2f}x, {found.cudnn_ms:.3g} ms in 16 bits"
        )
    rows["its speed"] = f"{gpu.basis}; {setting.impl}"
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    _say_file(csv)


def _show_tiles(tiles: TileCount, flop_bound: float, csv: Path | None, as_json: bool) -> None:
    from dataclasses import asdict

    from rich.table import Table

    from visionfuse.cli import console

    facts = asdict(tiles) | {
        "partial": tiles.partial, "tile_bound": tiles.bound, "flop_bound": flop_bound,
    }  # fmt: skip
    if _written([facts], csv, as_json, one=True):
        return
    table = Table(box=None, show_header=False)
    table.add_row("query tiles", f"{tiles.tiles:,} of {_times(tiles.q_tile)}")
    table.add_row("key tiles", f"{tiles.keys:,} of {_times(tiles.kv_tile)}")
    table.add_row(
        "visited",
        f"{tiles.visited:,}: {tiles.full:,} full, {tiles.partial:,} partial; most {tiles.most}",
    )
    table.add_row("at most, by FLOPs", f"{flop_bound:.2f}x")
    table.add_row("at most, by tiles", f"{tiles.bound:.2f}x")
    table.add_row("dealt evenly", f"{tiles.balanced:.2f}x")
    console.print(table)
    _say_file(csv)


# -- search -----------------------------------------------------------------------------------------

DENSITIES = (0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7)  # beside the one asked, in a plot


def _search(wanted: Wanted, setting: Setting, count: int, plot: Path | None, csv: Path | None,
            as_json: bool, dry_run: bool) -> None:  # fmt: skip
    from dataclasses import replace

    from rich.table import Table

    from visionfuse.cli import console

    from .search import search, steps

    targets = [wanted] + [
        replace(wanted, density=d) for d in DENSITIES if plot and d != wanted.density
    ]
    if dry_run:
        console.print(f"Windows of {', '.join(f'{t.density:.0%}' for t in targets)} on {_times(setting.grid)}, "
                      f"{count} of each planned", highlight=False, soft_wrap=True)  # fmt: skip
        return
    with _progress(steps(count) * len(targets)) as advance:
        found = [search(wanted, setting, count=count, advance=advance)]
        for target in targets[1:]:
            with suppress(ValueError):  # small grids do not have every density
                found.append(search(target, setting, count=count, advance=advance))
    if plot is not None:
        from .plot import speedup_by_density

        speedup_by_density([one for each in found for one in each], setting, plot)
    if _written([one.to_dict() for one in found[0]], csv, as_json):
        return
    table = Table(title=f"{_times(setting.grid)} on {setting.gpu.name}, predicted",
                  caption=f"Its speed: {setting.gpu.basis}")  # fmt: skip
    for name in ("window", "stride", "density", "order in", "ms", "dense", "cuDNN"):
        table.add_column(name, justify="left" if name in ("window", "stride", "order in") else "right",
                         no_wrap=True)  # fmt: skip
    for one in found[0]:
        table.add_row(
            _times(one.window), _times(one.stride), f"{one.density:.1%}", _times(one.order.tile or ()),
            f"{one.ms:.3g}", f"{one.dense_ms / one.ms:.2f}x",
            f"{one.cudnn_ms / one.ms:.2f}x" if one.cudnn_ms else "-",
        )  # fmt: skip
    console.print(table)
    _say_file(csv)
    _say_file(plot)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("screening", total=total)
        yield lambda text: progress.update(task, advance=1, description=text)


# -- measured rows ----------------------------------------------------------------------------------


def _measured(
    path: Path, gpu: str, plot: Path | None, csv: Path | None, as_json: bool, dry_run: bool
) -> None:
    from rich.table import Table

    from visionfuse.cli import console

    from .gpus import find_gpu
    from .measured import predictions, read

    rows = read(path)
    if not rows:
        raise ValueError(f"{path} has no timed rows of the attention or engine suite.")
    if dry_run:
        console.print(f"{len(rows)} rows of {path}", highlight=False, soft_wrap=True)
        return
    found = predictions(rows, find_gpu(gpu))
    if plot is not None:
        from .plot import predicted_by_measured

        predicted_by_measured(found, plot)
    if _written([one.to_dict() for one in found], csv, as_json):
        return
    table = Table(title=f"{path.name}: time of kernels, in ms")
    for name in ("case", "precision", "measured", "predicted", "off", "left out"):
        left = name in ("case", "precision")
        table.add_column(name, justify="left" if left else "right", overflow="fold")
    for one in found:
        table.add_row(
            f"{one.row.case}, {one.row.impl}", one.row.precision, f"{one.row.ms:.4g}", f"{one.ms:.4g}",
            f"{one.error:+.1%}", "-" if one.error_left_out is None else f"{one.error_left_out:+.1%}",
        )  # fmt: skip
    console.print(table)
    console.print(
        "off: by the constants in use. left out: by a fit to the other rows of that kernel.",
        highlight=False,
        soft_wrap=True,
    )
    console.print(_fits(rows, gpu))
    _say_file(csv)
    _say_file(plot)


def _fits(rows: list[Measured], gpu: str):
    """What the constants would be by these rows: for kernels.plan.tiles and `gpus`."""
    from rich.table import Table

    from .gpus import find_gpu
    from .measured import fits

    table = Table(title="Fitted to these rows")
    for name in ("kernel", "blocks", "rate", "speed", "partial", "ragged", "tile"):
        table.add_column(name, justify="left" if name in ("kernel", "blocks") else "right")
    for (commit, impl, precision, head_dim), fit in fits(rows, find_gpu(gpu)).items():
        for shape in fit.shapes:
            table.add_row(
                f"{impl} {precision} {head_dim}, {commit}", f"{shape.block_q}x{shape.block_k}",
                f"{fit.rate:.3g}", f"{shape.speed:.3g}", f"{shape.partial:.2g}", f"{shape.ragged:.2g}",
                f"{shape.tile:.0f}",
            )  # fmt: skip
    return table


# -- output -----------------------------------------------------------------------------------------


def _written(
    rows: list[dict[str, Any]], csv: Path | None, as_json: bool, *, one: bool = False
) -> bool:
    """Write a CSV if one is asked for; whether JSON was printed, so that nothing else is."""
    if csv is not None:
        from csv import DictWriter

        with csv.open("w", newline="", encoding="utf-8") as file:
            writer = DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            for row in rows:
                writer.writerow(
                    {k: _times(v) if isinstance(v, tuple) else v for k, v in row.items()}
                )
    if as_json:
        typer.echo(json.dumps(rows[0] if one else rows, indent=2))
    return as_json


def _say_file(path: Path | None) -> None:
    from visionfuse.cli import console

    if path is not None:
        console.print(f"File: {path}", highlight=False, soft_wrap=True)


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))

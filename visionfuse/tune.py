"""`visionfuse tune`: measure on this machine what the planner counts with, and keep it for this GPU.

For every implementation, precision and head dim: each block shape runs a handful of plans (whole blocks,
blocks under a mask, short blocks, few blocks a tile), and the costs of `BlockShape` are fitted to the
times. Kernel parameters are chosen by the sum of two plans. The table goes where `kernels.plan.tiles` looks for
it; nothing else ever tunes.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import gcd, lcm, prod
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch

    from .kernels.plan import AttentionPlan
    from .kernels.plan.tiles import BlockShape, Entry, Table

LEAST, MOST = 3, 20  # runs of a plan
SHARE = 0.02  # of the budget, for the runs of one plan
# What is tuned, the most used first: implementation, recipe of the engine benchmark, head dim.
GPU_ENTRIES = (
    ("gluon_sm90", "bf16", 128), ("gluon_sm90", "fp8", 128), ("gluon_sm90", "int8_fp8", 128),
    ("gluon_sm90", "bf16", 64), ("gluon_sm90", "fp8", 64), ("gluon_sm90", "int8_fp8", 64),
    ("triton", "bf16", 128), ("triton", "bf16", 64),
)  # fmt: skip
CPU_ENTRIES = (("blocks", "fp32", 64),)
# Warps and pipeline stages to try besides the kernel's own choice. Each compiles anew, for seconds.
LAUNCHES = {"triton": ({}, {"num_stages": 3}, {"num_stages": 2, "num_warps": 8})}
SHAPES = {
    "gluon_sm90": ((192, 128), (128, 128)),
    "triton": ((64, 64), (64, 128), (128, 64), (128, 128)),
    "blocks": ((128, 128), (256, 128), (256, 256)),
}


def tune(
    out: Annotated[
        Path | None, typer.Option(help="Where the table goes; default: the user's cache.")
    ] = None,
    impl: Annotated[str | None, typer.Option(help="Only these, e.g. triton,gluon_sm90.")] = None,
    seconds: Annotated[
        float, typer.Option(help="Budget; what does not fit keeps its values.", min=0.1)
    ] = 300.0,
    grid: Annotated[
        str | None, typer.Option(help="Token grid of the plans; default: by device.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would run, and run nothing.")
    ] = False,
) -> None:
    """Measure block shapes on this GPU (or CPU) and keep what is fast: for the planner, once."""
    from visionfuse.cli import console, parse_shape, user_errors

    with user_errors():
        import torch

        from visionfuse.kernels.plan import tiles

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        entries = choose(device, impl)
        shape = parse_shape(grid, "--grid") if grid else default_grid(device)
        path = out or tiles.user_folder() / tiles.file_name(tiles.gpu_name(device))
        if path.suffix != ".json":
            raise ValueError(f"--out must name a .json file, got {path}.")
        if dry_run:
            for name, recipe, head_dim in entries:
                trials = len(SHAPES[name]) * len(LAUNCHES.get(name, ({},)))
                console.print(f"{name}, {recipe}, head dim {head_dim}: {trials} variants on a grid of "
                              f"{shape}", highlight=False, soft_wrap=True)  # fmt: skip
            console.print(f"Table: {path}", highlight=False, soft_wrap=True)
            return
        found, notes = measure_all(entries, shape, device, seconds)
        for text in notes:
            console.print(text, markup=False, highlight=False, soft_wrap=True)
        if not found:
            raise ValueError(f"Nothing was measured in {seconds:g} s. Give more --seconds.")
        for entry in found:
            console.print(comparison(entry, device))
        write(merged(found, path, device), path)
        console.print(f"Table: {path}", highlight=False, soft_wrap=True)


def choose(device: torch.device, impl: str | None) -> list[tuple[str, str, int]]:
    known = GPU_ENTRIES if device.type == "cuda" else CPU_ENTRIES
    names = [name.strip() for name in (impl or "").split(",") if name.strip()]
    possible = list(dict.fromkeys(name for name, _, _ in known))
    if unknown := [name for name in names if name not in possible]:
        raise ValueError(
            f"--impl {', '.join(unknown)} cannot be tuned on {device.type}. Choose from {', '.join(possible)}."
        )
    return [entry for entry in known if not names or entry[0] in names]


def default_grid(device: torch.device) -> tuple[int, ...]:
    return (96, 128) if device.type == "cuda" else (64, 64)


def measure_all(
    entries: list[tuple[str, str, int]], grid: tuple[int, ...], device: torch.device, seconds: float
) -> tuple[list[Entry], list[str]]:
    """What was found, and a line for each entry: how well it fits, or why it was left out."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from visionfuse.cli import console

    deadline = perf_counter() + seconds
    found, notes = [], []
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        for name, recipe, head_dim in entries:
            what = f"{name}, {recipe}, head dim {head_dim}"
            task = progress.add_task(what, total=len(SHAPES[name]) * len(KINDS))
            tuner = Tuner(name, recipe, head_dim, grid, device, deadline, seconds * SHARE)
            try:
                found.append(tuner.entry(lambda task=task: progress.advance(task)))
                notes.append(f"{what}: the fitted times are off by {tuner.error:.0%} at most")
            except OutOfTimeError:
                notes.append(f"{what}: left out, --seconds is used up")
            except (ValueError, RuntimeError) as error:
                notes.append(f"{what}: left out, {str(error).strip().splitlines()[0]}")
                if "illegal memory access" in str(error):  # every later call would fail
                    break
            progress.remove_task(task)
    return found, notes


class OutOfTimeError(Exception):
    """The budget is used up before an entry is complete."""


# Plans by what they are rich in: (tile side or None for rows, window as a share of the side, stride).
KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "whole": {"window": 0.5, "stride": "tile"},
    "masked": {"window": 0.5, "stride": 1},
    "narrow": {"window": 0.2, "stride": 1},
    "few": {"window": 0.2, "stride": "tile"},
    "short": {"window": 0.5, "stride": "tile", "short": True},
}


class Tuner:
    """Measures one entry. Tokens are in the order of their plan; queries, keys and values are random."""

    def __init__(self, impl, recipe, head_dim, grid, device, deadline, seconds):
        import torch

        self.impl, self.recipe, self.head_dim = impl, recipe, head_dim
        self.grid, self.device = grid, device
        self.deadline, self.seconds = deadline, seconds
        self.error = 0.0  # of the fitted times, relative, the worst plan
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        heads = 24 if device.type == "cuda" else 8
        generator = torch.Generator(device).manual_seed(0)
        self.qkv = [
            torch.randn(
                1, prod(grid), heads, head_dim, generator=generator, device=device, dtype=dtype
            )
            for _ in range(3)
        ]

    def entry(self, advance) -> Entry:
        from .bench.clocks import sampled_clocks
        from .kernels.plan.tiles import Entry

        with sampled_clocks(self.device) as clocks:
            fitted = self.fitted(advance)
        best = max(speed for _, speed in fitted)
        shapes = [replace(s, speed=float(f"{v / best:.3g}")) for s, v in fitted]
        shapes.sort(
            key=lambda s: -s.speed
        )  # the planner takes the first where nothing is to choose
        return Entry(
            impl=self.impl, precision=self.precision, head_dim=self.head_dim, shapes=tuple(shapes),
            pairs_per_ms=float(f"{best:.4g}"), mhz=clock_at_work(clocks),
        )  # fmt: skip

    def fitted(self, advance) -> list[tuple[BlockShape, float]]:
        """Every block shape with its costs, and its pairs a millisecond."""
        from .cost_model import fit
        from .kernels.plan.tiles import BlockShape

        fitted: list[tuple[BlockShape, float]] = []
        for block_q, block_k in SHAPES[self.impl]:
            shape = BlockShape(block_q=block_q, block_k=block_k, padded=self.impl != "blocks")
            plans = {kind: self.plan(kind, shape) for kind in KINDS}
            shape = self.fastest_launch(shape, plans)
            samples = []
            for plan in plans.values():
                samples.append((self.features(plan, shape), self.time(plan, shape)))
                advance()
            found, speed, error = fit(samples, shape, self.before(shape))
            self.error = max(self.error, error)
            fitted.append((found, speed))
        return fitted

    def features(self, plan: AttentionPlan, shape: BlockShape) -> dict[str, float]:
        """Of all heads, as if every multiprocessor had as much to do as the busiest."""
        from .cost_model import busiest, features, row_costs

        heads = self.qkv[0].shape[2]
        costs = row_costs(plan.blocks, self.before(shape)).repeat(heads)
        share = busiest(costs, self.sms) * self.sms / float(costs.sum())
        return {n: heads * share * x for n, x in features(plan.blocks, shape).items()}

    @property
    def sms(self) -> int:
        import torch

        if self.device.type != "cuda":
            return 1
        return torch.cuda.get_device_properties(self.device).multi_processor_count

    def before(self, shape: BlockShape) -> BlockShape:
        """What stands for this shape now, or for the first shape of this implementation."""
        from .kernels.plan.tiles import block_shapes

        known = block_shapes(self.impl, self.head_dim, precision=self.precision, device=self.device)
        sides = (shape.block_q, shape.block_k)
        return next((s for s in known if (s.block_q, s.block_k) == sides), known[0])

    @property
    def precision(self) -> str:
        return "model" if self.recipe in ("bf16", "fp32") else self.recipe

    def plan(self, kind: str, shape: BlockShape) -> AttentionPlan:
        """A plan of that kind in tiles of the block's size."""
        from .kernels.order import Order
        from .kernels.plan import Dense, Neighborhood, TokenLayout, plan_attention

        layout = TokenLayout.joint(grids=[self.grid])
        options = KINDS[kind]
        if not options:
            return plan_attention(layout, Dense(), shape=shape, device=self.device)
        tile, subtile, unit = cut_of(shape, self.grid, short=options.get("short", False))
        # Windows of an odd number of units around a unit end where units do.
        window = tuple(
            t * min(2 * round(n * options["window"] / t / 2 - 0.5) + 1, (n // t - 1) // 2 * 2 + 1)
            for n, t in zip(self.grid, unit, strict=True)
        )
        stride = unit if options["stride"] == "tile" else (1,) * len(tile)
        spec = Neighborhood(window=window, stride=stride)
        return plan_attention(
            layout, spec, order=Order(kind="tiled", tile=tile, subtile=subtile), shape=shape,
            device=self.device,
        )  # fmt: skip

    def fastest_launch(self, shape: BlockShape, plans: dict[str, AttentionPlan]) -> BlockShape:
        """The shape with the parameters whose times of a whole and of a masked plan are least in sum."""
        choices = LAUNCHES.get(self.impl, ({},))
        if len(choices) == 1:
            return shape
        some = [plans[kind] for kind in ("dense", "masked")]
        timed = []
        for choice in choices:
            tried = replace(shape, launch=tuple(sorted(choice.items())))
            try:
                timed.append((sum(self.time(plan, tried) for plan in some), tried))
            except (
                RuntimeError
            ):  # too much shared memory or too many registers: Triton's own errors
                continue
        if not timed:
            raise ValueError(f"no launch of blocks {shape.block_q}x{shape.block_k} runs here")
        own, best = timed[0], min(timed, key=lambda pair: pair[0])
        return best[1] if best[0] < 0.98 * own[0] else own[1]  # 2% could be noise

    def time(self, plan: AttentionPlan, shape: BlockShape) -> float:
        """Milliseconds; of a fifth of the runs at most, as what disturbs a run only adds to it."""
        from .bench.engine_cases import attend
        from .bench.timing import time_in_turns
        from .kernels.plan import tiles

        if perf_counter() > self.deadline:
            raise OutOfTimeError
        q, k, v = (x if plan.permutation is None else x[:, plan.permutation] for x in self.qkv)
        trial = tiles.Entry(
            impl=self.impl, precision=self.precision, head_dim=self.head_dim, shapes=(shape,)
        )
        with tiles.using(tiles.Table(gpu="", entries=(trial,))):
            reasons, call = attend(self.impl, self.recipe, q, k, v, plan.blocks)
            if reasons:
                raise ValueError("; ".join(reasons))
            timing = time_in_turns({"x": call}, device=self.device, seconds=self.seconds / 6,
                                   least=LEAST, most=MOST)  # fmt: skip
        return timing["x"].ms_p20


def clock_at_work(samples: list[tuple[float, float]]) -> float:
    """The median MHz of samples (MHz, W) in which the GPU worked, not waited for a compiler; 0 without any."""
    from statistics import median

    most = max((watts for _, watts in samples), default=0.0)
    return median(mhz for mhz, watts in samples if watts >= 0.5 * most) if samples else 0.0


def cut_of(
    shape: BlockShape, grid: tuple[int, ...], *, short: bool
) -> tuple[tuple[int, ...], tuple[int, ...] | None, tuple[int, ...]]:
    """(tile, subtile, unit) of an order whose blocks are full, or short; units end where tiles of queries and
    of keys both do. Columns where no box of keys fits into one of queries: 192 x 128."""
    if shape.block_q % shape.block_k == 0 or len(grid) == 1:
        tile = tile_of(shape.block_q, grid, short=short)
        return tile, largest_box(shape.block_k, tile), tile
    common = gcd(shape.block_q, shape.block_k)
    rank = len(grid)
    most = shape.block_q ** ((rank - 1) / rank)  # a block is about as long as it is wide
    area = min((d for d in range(1, common + 1) if common % d == 0), key=lambda d: abs(d - most))
    base = tile_of(area, grid[1:], short=short)
    return (grid[0], *base), None, (lcm(shape.block_q, shape.block_k) // area, *base)


def tile_of(volume: int, grid: tuple[int, ...], *, short: bool) -> tuple[int, ...]:
    """A box of `volume` tokens with sides near each other; short: less, so that blocks are not full."""
    sides: list[int] = []
    for axis, n in enumerate(grid):
        rest = len(grid) - axis
        fits = [d for d in range(1, min(volume, n) + 1) if volume % d == 0 and d**rest <= volume]
        sides.append(max(fits))
        volume //= sides[-1]
    if short:
        sides[-1] = max(1, sides[-1] - 1)
    return tuple(sides)


def largest_box(volume: int, tile: tuple[int, ...]) -> tuple[int, ...]:
    """The largest box of at most `volume` tokens whose sides divide those of the tile."""
    sides = [[d for d in range(1, n + 1) if n % d == 0] for n in tile]
    return max((box for box in product(*sides) if prod(box) <= volume), key=prod)


def merged(found: list[Entry], path: Path, device: torch.device) -> Table:
    """What was found, beside what a table at `path` has of other implementations and head dims."""
    from datetime import datetime, timezone
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from .kernels.plan import tiles

    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = ""
    kept: list[Entry] = []
    if path.is_file():
        new = {(e.impl, e.precision, e.head_dim) for e in found}
        kept = [
            e
            for e in tiles.read_table(path).entries
            if (e.impl, e.precision, e.head_dim) not in new
        ]
    gpu: dict[str, int] = {"sms": 1}
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        gpu = {"sms": facts.multi_processor_count, "capability": 10 * facts.major + facts.minor}
    return tiles.Table(
        gpu=tiles.gpu_name(device), entries=(*found, *kept), torch=torch.__version__, triton=triton,
        date=datetime.now(timezone.utc).date().isoformat(), **gpu,
    )  # fmt: skip


def write(table: Table, path: Path) -> None:
    """Whole or not at all: another process may be reading."""
    import json

    from .kernels.plan import tiles

    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    draft.write_text(json.dumps(table.to_dict(), indent=1) + "\n", encoding="utf-8")
    draft.replace(path)
    tiles.forget_tables()


def comparison(entry: Entry, device: torch.device):
    """A table for the terminal: every cost as it is now and, in brackets, as it was.

    Block shapes side by side and a row a cost: that still fits 80 columns, where rich cuts words.
    """
    from rich.table import Table as Shown

    from .kernels.plan import tiles

    known = tiles.block_shapes(entry.impl, entry.head_dim, precision=entry.precision, device=device)
    before = {(s.block_q, s.block_k): s for s in known}
    shown = Shown(title=f"{entry.impl}, {entry.precision}, head dim {entry.head_dim}: new (before)")
    shown.add_column("block", no_wrap=True)
    for shape in entry.shapes:
        shown.add_column(f"{shape.block_q}x{shape.block_k}", justify="right", no_wrap=True)
    for name in ("speed", "partial", "ragged", "gather", "entry", "tile"):
        cells = []
        for shape in entry.shapes:
            old = before.get((shape.block_q, shape.block_k))
            cells.append(f"{_short(getattr(shape, name))} ({_short(getattr(old, name, None))})")
        shown.add_row(name, *cells)
    for option in sorted({option for shape in entry.shapes for option, _ in shape.launch}):
        shown.add_row(option, *(str(dict(shape.launch).get(option, "-")) for shape in entry.shapes))
    return shown


def _short(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


if __name__ == "__main__":
    typer.run(tune)

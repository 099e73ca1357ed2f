"""`visionfuse bench engine`, `neighborhood` and `sage`: the options. What they import, they import when they run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from visionfuse.bench.suite import Suite

Only = Annotated[
    str, typer.Option(help="Keys of lines, with commas, or all; --dry-run lists them.")
]
Csv = Annotated[
    Path | None, typer.Option(help="Write rows here, line by line; others that it has stay.")
]
Seconds = Annotated[
    float | None,
    typer.Option(help="Of measurement, per candidate; 0: one run, to see that it runs.", min=0),
]
Device = Annotated[str | None, typer.Option(help="cuda or cpu; default: what there is.")]
Commit = Annotated[str, typer.Option(help="For the CSV, where there is no git.")]
DryRun = Annotated[bool, typer.Option(help="Say what would run, and run nothing.")]


_EXIT = "Exit code 1: something failed or was wrong; its row has no time and says why."


def _command(name: str, what: str) -> Callable[..., None]:
    def command(
        only: Only = "all", csv: Csv = None, seconds: Seconds = None, device: Device = None,
        commit: Commit = "", dry_run: DryRun = False,
    ) -> None:  # fmt: skip
        _run(name, only, csv, seconds, device, commit, dry_run)

    command.__name__, command.__doc__ = name, f"{what}\n\n{_EXIT}"
    return command


engine = _command(
    "engine",
    "The Hopper engine against its bar, dense, sparse and in 8 bits, each beside its baseline.",
)
neighborhood = _command(
    "neighborhood",
    "neighborhood_attention with all that a layer pays, in 16 and in 8 bits, and gradients.",
)
sage = _command(
    "sage",
    "sage_attention from bf16 to bf16, rounding included, and the errors of every precision.",
)


def suite_of(name: str) -> Suite:
    return getattr(import_module(f"visionfuse.bench.{name}_cases"), name.upper())


def _run(
    name: str, only: str, csv: Path | None, seconds: float | None, device: str | None, commit: str,
    dry_run: bool,
) -> None:  # fmt: skip
    from visionfuse.cli import console, user_errors

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    with user_errors():
        import torch

        from visionfuse.bench import runner as benchmark
        from visionfuse.bench.table import as_text, update_csv

        here = "cuda" if torch.cuda.is_available() else "cpu"
        if device not in (None, "cuda", "cpu") or (device == "cuda" != here and not dry_run):
            raise ValueError(f"--device {device}: there is {here} here. --dry-run needs no GPU.")
        place = torch.device(device or here)
        keys = [] if only == "all" else [key.strip() for key in only.split(",") if key.strip()]
        suite = suite_of(name)
        works = benchmark.choose_works(suite, place, keys)
        if dry_run:
            for work in works:
                for line in benchmark.expect(suite, work):
                    say(line)
            return
        wrong = False
        try:
            for rows in benchmark.run(suite, works, place, seconds=seconds):
                for row in rows:
                    compared = f" {as_text(row.speedup)} of {row.baseline}," if row.speedup else ""
                    timed = f"{as_text(row.ms)} ms,{compared} " if row.ms else ""
                    error = f"error {as_text(row.rel_l1)}; " if row.rel_l1 is not None else ""
                    say(f"{row.case}: {row.impl} {row.recipe}: {timed}{error}{row.note}")
                    wrong |= benchmark.went_wrong(row)
                if csv:
                    update_csv(rows, csv, commit=commit)
        except benchmark.DeviceLostError as error:
            say(f"{error} {len(error.rest)} more in a new one.")
            wrong = True
            if error.rest:
                _go_on(name, {"--only": ",".join(error.rest), "--csv": csv, "--seconds": seconds,
                        "--commit": commit, "--device": place.type})  # fmt: skip
    if wrong:
        raise typer.Exit(1)


def _go_on(name: str, options: dict[str, object]) -> None:
    """The same command in a process of its own."""
    words = [str(w) for pair in options.items() if pair[1] not in (None, "") for w in pair]
    subprocess.run([sys.executable, "-m", "visionfuse.cli", "bench", name, *words], check=False)

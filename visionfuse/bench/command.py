"""`visionfuse bench engine`: the options. What they import, they import when they run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer


def engine(
    only: Annotated[
        str, typer.Option(help="Keys such as 16896,band, or all; --dry-run lists them.")
    ] = "all",
    csv: Annotated[
        Path | None, typer.Option(help="Write rows here, line by line; others that it has stay.")
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(help="Of measurement, per candidate; 0: one run, to see that it runs.", min=0),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu; default: what there is.")] = None,
    commit: Annotated[str, typer.Option(help="For the CSV, where there is no git.")] = "",
    dry_run: Annotated[bool, typer.Option(help="Say what would run, and run nothing.")] = False,
) -> None:
    """The Hopper engine against its bar, dense, sparse and in 8 bits, each beside its baseline.

    Exit code 1: something failed or was wrong; its row has no time and says why.
    """
    from visionfuse.cli import console, user_errors

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    with user_errors():
        import torch

        from visionfuse.bench import engine as benchmark
        from visionfuse.bench.table import as_text, update_csv

        here = "cuda" if torch.cuda.is_available() else "cpu"
        if device not in (None, "cuda", "cpu") or (device == "cuda" != here and not dry_run):
            raise ValueError(f"--device {device}: there is {here} here. --dry-run needs no GPU.")
        place = torch.device(device or here)
        keys = [] if only == "all" else [key.strip() for key in only.split(",") if key.strip()]
        works = benchmark.choose_works(place, keys)
        if dry_run:
            for work in works:
                for line in benchmark.expect(work):
                    say(line)
            return
        wrong = False
        try:
            for rows in benchmark.run(works, place, seconds=seconds):
                for row in rows:
                    compared = f" {as_text(row.speedup)} of {row.baseline}," if row.speedup else ""
                    timed = f"{as_text(row.ms)} ms,{compared} error {as_text(row.rel_l1)}; "
                    say(f"{row.case}: {row.impl} {row.recipe}: {timed if row.ms else ''}{row.note}")
                    wrong |= benchmark.went_wrong(row)
                if csv:
                    update_csv(rows, csv, commit=commit)
        except benchmark.DeviceLostError as error:
            say(f"{error} {len(error.rest)} more in a new one.")
            wrong = True
            if error.rest:
                _go_on({"--only": ",".join(error.rest), "--csv": csv, "--seconds": seconds,
                        "--commit": commit, "--device": place.type})  # fmt: skip
    if wrong:
        raise typer.Exit(1)


def _go_on(options: dict[str, object]) -> None:
    """The same command in a process of its own."""
    words = [str(w) for pair in options.items() if pair[1] not in (None, "") for w in pair]
    subprocess.run([sys.executable, "-m", "visionfuse.cli", "bench", "engine", *words], check=False)

"""Results: one schema for every suite, as CSV and on the terminal."""

from __future__ import annotations

import csv
import subprocess
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table


@dataclass(kw_only=True, slots=True)
class Row:
    """One measurement. Empty fields do not apply.

    baseline: the impl of the row that `speedup` is relative to, in the same run. tflops_visited: of
    the visited blocks, ragged ones at their real size. density: visible pairs as a share of all.
    rel_l1, cosine: against an exact reference. direction: forward, backward or both.
    """

    suite: str
    case: str
    impl: str
    recipe: str = ""
    direction: str = "forward"
    ms: float | None = None
    ms_p20: float | None = None
    ms_p80: float | None = None
    baseline: str = ""
    speedup: float | None = None
    tflops_visited: float | None = None
    density: float | None = None
    rel_l1: float | None = None
    cosine: float | None = None
    peak_gib: float | None = None
    gpu: str = ""
    torch: str = ""
    triton: str = ""
    commit: str = ""
    date: str = ""
    note: str = ""


SHOWN = ("case", "impl", "ms", "speedup", "tflops_visited", "density", "rel_l1", "cosine", "note")


def update_csv(rows: list[Row], path: Path, *, commit: str = "") -> None:
    """Write rows into a CSV, with machine, versions, commit and date, beside those that it has.

    A case that is measured again is replaced whole, so that its speed-ups are of one run. commit: for
    a machine that has a copy of the tree without git.
    """
    facts = environment()
    facts["commit"] = commit or facts["commit"]
    columns = [f.name for f in fields(Row)]
    new = [{name: as_text(value) for name, value in (asdict(row) | facts).items()} for row in rows]
    again = {(row.suite, row.case) for row in rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = []
    if path.is_file():
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames and set(reader.fieldnames) != set(columns):
                raise ValueError(
                    f"{path} has other columns than a benchmark writes: {', '.join(reader.fieldnames)}. "
                    "Name another file."
                )
            kept = [row for row in reader if (row["suite"], row["case"]) not in again]
    draft = path.with_name(path.name + ".part")  # an interrupted run loses nothing
    with draft.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept + new)
    draft.replace(path)


def show_rows(rows: list[Row], *, title: str) -> None:
    table = Table(title=title)
    for name in SHOWN:
        table.add_column(name, justify="left" if name in ("case", "impl", "note") else "right")
    for row in rows:
        table.add_row(*(as_text(getattr(row, name)) for name in SHOWN))
    Console().print(table)


def as_text(value) -> str:
    """Four digits of a float; nothing for None."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def environment() -> dict[str, str]:
    """GPU, versions, commit and date: what every row names."""
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True,
            text=True,
        ).stdout.strip()  # fmt: skip
    except OSError:  # no git here, as on a machine that got a copy of the tree
        commit = ""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = ""
    cuda = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if cuda else "",
        "torch": torch.__version__,
        "triton": triton,
        "commit": commit,
        "date": datetime.now(timezone.utc).date().isoformat(),
    }

"""Tables that grow: every run adds its row at once, so that an interrupted table keeps what it has."""

from __future__ import annotations

import csv
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from visionfuse.bench.table import as_text


def columns(row: Any) -> list[str]:
    """Of a dataclass or one of its objects."""
    return [field.name for field in fields(row)]


def check_columns(path: Path | None, row: Any) -> None:
    """Before hours of work: an existing file must have the columns of the dataclass. Raises ValueError."""
    if path is None or not path.exists():
        return
    with path.open(newline="", encoding="utf-8") as file:
        header = next(csv.reader(file), [])
    if header != columns(row):
        raise ValueError(
            f"{path} has other columns: {', '.join(header) or 'none'}. Rows of this script have "
            f"{', '.join(columns(row))}. Name another file, or give this one these columns."
        )


def append_row(path: Path, row: Any) -> None:
    """Write the header first where there is no file yet."""
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns(row), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow({name: as_text(value) for name, value in asdict(row).items()})

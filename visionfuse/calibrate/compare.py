"""A calibrated recipe beside what one could have taken instead: each candidate alone, in all layers and steps."""

from __future__ import annotations

import csv
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any

from ..bench.table import as_text, environment
from ..recipe import Recipe, Variant
from ..schedule import STOCK, Phase, Schedule
from .run import Calibrated, Calibration


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One recipe. ms: attention of a run, predicted or measured as `times` says. psnr: mean to the stock outputs of
    the held-out prompts, in dB, which the candidates of a calibration were not measured on; psnr_least: of the
    worst of them."""

    case: str
    recipe: str
    ms: float
    speedup: float
    psnr: float | None
    psnr_least: float | None
    prompts: int
    times: str
    torch: str
    commit: str
    date: str


def alone(candidate: Variant) -> Recipe:
    """The candidate in all layers and steps."""
    schedule = Schedule(phases=(Phase(variant=candidate.name),), min_steps=0)
    return Recipe(name=candidate.name, variants=(candidate,), schedule=schedule)


def compare(calibration: Calibration, found: Calibrated, case: str, times: str) -> list[Row]:
    """Stock, the calibrated recipe and each candidate alone, on the held-out prompts."""
    facts = environment()
    shared = {
        "case": case, "times": times, "prompts": len(found.held_out), "torch": facts["torch"],
        "commit": facts["commit"], "date": facts["date"],
    }  # fmt: skip

    def row(recipe: str, ms: float, psnr: tuple[float, ...]) -> Row:
        return Row(
            recipe=recipe, ms=ms, speedup=found.stock_ms / ms, psnr=fmean(psnr) if psnr else None,
            psnr_least=min(psnr, default=None), **shared,
        )  # fmt: skip

    out = [row(STOCK, found.stock_ms, ()), row(found.recipe.name, found.ms, found.held_out)]
    names = found.parts[0].names
    for candidate in calibration.task.candidates:
        if candidate.name not in names:
            continue
        index = names.index(candidate.name)
        ms = sum(part.group.times[index] * len(part.layers) for part in found.parts)
        out.append(row(candidate.name, ms, calibration.check(alone(candidate))))
    return out


def table(rows: list[Row]) -> Any:
    from rich.table import Table

    shown = Table(title="Beside each candidate alone, on held-out prompts", title_justify="left")
    shown.add_column("recipe")
    for name in ("attention, ms", "speed-up", "PSNR, dB", "worst"):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        shown.add_row(
            row.recipe, f"{row.ms:.3g}", f"{row.speedup:.2f}x", _db(row.psnr), _db(row.psnr_least)
        )
    return shown


def _db(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def write(rows: list[Row], path: Path) -> None:
    """Rows of the same case are replaced, others stay."""
    columns = [field.name for field in fields(Row)]
    kept: list[dict[str, str]] = []
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            kept = [row for row in csv.DictReader(file) if row["case"] != rows[0].case]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept)
        writer.writerows({k: as_text(v) for k, v in asdict(row).items()} for row in rows)

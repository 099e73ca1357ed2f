"""Write the tables of README.md and assets/docs from assets/bench/*.csv: `python -m visionfuse.bench.readme`.

A table stands between two comments; the first names the suite, that is the CSV, and its columns:

    <!-- table: attention | case | impl | density %: density | ms: time, ms | speedup x: speed-up -->
    <!-- /table -->

`column`, `column: title`, and `column x: title` or `column %: title` to write 1.32 as 1.32x or 0.5 as 50%.
`column = value` keeps only the rows with that value. A suite without a CSV leaves its table empty.

    <!-- bars: engine -->
    <!-- /bars -->

is the table of `bars.py`: what is asked of the engine, and what was measured.

    <!-- value: wan; case = a step; recipe = fps coarse; speedup x -->3.26x<!-- /value -->

is one number of one row, within a sentence or a table of one's own (whose rows a | would cut).
"""

from __future__ import annotations

import csv
import re
import sys
from pathlib import Path

from .bars import bars_table

BLOCK = re.compile(r"(<!-- table: (?P<spec>.*?) -->\n).*?(<!-- /table -->)", re.DOTALL)
BARS = re.compile(r"(<!-- bars: (?P<suite>\w+) -->\n).*?(<!-- /bars -->)", re.DOTALL)
VALUE = re.compile(r"(<!-- value: (?P<spec>.*?) -->).*?(<!-- /value -->)")
COLUMN = re.compile(r"(?P<name>\w+)(?: (?P<unit>[x%]))?(?:: (?P<title>.+))?")


def fill_tables(text: str, folder: Path) -> str:
    """`text` with everything between the comments written anew. Raises ValueError for a wrong spec."""
    text = VALUE.sub(lambda m: m[1] + _value(m["spec"], folder) + m[3], text)
    text = BLOCK.sub(lambda m: m[1] + _table(m["spec"], folder) + m[3], text)
    return BARS.sub(lambda m: m[1] + bars_table(folder / f"{m['suite']}.csv") + m[3], text)


def _select(
    spec: str, folder: Path, separator: str = "|"
) -> tuple[list[dict[str, str]], list[re.Match[str]]]:
    """The rows and the columns that a spec names."""
    suite, *parts = (part.strip() for part in spec.split(separator))
    path = folder / f"{suite}.csv"
    if not path.is_file():
        return [], []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows, known = list(reader), reader.fieldnames or []
    columns = []
    for part in parts or known:
        name, equals, value = (x.strip() for x in part.partition("="))
        match = COLUMN.fullmatch(name if equals else part)
        if match is None or match["name"] not in known:
            raise ValueError(f"{path.name} has no column {part!r}. It has: {', '.join(known)}.")
        if equals:
            rows = [row for row in rows if row[name] == value]
        else:
            columns.append(match)
    return rows, columns


def _value(spec: str, folder: Path) -> str:
    rows, columns = _select(spec, folder, separator=";")
    if len(rows) != 1 or len(columns) != 1:
        raise ValueError(f"{len(rows)} rows and {len(columns)} columns are {spec!r}, not one each.")
    return _cell(rows[0][columns[0]["name"]], columns[0]["unit"])


def _table(spec: str, folder: Path) -> str:
    rows, columns = _select(spec, folder)
    if not rows:
        return ""
    number = {c["name"]: all(_is_number(row[c["name"]]) for row in rows) for c in columns}
    lines = [
        "| " + " | ".join(c["title"] or c["name"] for c in columns) + " |",
        "|" + "|".join("--:" if number[c["name"]] else "---" for c in columns) + "|",
    ]
    for row in rows:
        cells = [_cell(row[c["name"]], c["unit"]) for c in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _is_number(value: str) -> bool:
    try:
        float(value or "0")
    except ValueError:
        return False
    return True


def _cell(value: str, unit: str | None) -> str:
    if not value or not _is_number(value):
        return value
    if unit == "%":
        return f"{float(value):.0%}" if float(value) >= 0.1 else f"{float(value):.1%}"
    if unit == "x":
        return f"{float(value):.2f}x"
    return value if "." not in value else f"{float(value):.4g}"


def main() -> None:
    root = Path(__file__).resolve().parents[2]
    old = []
    for page in (root / "README.md", *sorted((root / "assets" / "docs").glob("*.md"))):
        before = page.read_text(encoding="utf-8")
        after = fill_tables(before, root / "assets" / "bench")
        if after != before:
            old.append(page.name)
            if "--check" not in sys.argv[1:]:
                page.write_text(after, encoding="utf-8")
    if old and "--check" in sys.argv[1:]:
        sys.exit(
            f"Older than assets/bench: {', '.join(old)}. Run python -m visionfuse.bench.readme."
        )


if __name__ == "__main__":
    main()

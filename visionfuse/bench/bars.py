"""What is asked of every suite on one H200, line by line, and the table that says what was measured.

A bar is the least `speedup`, or the largest error, of rows of assets/bench/SUITE.csv; where it covers several rows (all
recipes of the prologue) the worst counts, of alternatives the best. LIMITS says of a line that was not reached what limits it.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from . import gradients, neighborhood_cases, sage_cases
from .engine_cases import LISTS, WORKS

_CASE = {work.key: work.name for work in WORKS}


@dataclass(frozen=True, kw_only=True)
class Bar:
    """key: in LIMITS. work: as the table says it. recipes: empty for all.

    least: of their `speedup`; most: of their relative L1 error instead. of: (case, recipe), what a value is
    divided by. best: recipes are alternatives. ratio: it is shown as a share. group: the key of `Suite.more` that
    measures it.
    """

    key: str
    work: str
    case: str
    least: float = 0.0
    most: float = 0.0
    impl: str = "gluon_sm90"
    recipes: tuple[str, ...] = ("bf16",)
    of: tuple[str, str] | None = None
    best: bool = False
    ratio: bool = False
    group: str = ""

    def rows(self, rows: list[dict[str, str]]) -> list[dict[str, str]]:
        return [
            row
            for row in rows
            if row["case"] == self.case
            and (not self.impl or row["impl"] == self.impl)
            and (not self.recipes or row["recipe"] in self.recipes)
        ]

    @property
    def asked(self) -> str:
        return (
            f"at most {self.text(self.most)}" if self.most else f"at least {self.text(self.least)}"
        )

    def value(self, row: dict[str, str], rows: list[dict[str, str]]) -> float | None:
        column = "rel_l1" if self.most else "speedup"
        if not row[column]:
            return None
        if self.of is None:
            return float(row[column])
        others = [r for r in rows if (r["case"], r["recipe"]) == self.of and r[column]]
        return float(row[column]) / float(others[0][column]) if others else None

    def reached(self, value: float) -> bool:
        return value <= self.most if self.most else value >= self.least

    def text(self, value: float) -> str:
        if self.most and self.of is None:
            return f"{value:.3g}"
        return f"{value:.1%}" if self.ratio else f"{value:.4g}x"


def _kernel(key: str, recipe: str, least: float) -> Bar:
    return Bar(key=f"{key} {recipe}", case=_CASE[key], recipes=(recipe,), least=least,
               work=f"{_CASE[key]}, {recipe.partition(', ')[0]}, "
               + ("all in" if recipe.endswith("all in") else "kernel"))  # fmt: skip


def _masked(key: str, recipe: str, least: float, what: str) -> Bar:
    return Bar(key=f"{key} {recipe}", case=_CASE[key], recipes=(recipe,), least=least, ratio=True,
               work=f"{_CASE[key]}, {recipe}: {what}")  # fmt: skip


_PER_PAIR = f"visible pairs a second, against {LISTS}"
_PER_TILE = f"speed per visited block, against {LISTS}"
_ENGINE = (
    _kernel("4608", "bf16", 1.0),
    _kernel("16896", "bf16", 1.10),
    _kernel("75600", "bf16", 1.18),
    _kernel("75648", "bf16", 1.10),
    _kernel("d64", "bf16", 1.10),
    *(_kernel(key, "fp8", 1.60) for key in ("16896", "32760", "75600", "75648")),
    _kernel("d64", "fp8", 1.37),
    _kernel("4608", "fp8, all in", 1.15),
    _kernel("4608", "int8_fp8, all in", 1.05),
    _kernel("16896", "int8_fp8, all in", 1.35),
    _kernel("32760", "int8_fp8, all in", 1.45),
    _kernel("75600", "int8_fp8, all in", 1.50),
    _kernel("band", "bf16", 11.9),
    _kernel("band", "fp8", 17.0),
    _kernel("band", "fp8, all in", 15.5),
    *(
        _masked(key, recipe, 0.92, _PER_PAIR)
        for key in ("flux-16", "wan-8")
        for recipe in ("bf16", "fp8", "fp8, all in")
    ),
    *(_masked(key, "bf16", 0.85, _PER_TILE) for key in ("flux", "hunyuan-18", "hunyuan-30")),
    *(
        Bar(key=f"prologue {name}", case=f"prologue, {case}", impl="prologue", recipes=(), least=0.75,
            group="prologue",
            ratio=True, work=f"prologue, {name} tokens: share of the speed of a copy, the worst of its forms")
        for name, case in (
            ("16,896", "FLUX 2K, 16896 tokens, 24 heads of 128"),
            ("75,600", "75600 tokens, 12 heads of 128"),
        )
    ),
    *(
        Bar(key=f"{key} triton", case=_CASE[key], impl="triton", least=0.85,
            work=f"{_CASE[key]}, bf16, portable Triton kernel")
        for key in ("16896", "75600", "d64")
    ),
)  # fmt: skip

_OWN = {work.key: work.name for work in neighborhood_cases.WORKS}
# NATTEN 0.21.7 with its best tiles, its permutations included, times dense cuDNN (one H200).
_NATTEN = {"flux": 4.86, "hunyuan-16": 10.31, "hunyuan-8": 6.90, "hunyuan": 3.60, "hunyuan-32": 2.33, "wan": 2.96,
           "wan-8": 5.58, "ltx": 14.8, "vit-32": 3.4 * 0.459 / 0.662, "vit-64": 2.6 * 0.615 / 0.874}  # fmt: skip


def _window(key: str, least: float, natten: float = 0.0) -> Bar:
    more = f": {natten:g} times NATTEN" if natten else ""
    return Bar(key=f"{key} bf16 all in", case=_OWN[key], impl="", least=natten * _NATTEN[key] if natten else least,
               work=f"{_OWN[key]}, bf16{more}")  # fmt: skip


def _rounded(key: str, least: float) -> Bar:
    return Bar(key=f"{key} 8 bits", case=_OWN[key], impl="", recipes=neighborhood_cases.RECIPES[1:], best=True,
               least=least, of=(_OWN[key], "bf16"), work=f"{_OWN[key]}, the fastest of 8 bits against bf16")  # fmt: skip


_NEIGHBORHOOD = (
    _window("flux-16", 10),
    *(
        _window(key, 0, natten)
        for key, natten in (
            ("flux", 1.45), ("hunyuan-16", 1.1), ("hunyuan-8", 1.5), ("hunyuan", 1.35), ("hunyuan-32", 1.12),
            ("wan", 1.5), ("wan-8", 1.5), ("ltx", 1.3), ("vit-32", 1.5), ("vit-64", 1.5),
        )
    ),
    _window("wan-90", 9),
    _window("wan-480-90", 9),
    *(_rounded(key, 1.3) for key in ("flux-16", "hunyuan-16", "hunyuan-8", "hunyuan-32", "wan-8")),
    *(_rounded(key, 1.15) for key in ("flux", "hunyuan", "wan")),
    *(
        Bar(key=case.name, case=case.name, impl="visionfuse", least=0.56 if "dense" in case.name else 0.5,
            group="gradients", work=f"{case.name}: rate against dense gradients by cuDNN")
        for case in gradients.CASES
    ),
)  # fmt: skip

_SAGE_CASE = {work.key: work.name for work in sage_cases.WORKS}


def _sage(key: str, recipe: str, least: float) -> Bar:
    return Bar(key=f"{key} {recipe}", case=_SAGE_CASE[key], impl="", recipes=(recipe,), least=least,
               work=f"{_SAGE_CASE[key]}, {recipe}, all in")  # fmt: skip


def _error(offset: int, recipe: str, most: float, of: tuple[int, str] | None = None) -> Bar:
    other = None if of is None else (sage_cases.case_of(of[0]), of[1])
    said = f": against {other[1]}, {other[0].partition(', ')[2]}" if other else ""
    return Bar(key=f"error {offset} {recipe} {of}", case=sage_cases.case_of(offset), impl="", recipes=(recipe,),
               most=most, of=other, group="accuracy", work=f"{sage_cases.case_of(offset)}, {recipe}{said}")  # fmt: skip


_SAGE = (
    *(
        _sage(key, "int8_fp8+k_thread", least)  # the default of sage_attention
        for key, least in (("4608", 1.05), ("16896", 1.35), ("32760", 1.45), ("75600", 1.5))
    ),
    _sage("16896", "int8", 1.15),
    _error(0, "int8_fp8+k_thread", 0.0385),
    _error(0, "int8", 0.015),
    *(
        _error(offset, name, 1.1, (0, name))
        for offset in (10, 50)
        for name in ("int8_fp8+smooth_q", "int8+smooth_q")
    ),
    *(_error(offset, "int4+smooth_q", 0.22) for offset in (10, 50)),
    *(_error(offset, "int4+smooth_q", 0.5, (offset, "int4")) for offset in (10, 50)),
)
BARS = {"engine": _ENGINE, "neighborhood": _NEIGHBORHOOD, "sage": _SAGE}

# What limits a line that was not reached, by its key; shown only there.
_POWER = "700 W: the SM clock falls to 1,620 to 1,890 MHz, see the notes of the CSV"
_ROUNDS = "576 tiles of 192 queries on 132 SMs: 4.4 rounds of work take 5"
# The kernel of 8 bits with parts left out, on an H200. Of an SM, a clock: 16 exponentials.
_EXP_128 = "softmax and products overlap in part: without exponentials 18% less time, without the maximum 7%"
_EXP_64 = "exponentials: 16 a clock, when FP8 tensor cores finish 32 weights"
_MASK_8BIT = "a masked FP8 block takes 1.4 times as long"
LIMITS: dict[str, str] = {
    "4608 bf16": _ROUNDS,
    **{f"{key} bf16": _POWER for key in ("16896", "75600", "75648", "band")},
    **{f"{key} fp8": _EXP_128 for key in ("16896", "32760", "75600", "band")},
    "75648 fp8": f"{_EXP_128}; {_POWER}",
    "d64 fp8": _EXP_64,
    **{
        f"4608 {recipe}, all in": f"{_ROUNDS}; the prologue is a sixth of the time"
        for recipe in ("fp8", "int8_fp8")
    },
    **{f"{key} int8_fp8, all in": _EXP_128 for key in ("16896", "32760", "75600")},
    "band fp8, all in": f"{_EXP_128}; the prologue reads everything for 9% of the pairs",
    **{
        f"flux-16 {recipe}": f"12% of the blocks are masked: {_MASK_8BIT}"
        for recipe in ("fp8", "fp8, all in")
    },
    "wan-8 bf16": "21x45x80 in columns of 21x8x8: blocks hold 1.17 times the visible pairs; 26% are masked",
    **{
        f"wan-8 {recipe}": "21x45x80 in columns of 21x8x8: blocks hold 1.17 times the visible pairs; 26% are masked, "
        f"and {_MASK_8BIT}"
        for recipe in ("fp8", "fp8, all in")
    },
    # neighborhood
    "hunyuan-32 bf16 all in": "within what cuDNN varies: 264 to 279 ms dense, 2.70x in the run before",
    "wan-8 8 bits": "rounding takes 0.41 of 4.8 ms; entries end where blocks of key scales do, 64.1 of them a tile and 58.3 in "
    "bf16, a quarter under masks; no cells of 16 keys divide 21x45x80, as one scale a head would need",
    gradients.CASES[
        0
    ].name: "Triton 3.6 waits for a product before it starts on the next softmax (ptxas C7515)",
    # sage
    "error 0 int8_fp8+k_thread None": "rounding weights and values to e4m3 makes 0.0374, INT8 scores the rest",
}


def bars_table(path: Path) -> str:
    """Markdown: the lines that were not reached, with what limits them, and folded those that were.

    Work, measured, bar, error. Empty without the CSV.
    """
    if not path.is_file():
        return ""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    bars = BARS[path.stem]
    lines = [_cells(bar, rows) for bar in bars]
    missed = [(*cells, limit) for *cells, reached, limit in lines if not reached]
    reached = [tuple(cells) for *cells, reached, _ in lines if reached]
    parts = []
    if missed:
        parts = [f"Not reached, {len(missed)} of {len(bars)} lines:", "", *_markdown(missed), ""]
    parts += [
        "<details>",
        f"<summary>Reached: {len(reached)} of {len(bars)} lines</summary>",
        "",
        *_markdown(reached),
        "",
        "</details>",
    ]
    return "\n".join(parts) + "\n"


def _markdown(lines: list[tuple[str, ...]]) -> list[str]:
    """A line is work, measured, bar, error, and where it was not reached what limits it."""
    head = ("work", "measured", "bar", "error", "what limits it")
    columns = max(map(len, lines), default=4)
    return [
        "| " + " | ".join(head[:columns]) + " |",
        "|---|--:|--:|--:|" + "---|" * (columns - 4),
        *("| " + " | ".join(line) + " |" for line in lines),
    ]


def _cells(bar: Bar, rows: list[dict[str, str]]) -> tuple[str, str, str, str, bool, str]:
    """Work, measured, bar, error, whether it was reached, and what limits it."""
    found = bar.rows(rows)
    values = {
        i: value for i, row in enumerate(found) if (value := bar.value(row, rows)) is not None
    }
    if not values:
        why = found[0]["note"] if found else "not measured"
        return bar.work, "", bar.asked, "", False, why
    index = (max if bool(bar.most) != bar.best else min)(values, key=values.__getitem__)
    row, value = found[index], values[index]
    work = bar.work if bar.recipes else f"{bar.work} ({row['recipe']})"
    error = f"{float(row['rel_l1']):.2g}" if row["rel_l1"] else ""
    reached = bar.reached(value)
    return work, bar.text(value), bar.asked, error, reached, LIMITS.get(bar.key, "")

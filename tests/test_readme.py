"""README.md says what is true: its tables follow the CSV, its links lead somewhere, its code is valid."""

import re
from pathlib import Path

import pytest

from visionfuse.bench.readme import fill_tables

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]


def test_tables_are_current():
    assert fill_tables(README, ROOT / "assets" / "bench") == README, (
        "run python -m visionfuse.bench.readme"
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("https://"):
            assert (ROOT / target).exists(), f"{page.name} links to {target}"


def test_python_examples_compile():
    examples = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert examples
    for example in examples:
        compile(example, "README.md", "exec")


def test_fill_tables(tmp_path):
    (tmp_path / "speed.csv").write_text(
        "impl,ms,density,speedup\nblocks,12.345678,0.1,5.432\nflex,1,0.0123,\n"
    )
    spec = "<!-- table: speed | ms: time, ms | density %: share | speedup x | impl = blocks -->"
    text = fill_tables(f"before\n{spec}\nold\n<!-- /table -->\nafter", tmp_path)
    assert text.splitlines() == [
        "before",
        spec,
        "| time, ms | share | speedup |",
        "|--:|--:|--:|",
        "| 12.35 | 10% | 5.43x |",
        "<!-- /table -->",
        "after",
    ]
    assert fill_tables(text, tmp_path) == text


def test_fill_tables_of_a_suite_without_results_is_empty(tmp_path):
    text = "<!-- table: none -->\nold\n<!-- /table -->"
    assert fill_tables(text, tmp_path) == "<!-- table: none -->\n<!-- /table -->"


def test_fill_tables_names_the_columns_it_has(tmp_path):
    (tmp_path / "speed.csv").write_text("impl,ms\nblocks,1\n")
    with pytest.raises(ValueError, match=r"no column 'msec'.*impl, ms"):
        fill_tables("<!-- table: speed | msec -->\n<!-- /table -->", tmp_path)

"""README.md says what is true: its tables follow the CSV, its links lead somewhere, its code is valid."""

import re
from pathlib import Path

import pytest

from visionfuse.bench.readme import fill_tables
from visionfuse.recipes import RECIPES
from visionfuse.sites import SITES

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = sorted((ROOT / "assets" / "docs").glob("*.md"))
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *DOCS]
CARDS = sorted(ROOT.glob("assets/*/README.md"))
PYTHON = re.compile(r"(<!-- run -->\n)?```python\n(.*?)```", re.DOTALL)


@pytest.fixture(autouse=True)
def registries():
    """Pages register recipes and sites of their own, which other tests shall not meet."""
    kept = [(registry, dict(registry)) for registry in (RECIPES, SITES)]
    yield
    for registry, before in kept:
        registry.clear()
        registry.update(before)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_tables_are_current(page):
    text = page.read_text(encoding="utf-8")
    assert fill_tables(text, ROOT / "assets" / "bench") == text, (
        "run python -m visionfuse.bench.readme"
    )


@pytest.mark.parametrize("page", [*PAGES, *CARDS], ids=lambda p: f"{p.parent.name}/{p.name}")
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", [PAGES[0], *DOCS], ids=lambda p: p.name)
def test_python_examples(page):
    """All are Python; those marked with <!-- run --> run here, one after another."""
    scope: dict = {}
    for run, example in PYTHON.findall(page.read_text(encoding="utf-8")):
        code = compile(example, page.name, "exec")
        if run:
            exec(code, scope)


def test_some_examples_run():
    marked = [page.name for page in DOCS if "<!-- run -->" in page.read_text(encoding="utf-8")]
    assert {"neighborhood.md", "precision.md", "training.md", "calibrate.md"} <= set(marked)


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


def test_fill_values(tmp_path):
    (tmp_path / "speed.csv").write_text("impl,ms,speedup\nblocks,12.3,5.432\nflex,1,\n")
    text = "x <!-- value: speed; impl = blocks; speedup x -->old<!-- /value --> y"
    assert fill_tables(text, tmp_path) == text.replace("old", "5.43x")
    for wrong in ("speed; speedup x", "speed; impl = none; ms", "none; ms"):
        with pytest.raises(ValueError, match="not one each"):
            fill_tables(f"<!-- value: {wrong} --><!-- /value -->", tmp_path)


def test_fill_tables_of_a_suite_without_results_is_empty(tmp_path):
    text = "<!-- table: none -->\nold\n<!-- /table -->"
    assert fill_tables(text, tmp_path) == "<!-- table: none -->\n<!-- /table -->"


def test_fill_tables_names_the_columns_it_has(tmp_path):
    (tmp_path / "speed.csv").write_text("impl,ms\nblocks,1\n")
    with pytest.raises(ValueError, match=r"no column 'msec'.*impl, ms"):
        fill_tables("<!-- table: speed | msec -->\n<!-- /table -->", tmp_path)

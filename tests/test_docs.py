"""The documentation as a site: it builds without a warning, and asks no other host for anything."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "assets" / "docs"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    for name in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(name, reason="the site needs mkdocs: pip install visionfuse[docs]")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--config-file", "assets/mkdocs.yml",
         "--site-dir", folder],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_is_there(site):
    for page in DOCS.glob("*.md"):
        name = "" if page.stem == "index" else f"{page.stem}/"
        assert (site / name / "index.html").is_file()
    assert (site / "images" / "app_explorer.png").is_file()
    assert (site / "bench" / "engine.csv").is_file()


def test_the_site_asks_no_other_host(site):
    """Links may lead elsewhere; nothing is loaded from there."""
    loaded = re.compile(r"""<(?:script|img|iframe)[^>]*\bsrc=["']?(https?:[^"'\s>]+)|
                            <link[^>]*\brel=["']?(?:stylesheet|preconnect|preload)[^>]*\bhref=["']?(https?:[^"'\s>]+)""",
                        re.VERBOSE)  # fmt: skip
    for page in site.rglob("*.html"):
        assert not loaded.findall(page.read_text(encoding="utf-8")), page.relative_to(site)


def test_the_reference_is_written_from_docstrings(site):
    text = re.sub(r"<[^>]+>|\s+", " ", (site / "api" / "index.html").read_text(encoding="utf-8"))
    for words in (
        "enable_visionfuse",
        "share of the grid that a query should see",
        "grid_axes: axes of its token grid",
    ):
        assert " ".join(words.split()) in " ".join(text.split())


def test_no_mark_of_our_tools_is_left(site):
    for page in site.rglob("index.html"):
        text = page.read_text(encoding="utf-8")
        assert "&lt;!-- run --&gt;" not in text
        assert not re.search(r"<!-- /?(?:table|bars|value|run)", text)


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("assets/*/README.md")],
                         ids=lambda p: f"{p.parent.name}/{p.name}")  # fmt: skip
def test_links_into_pages_meet_a_heading(page):
    """Those between the pages are checked by the strict build."""
    slugify = pytest.importorskip("markdown.extensions.toc").slugify
    for target, anchor in re.findall(
        r"\]\(([\w./-]*)#([\w-]+)\)", page.read_text(encoding="utf-8")
    ):
        text = (page.parent / target if target else page).read_text(encoding="utf-8")
        headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
        assert anchor in {slugify(heading.replace("`", ""), "-") for heading in headings}, (
            f"{target}#{anchor}"
        )


# -- pictures and numbers -----------------------------------------------------------------------------

PICTURE = re.compile(r"!\[([^\]]*)\]\(([^)]+)\)")


@pytest.mark.parametrize("name", ["auto", "dense", "sage", "gna", "sta", "fps", "scale_dit"])
def test_every_recipe_has_a_picture_and_numbers(name):
    page = (DOCS / "recipes.md").read_text(encoding="utf-8")
    _, _, rest = page.partition(f"\n## {name}: ")
    section = rest.partition("\n## ")[0]
    assert re.search(rf"recipe_{name}\.png|{name}_micro\.png", section)
    assert re.search(r"\| [\d.]+(?:x|%)? \|", section), "no table with numbers"


def test_every_recipe_has_its_section():
    page = (DOCS / "recipes.md").read_text(encoding="utf-8")
    code = (ROOT / "visionfuse" / "recipes.py").read_text(encoding="utf-8")
    for name in re.findall(r'^@named\("(\w+)"\)', code, re.MULTILINE):
        assert f"\n## {name}: " in page


@pytest.mark.parametrize("page", [ROOT / "README.md", *DOCS.glob("*.md"), *ROOT.glob("assets/*/README.md")],
                         ids=lambda p: f"{p.parent.name}/{p.name}")  # fmt: skip
def test_pictures_say_in_words_what_they_show(page):
    for words, target in PICTURE.findall(page.read_text(encoding="utf-8")):
        assert len(words.split()) >= 4, f"{target} is {words!r} to whom it is read"
        assert (page.parent / target).stat().st_size < 200_000, f"{target} is large"


# -- how fast, how exact ------------------------------------------------------------------------------


def test_every_result_is_on_the_page_of_results():
    page = (DOCS / "speed.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"<!-- (?:table|bars): ([\w-]+)", page))
    assert shown >= {path.stem for path in (ROOT / "assets" / "bench").glob("*.csv")}


def test_the_site_writes_tables_anew():
    """From the rows as they are, whatever a page holds."""
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "assets" / "mkdocs_hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    old = "<!-- table: sage | case | ms -->\n| case | ms |\n| an old row | 1 |\n<!-- /table -->\n"
    new = hooks.on_page_markdown(old, None, None, None)
    assert "old row" not in new
    assert new.count("\n") > 20

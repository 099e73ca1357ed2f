"""The documentation builds without a warning, asks no other host for anything, and its commands are commands."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from visionfuse import cli

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "assets" / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
BASH = re.compile(r"```bash\n(.*?)```", re.DOTALL)
HUB = re.compile(r"[\w.-]+/[\w.-]+")  # owner/name, where no such folder is here
# Commands that end by themselves in a moment; others are asked what they would do, where they can say.
QUICK = ("info", "plan")


def commands() -> list[tuple[str, str]]:
    """(page, command) of every line in a bash block, without comments and with its continuation lines."""
    found = []
    for page in PAGES:
        for block in BASH.findall(page.read_text(encoding="utf-8")):
            for line in block.replace("\\\n", " ").splitlines():
                if words := shlex.split(line, comments=True):
                    found.append((page.name, shlex.join(words)))
    return sorted(set(found))


COMMANDS = commands()


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=lambda text: text[:60])
def test_commands(page, command):
    program, *words = shlex.split(command)
    check = {"visionfuse": _visionfuse, "make": _make, "python": _script, "pip": _pip}.get(program)
    assert check, f"{page}: nothing here knows how to check {command!r}"
    check(words)


def _visionfuse(words: list[str]) -> None:
    found, rest = typer.main.get_command(cli.app), list(words)
    while hasattr(found, "commands"):
        found = found.commands[rest.pop(0)]
    if "--help" in rest or "..." in rest:
        return
    found.make_context(found.name, list(rest))  # raises for what is no option, or a wrong value
    options = {option for parameter in found.params for option in parameter.opts}
    if any(HUB.fullmatch(word) and not (ROOT / word).exists() for word in rest):
        return
    if "--dry-run" in options:
        words = [*words, "--dry-run"]
    elif found.name not in QUICK:
        return
    if "--recipe" in rest and rest[rest.index("--recipe") + 1].endswith(".json"):
        return
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 0, result.output


def _make(words: list[str]) -> None:
    done = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _script(words: list[str]) -> None:
    """The script is there and has these options."""
    if words[0] == "-m":
        assert (ROOT / (words[1].replace(".", "/") + ".py")).is_file()
        return
    source = (ROOT / words[0]).read_text(encoding="utf-8")
    for word in words[1:]:
        if word.startswith("--"):
            named = word.removeprefix("--").replace("-", "_")
            assert word in source or re.search(rf"\b{named}: ", source), f"{words[0]} has no {word}"


def _pip(words: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for asked in re.findall(r"visionfuse\[([\w,]+)\]|\.\[([\w,]+)\]", " ".join(words)):
        assert set("".join(asked).split(",")) <= set(extras)


def test_there_are_commands():
    assert len(COMMANDS) > 30
    assert {page for page, _ in COMMANDS} >= {"README.md", "index.md", "app.md", "troubleshoot.md"}


# -- the site -----------------------------------------------------------------------------------------


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
        assert "<!-- table" not in text

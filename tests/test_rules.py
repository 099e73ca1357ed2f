"""The rules of CONTRIBUTING.md that a machine can check."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES = 450


def _tracked() -> list[Path]:
    """The files of the project: those of git, or of the tree where there is no git (an sdist)."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    names = listed.stdout.split("\0") if listed.returncode == 0 else []
    paths = [ROOT / n for n in names if n] or list(ROOT.rglob("*"))
    return [p for p in paths if p.is_file() and not p.is_symlink() and ".venv" not in p.parts]


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None


FILES = _tracked()
SOURCES = [p for p in FILES if p.suffix == ".py"]
KERNELS = [p for p in SOURCES if p.is_relative_to(ROOT / "kernels")]


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_there_is_something_to_check():
    assert len(KERNELS) > 5
    assert len(SOURCES) > len(KERNELS)


@pytest.mark.parametrize("path", KERNELS, ids=_name)
def test_kernels_import_only_torch_and_triton(path):
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules = [node.module or ""]
        elif isinstance(node, ast.ImportFrom):
            # Relative, but not out of kernels/: kernels/plan/x.py may go up two levels at most.
            assert node.level <= len(path.relative_to(ROOT / "kernels").parts), (
                f"{_name(path)}:{node.lineno} leaves kernels/"
            )
            continue
        else:
            continue
        for module in modules:
            assert module.split(".")[0] in allowed, (
                f"{_name(path)}:{node.lineno} imports {module}; kernels/ may import torch, triton, "
                "the standard library and, relatively, itself"
            )


@pytest.mark.parametrize("path", KERNELS, ids=_name)
def test_kernels_read_no_environment_variable(path):
    found = re.search(r"\bos\.environ\b|\bgetenv\(|\bimport environ\b", path.read_text("utf-8"))
    assert not found, f"{_name(path)} reads the environment ({found and found[0]})"


def test_kernels_has_no_init_at_its_root():
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would hide Hugging Face's kernels"


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_files_fit_in_the_head(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{_name(path)} has {lines} lines, at most {MAX_LINES}: split it"


# Spelt in parts, so that this file does not find itself.
_PLACES = "|".join(("work", "root", "home", "Users", "mnt", "opt"))
_HOSTS = "|".join(("py" + r"pi\.org", "python" + r"hosted\.org", r"download\.py" + r"torch\.org"))
FORBIDDEN = {
    "an absolute path of a machine": re.compile(rf"(?<![\w.}}\])/-])/(?:{_PLACES})/\w"),
    "the address of a package index": re.compile(_HOSTS, re.IGNORECASE),
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_names_a_machine_or_an_index(what):
    found = [
        f"{_name(path)}:{number}: {line.strip()[:100]}"
        for path in FILES
        if (text := _text(path)) is not None
        for number, line in enumerate(text.splitlines(), 1)
        if FORBIDDEN[what].search(line)
    ]
    assert not found, f"{what}:\n" + "\n".join(found)

"""The package is the same from a wheel, an sdist, an editable install and the bare tree."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:  # pytest brings it there
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = CONFIG["tool"]["setuptools"]

# Folders that stand at the top level and are imported from visionfuse.
LINKED = ("kernels", "pipelines", "demos")


def _run(*command, cwd, **environment) -> str:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def _sources() -> dict[str, Path]:
    """Every Python file that belongs in the package, by its place in the package."""
    files = {}
    for top, prefix in (("visionfuse", ""), *((name, f"{name}/") for name in LINKED)):
        for path in (ROOT / top).rglob("*.py"):
            inside = path.relative_to(ROOT / top)
            if inside.parts[0] not in LINKED or top != "visionfuse":
                files[f"visionfuse/{prefix}{inside.as_posix()}"] = path
    return files


def test_list_of_packages_matches_the_tree():
    tree = {name.rpartition("/")[0].replace("/", ".") for name in _sources()}
    assert set(SETUPTOOLS["packages"]) == tree


def test_links_serve_development():
    for name in LINKED:
        assert (ROOT / "visionfuse" / name).resolve() == ROOT / name
        assert os.readlink(ROOT / "visionfuse" / name) == f"../{name}"


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """What a build sees, without the links: a zip archive of the repository stores those as text files."""
    tree = tmp_path_factory.mktemp("copy") / "visionfuse"
    names = [p.relative_to(ROOT) for p in _sources().values()]
    names += [Path(n) for n in ("pyproject.toml", "README.md", "LICENSE", "visionfuse/py.typed")]
    names += [
        p.relative_to(ROOT) for p in (*ROOT.glob("kernels/**/*.json"), *ROOT.glob("visionfuse/*/*.json"))
    ]  # fmt: skip
    for name in names:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes((ROOT / name).read_bytes())
    for name in LINKED:
        (tree / "visionfuse" / name).write_text(f"../{name}")
    return tree


@pytest.fixture(scope="module")
def wheel(copy, tmp_path_factory):
    return _wheel_of(copy, tmp_path_factory.mktemp("wheel"))


def _wheel_of(source: Path, out: Path) -> Path:
    _run("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", out, source,
         cwd=out)  # fmt: skip
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def sdist(copy, tmp_path_factory):
    out = tmp_path_factory.mktemp("sdist")
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})"
    _run("-c", code, cwd=copy)
    (built,) = out.glob("*.tar.gz")
    return built


def test_wheel_has_every_file(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert set(_sources()) <= names
    assert "visionfuse/py.typed" in names
    tables = {
        f"visionfuse/{p.relative_to(ROOT).as_posix()}" for p in ROOT.glob("kernels/**/*.json")
    }
    assert tables <= names
    assert not [n for n in names if not n.startswith(("visionfuse/", "visionfuse-"))]


def test_sdist_has_every_file_once(sdist):
    with tarfile.open(sdist) as archive:
        names = {n.partition("/")[2] for n in archive.getnames()}
    expected = {p.relative_to(ROOT).as_posix() for p in _sources().values()}
    assert expected | {"pyproject.toml", "LICENSE", "README.md"} <= names


def test_hugging_face_kernels_is_never_hidden(tmp_path):
    """With this folder first on the path, `import kernels` still finds the installed package."""
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("def get_kernel(): return 'the real one'\n")
    said = _run("-c", "import visionfuse, kernels; print(kernels.get_kernel())", cwd=ROOT,
                PYTHONPATH=str(tmp_path))  # fmt: skip
    assert said == "the real one"


# Finders that have not heard of these, as on a machine where they are not installed.
WITHOUT = """
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {missing} else self.finder.find_spec(name, path, target)
sys.meta_path[:] = map(Without, sys.meta_path)
"""
BARE = {
    "triton",
    "diffusers",
    "transformers",
    "accelerate",
    "timm",
    "gradio",
    "cv2",
    "matplotlib",
    "peft",
    "natten",
    "torchao",
}
USES = """
import torch, visionfuse
from visionfuse import Recipe, recipes
from visionfuse.kernels.rational import rational
q, k, v = torch.randn(3, 1, 64, 2, 16)
plan = visionfuse.plan_attention(visionfuse.TokenLayout.joint(grids=[(8, 8)]), visionfuse.Neighborhood(window=5))
visionfuse.block_sparse_attention(q, k, v, plan.blocks)
visionfuse.neighborhood_attention(*torch.randn(3, 1, 8, 8, 2, 16), window=5)
visionfuse.sage_attention(q, k, v, tensor_layout="NHD")
rational(torch.randn(4, 8), torch.ones(6), torch.ones(4))
for name in visionfuse.RECIPES:
    assert Recipe.from_dict(recipes.build(name).to_dict()) == recipes.build(name)
from typer.testing import CliRunner
from visionfuse.cli import app
for words in (["info"], ["plan", "--grid", "8x8", "--window", "4"], ["--help"]):
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, (words, result.output, result.exception)
for words, missing in ((["demo"], "visionfuse[demo]"), (["generate"], "diffusers"), (["profile", "flux.1-dev"], "diffusers")):
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2 and missing in result.output, (words, result.output, result.exception)
print(visionfuse.kernels.plan.__file__)
"""


def test_the_bare_tree_works_with_torch_alone():
    """Without a GPU, Triton, diffusers and all else that is not torch: what needs them says so, the rest runs."""
    code = WITHOUT.format(missing=BARE) + USES
    said = _run("-c", code, cwd=ROOT, CUDA_VISIBLE_DEVICES="")
    assert Path(said.splitlines()[-1]).is_relative_to(ROOT)


def _pythons() -> dict[str, str]:
    """The interpreters of this machine among those that pyproject.toml names: version -> executable."""
    named = re.findall(r"Python :: (3\.\d+)", "\n".join(CONFIG["project"]["classifiers"]))
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    found = {}
    for version in named:
        places = [shutil.which(f"python{version}"), *pyenv.glob(f"{version}.*/bin/python")]
        works = (
            str(p)
            for p in places
            if p and not subprocess.run([p, "-V"], capture_output=True).returncode
        )
        if executable := next(works, None):
            found[version] = executable
    return found


def _environment(python: str, wheel: Path, home: Path) -> Path:
    """A virtual environment with the wheel and nothing else: its interpreter."""
    subprocess.run([python, "-m", "venv", "--without-pip", home], check=True)
    made = home / "bin" / "python"
    _run("-m", "pip", "--python", made, "install", "--quiet", "--no-deps", "--no-index", wheel,
         cwd=home)  # fmt: skip
    return made


def _outside(*command, cwd: Path) -> str:
    """What a command says to whom nothing of this environment is known."""
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, capture_output=True, text=True, env={"PATH": "", "HOME": str(cwd)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


PYTHONS = _pythons()
OUTER = list(PYTHONS)[
    :: max(1, len(PYTHONS) - 1)
]  # what the oldest and the newest take, those between do


@pytest.mark.parametrize(
    "version", [v if v in OUTER else pytest.param(v, marks=pytest.mark.slow) for v in PYTHONS]
)
def test_every_python_takes_the_wheel(wheel, tmp_path, version):
    """pip accepts it there, it compiles in whole, and `import visionfuse` needs nothing else."""
    python = _environment(PYTHONS[version], wheel, tmp_path / "env")
    said = _outside(python, "-c", "import sys, visionfuse; print(visionfuse.__version__, visionfuse.__file__)",
                    cwd=tmp_path)  # fmt: skip
    assert said.startswith(CONFIG["project"]["version"])
    assert str(tmp_path) in said
    (package,) = (tmp_path / "env").glob("lib/python*/site-packages/visionfuse")
    _outside(
        python, "-W", "error::SyntaxWarning", "-m", "compileall", "-q", "-f", package, cwd=tmp_path
    )


def test_a_clean_environment(sdist, tmp_path):
    """From an sdist to a wheel, into a virtual environment, to the command: outside of the tree."""
    wheel = _wheel_of(sdist, tmp_path)
    home = tmp_path / "env"
    python = _environment(sys.executable, wheel, home)
    (site,) = home.glob("lib/python*/site-packages")
    # torch and the like are the ones of this environment, less visionfuse itself: its editable install is a hook.
    (site / "torch.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")))
    said = _outside(
        home / "bin" / "visionfuse", "plan", "--grid", "16x16", "--window", "8", cwd=tmp_path
    )
    assert "density" in said
    code = (
        "import visionfuse.demos as d, visionfuse.pipelines as p, visionfuse.kernels.attention as a; "
        "print(d.__file__, p.__file__, a.__file__)"
    )
    for path in _outside(python, "-c", code, cwd=tmp_path).split():
        assert Path(path).is_relative_to(home)

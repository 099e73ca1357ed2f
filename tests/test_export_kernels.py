"""kernels/ as a kernel repository of the Hugging Face Hub: complete, alone, and beside visionfuse."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from visionfuse.pipelines.export_kernels import BACKENDS, SOURCE, export

# Where `make test` puts Hugging Face's kernels: beside site-packages its name would hide our folder from the reference.
HUB = Path(sys.prefix, "hub-kernels")
USE = """
import torch
import torch.nn.functional as F

torch.manual_seed(0)
q, k, v = torch.randn(3, 1, 40 + 16 * 20, 2, 32)
layout = vf.TokenLayout.joint(text=40, grids=[(16, 20)])
plan = vf.plan_attention(layout, vf.Neighborhood(window=(16, 20)), order=vf.Order(kind="row"))
out = vf.block_sparse_attention(q, k, v, plan.blocks)
expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
assert torch.allclose(out, expected, atol=1e-5)
fit = vf.coefficients("gelu")
x = torch.linspace(-2, 2, 64)[None]
y = vf.rational(x, torch.tensor(fit.numerator), torch.tensor(fit.denominator))
assert torch.allclose(y, F.gelu(x), atol=0.02)
"""
# What `kernels` does with a variant, in its own order: metadata, then the module by its id.
BY_ITS_RULES = """
import importlib.util, json, sys
from pathlib import Path
folder = Path(sys.argv[1])
name = json.loads((folder / "metadata.json").read_text())["id"]
spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
vf = importlib.util.module_from_spec(spec)
sys.modules[name] = vf
spec.loader.exec_module(vf)
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "repository"
    export(folder)
    return folder


def run(code: str, *arguments, cwd) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=cwd, capture_output=True, text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HUB)},
    )  # fmt: skip
    return done


def test_layout(repository):
    files = {p.relative_to(SOURCE) for p in SOURCE.rglob("*.py")} | {
        p.relative_to(SOURCE) for p in SOURCE.rglob("*.json")
    }
    for backend in BACKENDS:
        folder = repository / "build" / f"torch-{backend}"
        assert {p.relative_to(folder) for p in folder.rglob("*") if p.is_file()} == {
            *files, *map(type(folder), ("__init__.py", "metadata.json")),
        }  # fmt: skip
        facts = json.loads((folder / "metadata.json").read_text())
        assert facts["backend"] == {"type": backend}
        for file in folder.rglob("*.py"):
            assert '"visionfuse::' not in file.read_text(), (
                f"{file.name}: an op of visionfuse's own namespace"
            )
    assert (repository / "README.md").read_text().startswith("---\nlicense: mit")


@pytest.mark.parametrize(
    "first", ["", "import visionfuse.kernels.attention, visionfuse.kernels.rational\n"]
)
def test_it_loads_alone_and_beside_visionfuse(repository, tmp_path, first):
    alone = (
        ""
        if first
        else "assert not [m for m in sys.modules if m.split('.')[0] == 'visionfuse'], sys.modules"
    )
    done = run(first + BY_ITS_RULES + USE + alone, repository / "build" / "torch-cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_hugging_face_kernels_loads_it(repository, tmp_path):
    if run("from kernels import get_local_kernel", cwd=tmp_path).returncode:
        pytest.skip("Hugging Face's kernels is not installed: pip install kernels")
    load = "import sys\nfrom pathlib import Path\nfrom kernels import get_local_kernel\n"
    load += "vf = get_local_kernel(Path(sys.argv[1]), backend='cpu')\n"
    done = run(load + USE, repository, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_it_overwrites_nothing_else(repository, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        export(tmp_path)
    assert len(export(repository)) == len(BACKENDS)  # again is fine

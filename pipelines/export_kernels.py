"""Write kernels/ as a kernel repository of the Hugging Face Hub, from which `kernels.get_kernel` loads it.

    python pipelines/export_kernels.py build/hub-kernel
    hf upload OWNER/visionfuse build/hub-kernel --repo-type kernel

    from kernels import get_kernel
    attention = get_kernel("OWNER/visionfuse", version=1).block_sparse_attention

Nothing is compiled: the kernels are Triton and PyTorch, so one copy serves every version of both. Layout (kernels 0.17):
`build/torch-BACKEND/{metadata.json, __init__.py, ...}`. The ops get a namespace of their own, because a process may
have loaded visionfuse too.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Annotated

import typer

SOURCE = Path(__file__).resolve().parents[1] / "kernels"
BACKENDS = ("cpu", "cuda", "rocm")
VERSION = 1  # of the repository; a change that breaks callers takes the next
NAMESPACE = f"visionfuse_kernels_{VERSION}"
# Where the namespace of the ops stands in the sources.
OPS = re.compile(r'(?<=")visionfuse(?=::|"\s*,\s*"FRAGMENT")|(?<=ops\.)visionfuse(?=\.)')
INIT = '''"""Block-sparse and low-precision attention, rational and KAN layers: the kernels of visionfuse."""

from .attention import BlockBias, Precision, RelativeBias, block_sparse_attention
from .kan import rswaf_linear
from .order import Order
from .plan import Dense, Neighborhood, TokenLayout, compress, plan_attention
from .rational import coefficients, rational

__all__ = [
    "BlockBias", "Dense", "Neighborhood", "Order", "Precision", "RelativeBias", "TokenLayout",
    "block_sparse_attention", "coefficients", "compress", "plan_attention", "rational", "rswaf_linear",
]
'''
CARD = """---
license: mit
library_name: kernels
tags: [kernel, attention, triton]
---

# visionfuse kernels

Block-sparse and low-precision attention for vision and diffusion transformers, rational activations (KAT) and KAN layers, in Triton and
PyTorch; forward and backward; on a CPU too.

```python
import torch
from kernels import get_kernel

vf = get_kernel("OWNER/visionfuse", version=VERSION)
plan = vf.plan_attention(vf.TokenLayout.joint(text=64, grids=[(64, 64)]), vf.Neighborhood(window=24, stride=8), order=vf.Order(kind="row"))
out = vf.block_sparse_attention(q, k, v, plan.blocks)                  # (batch, 64 + 4096, heads, head dim)
```
"""


def export(out: Path) -> list[Path]:
    """Writes the repository and returns the folder of every backend. Raises ValueError where something else is."""
    if out.exists() and any(out.iterdir()) and not (out / "build").is_dir():
        raise ValueError(f"{out} is no kernel repository and not empty. Name another folder.")
    out.mkdir(parents=True, exist_ok=True)
    (out / "README.md").write_text(CARD.replace("VERSION", str(VERSION)), encoding="utf-8")
    return [_variant(out / "build" / f"torch-{backend}", backend) for backend in BACKENDS]


def _variant(folder: Path, backend: str) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    for path in sorted(SOURCE.rglob("*")):
        if path.suffix not in (".py", ".json"):
            continue
        copy = folder / path.relative_to(SOURCE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(OPS.sub(NAMESPACE, path.read_text(encoding="utf-8")), encoding="utf-8")
    (folder / "__init__.py").write_text(INIT, encoding="utf-8")
    facts = {
        "id": f"{NAMESPACE}_{backend}", "name": "visionfuse", "version": VERSION, "license": "MIT",
        "python-depends": [], "backend": {"type": backend},
    }  # fmt: skip
    (folder / "metadata.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return folder


def main(
    out: Annotated[Path, typer.Argument(help="Folder of the repository.")] = Path(
        "build/hub-kernel"
    ),
) -> None:
    """Write kernels/ as a kernel repository of the Hugging Face Hub."""
    for folder in export(out):
        print(folder)


if __name__ == "__main__":
    typer.run(main)

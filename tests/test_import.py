"""Importing visionfuse is light, and the methods are there whichever comes first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_loads_neither_torch_nor_diffusers_nor_triton():
    heavy = "[m for m in ('torch', 'triton', 'diffusers', 'transformers') if m in sys.modules]"
    assert python(f"import sys, visionfuse; print({heavy})") == "[]"


def test_recipes_and_the_op_load_neither_triton_nor_diffusers():
    heavy = "[m for m in ('triton', 'diffusers', 'transformers') if m in sys.modules]"
    code = (
        "import sys; from visionfuse import Recipe, recipes, block_sparse_attention, plan_attention"
    )
    assert python(f"{code}; recipes.build('gna'); print({heavy})") == "[]"


ORDERS = [
    "import visionfuse, diffusers",
    "import diffusers, visionfuse",
    "from diffusers import ModularPipeline; import visionfuse",
    "from diffusers import DiffusionPipeline; import visionfuse",
    "import visionfuse; from diffusers import FluxPipeline",
]
METHODS = """
from diffusers import DiffusionPipeline, FluxPipeline, ModularPipeline
for cls in (DiffusionPipeline, FluxPipeline, ModularPipeline):
    for name in ("enable_visionfuse", "disable_visionfuse"):
        assert callable(getattr(cls, name)), (cls, name)
import sys
assert not [f for f in sys.meta_path if "visionfuse" in type(f).__module__], sys.meta_path
module = sys.modules["diffusers.pipelines.pipeline_utils"]
from importlib.machinery import SourceFileLoader
assert type(module.__spec__.loader) is type(module.__loader__) is SourceFileLoader
from diffusers.models.attention_dispatch import AttentionBackendName
assert "visionfuse" not in list(AttentionBackendName)  # only once a pipeline is enabled
"""
# These take most of the time, and no part in it: children begin where they are loaded.
IN_CHILDREN = """
import os, sys, traceback
import peft, requests, torch
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast
assert not {{"diffusers", "visionfuse"}} & set(sys.modules)
failed = []
for code in {codes!r}:
    if child := os.fork():
        if os.waitpid(child, 0)[1]:
            failed.append(code)
        continue
    try:
        exec(code)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
sys.exit("failed: " + "\\n".join(failed) if failed else 0)
"""


def test_methods_exist_in_either_order():
    python(IN_CHILDREN.format(codes=[order + METHODS for order in ORDERS]))


def test_every_export_exists():
    import visionfuse

    tables = {*visionfuse._EXPORTS, *visionfuse._MODULES, "__version__"}
    assert set(visionfuse.__all__) == tables
    for name in visionfuse.__all__:
        assert getattr(visionfuse, name) is not None
        assert name in dir(visionfuse)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = visionfuse.nothing

"""The plugin that lets timm's own tests see our models: `run_timm_tests`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
FILE = """
import pytest, timm

@pytest.mark.parametrize("model_name", ["resnet18", "kat_tiny_patch16_224", "nat_mini.in1k", *timm.list_models("medvit_t*")])
def test_of_timm(model_name): ...

def test_of_no_model(): ...
"""


def test_our_models_are_registered_and_theirs_left_out(tmp_path):
    (tmp_path / "test_models.py").write_text(FILE)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "run_timm_tests", "test_models.py"],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    found = [line.partition("[")[2] for line in done.stdout.splitlines() if "::" in line]
    assert found == ["kat_tiny_patch16_224]", "nat_mini.in1k]", "medvit_tiny]"], done.stdout

"""The kernels of KAN layers compiled for GPUs that are not here: tensor cores, spills, shared memory.

Run as a script with a target as JSON, the file compiles for it and prints what the kernels need, because the
Triton interpreter, which other tests turn on, replaces the compiler for a whole process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 180
# the instruction of a matrix product, shared memory of a program in KiB
TARGETS = {
    ("cuda", 80): ("mma.sync", 163),
    ("cuda", 86): ("mma.sync", 99),
    ("cuda", 89): ("mma.sync", 99),
    ("cuda", 90): ("wgmma.mma_async", 227),
    ("cuda", 100): ("tcgen05.mma", 227),
    ("cuda", 120): ("mma.sync", 99),
    ("hip", "gfx942"): ("v_mfma", 64),
    ("hip", "gfx950"): ("v_mfma", 160),
}
CASES = {"bf16": ("bfloat16", "bfloat16"), "autocast": ("float32", "bfloat16"), "fp32": ("float32", "float32")}  # fmt: skip
ROWS, CHANNELS, OUTPUTS, COUNT = 6272, 512, 1024, 8  # the last stage of MedViT-S, batch 128


def test_hopper():
    check(("cuda", 90), ["bf16"])


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS, ids=lambda t: f"{t[0]}-{t[1]}")
def test_every_gpu(target):
    check(target, list(CASES))


def check(target: tuple[str, int | str], names: list[str]) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, __file__, json.dumps([*target, names])], capture_output=True, text=True,
        env=environment, timeout=SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    instruction, limit = TARGETS[target]
    for name, found in json.loads(done.stdout.splitlines()[-1]).items():
        assert found["spills"] in (0, None), (name, found)
        assert found["shared"] <= limit * 1024, (name, found)
        if not name.startswith("fp32"):
            assert instruction in found["products"], (name, found)
        assert not found["drops_nan"], name


def report(backend: str, arch: int | str, names: list[str]) -> dict:
    """By case and kernel: spills, shared memory and the matrix instructions that occur."""
    import torch

    from visionfuse.kernels.kan import triton_rswaf as kernels
    from visionfuse.testing import compile_target, kernel_report

    options = (-2.0, 2.0, 0.33)
    facts = {}
    for name in names:
        of_x, of_w = (getattr(torch, dtype) for dtype in CASES[name])
        x, dx = (torch.empty(ROWS, CHANNELS, dtype=of_x) for _ in range(2))
        w = torch.empty(OUTPUTS, CHANNELS * COUNT, dtype=of_w)
        y = torch.empty(ROWS, OUTPUTS, dtype=of_w)
        with compile_target(backend, arch):
            launches = {
                kernels.forward_kernel: kernels.forward_launch(x, w, y, *options),
                kernels.dx_kernel: kernels.dx_launch(y, x, w, dx, *options),
                kernels.dw_kernel: kernels.dw_launch(y, x, w, *options)[:3],
            }
            for kernel, (grid, arguments, how) in launches.items():
                found = kernel_report(kernel.warmup(*arguments, **how, grid=grid))
                facts[f"{name} {kernel.fn.__name__}"] = {
                    "shared": found.shared, "spills": found.spills, "registers": found.registers,
                    "products": [i for i, _ in TARGETS.values() if i in found.assembly],
                    "drops_nan": "min.f32" in found.assembly,  # of NVIDIA; min.NaN.f32 keeps it
                }  # fmt: skip
    return facts


if __name__ == "__main__":
    print(json.dumps(report(*json.loads(sys.argv[1]))))

"""The rational kernels compiled for GPUs that are not here: spills, layout of threads, instructions per element.

Run as a script with one case as JSON, the file compiles it and prints what it needs, because the Triton
interpreter, which other tests turn on, replaces the compiler for a whole process.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 180
TARGETS = [
    ("cuda", 80), ("cuda", 86), ("cuda", 89), ("cuda", 90), ("cuda", 100), ("cuda", 120),
    ("hip", "gfx942"), ("hip", "gfx950"),
]  # fmt: skip
# shape, channel dim, dtypes of x and of y, version
CASES = {
    "bf16": ((128, 197, 768), -1, "bfloat16", "bfloat16", "A"),
    "autocast": ((128, 197, 384), -1, "float32", "bfloat16", "A"),
    "fp32": ((128, 197, 3072), -1, "float32", "float32", "A"),
    "nchw": ((16, 64, 56, 56), 1, "float16", "float16", "B"),
    "odd": ((3, 5, 56), -1, "bfloat16", "bfloat16", "C"),
}


def compiled(*case) -> dict:
    """What a process of its own reports."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, __file__, json.dumps(case)], capture_output=True, text=True,
        env=environment, timeout=SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS, ids=lambda t: f"{t[0]}-{t[1]}")
def test_every_gpu(target):
    for name, found in compiled(target, list(CASES)).items():
        assert found["spills"] == 0, name
        assert not found["conversions"], f"{name}: vectors go through shared memory"


def test_hopper_stays_lean():
    found = compiled(("cuda", 90), ["bf16"])
    for name in ("bf16 forward", "bf16 backward"):
        # A warp reads 512 bytes of a row: with rows first in a tile it is 64, at 65% of the speed.
        assert found[name]["threads"] == 32, name
        assert found[name]["spills"] == 0, name
    # Instructions and memory limit it alike, at 41 an element and eight programs on a multiprocessor.
    assert found["bf16 backward"]["instructions"] <= 41
    assert found["bf16 backward"]["registers"] <= 64


def report(target: tuple[str, int | str], names: list[str]) -> dict:
    """By case and direction: what the compiled kernels need."""
    from unittest import mock

    import torch

    from visionfuse.kernels.rational import triton_backward, triton_forward
    from visionfuse.testing import compile_target

    facts = {}
    for name in names:
        shape, channel_dim, dtype, out_dtype, version = CASES[name]
        x = torch.empty(shape, dtype=getattr(torch, dtype))
        y = torch.empty(shape, dtype=getattr(torch, out_dtype))
        a, b = torch.empty(1, 6), torch.empty(8, 4)
        with (
            compile_target(*target),
            mock.patch.object(triton_backward, "_multiprocessors", return_value=132),
        ):
            grid, arguments, options = triton_forward.launch(x, y, a, b, version, channel_dim)
            kernel = triton_forward.forward_kernel.warmup(*arguments, **options, grid=grid)
            facts[f"{name} forward"] = needs(kernel, options)
            grid, arguments, options, partial = triton_backward.launch(
                y, x, torch.empty_like(x), a, b, version, channel_dim, True
            )
            kernel = triton_backward.backward_kernel.warmup(*arguments, **options, grid=grid)
            facts[f"{name} backward"] = needs(kernel, options)
            grid, arguments, options = triton_backward.reduce_launch(
                partial, b, torch.empty_like(a), torch.empty_like(b), version
            )
            triton_backward.reduce_kernel.warmup(*arguments, **options, grid=grid)
    return facts


def needs(kernel, options: dict) -> dict:
    """threads: of a warp along a row. conversions: of whole tiles to another layout. instructions: of the
    loop, per element; None where no disassembler tells."""
    layout = re.search(r"threadsPerWarp = \[(\d+)", kernel.asm["ttgir"])
    assert layout
    width = options["W"]
    tiles = rf"convert_layout.*tensor<\d+x\d+x(\d+x)?{width}x" if width > 1 else "nothing"
    facts = {
        "threads": int(layout[1]), "conversions": len(re.findall(tiles, kernel.asm["ttgir"])),
        "instructions": None,
    }  # fmt: skip
    if "amdgcn" in kernel.asm:
        spills = re.search(r"\.vgpr_spill_count:\s+(\d+)", kernel.asm["amdgcn"])
        assert spills
        return facts | {"spills": int(spills[1]), "registers": None}
    usage, listing = (dump(kernel, option) for option in ("-res-usage", "-sass"))
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    elements = options["BR"] * options.get("BU", 1) * options["BV"] * options["W"]
    elements /= 32 * options["num_warps"]
    facts["instructions"] = sum(longest_loop(listing).values()) / elements
    return facts | {"spills": int(stack), "registers": int(registers)}


def dump(kernel, option: str) -> str:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        done = subprocess.run(
            [tools / "cuobjdump", option, file.name], capture_output=True, text=True
        )
    return done.stdout + done.stderr


def longest_loop(listing: str) -> Counter:
    """Instructions from the target of the longest backward branch to the branch."""
    lines = [
        (int(where, 16), text)
        for where, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", listing)
    ]
    loops = [Counter()]
    for here, text in lines:
        target = re.search(r"BRA.*?0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < here:
            body = [t for where, t in lines if int(target[1], 16) <= where <= here]
            loops.append(Counter(re.sub(r"^@!?U?P\w+\s+", "", t).split()[0] for t in body))
    return max(loops, key=lambda loop: sum(loop.values()))


if __name__ == "__main__":
    print(json.dumps(report(*json.loads(sys.argv[1]))))

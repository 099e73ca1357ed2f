"""The prologue as torch.compile and CUDA graphs see it, and what its kernels need on a Hopper GPU.

Run as a script, the file compiles the kernels for a GPU that is not there and prints what they need: the
interpreter replaces the compiler for a whole process, so this takes a process of its own.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import library

from visionfuse.kernels.attention.prologue import PrologueSpec, prologue, prologue_op
from visionfuse.kernels.attention.prologue.launch import Inputs, plan_launches
from visionfuse.testing import compile_target, kernel_report

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROOT = Path(__file__).resolve().parents[1]
INT8 = PrologueSpec(qk="int8", k_rows=128, v="fp8", v_layout="channels16", smooth_k=True)
FP8 = PrologueSpec(qk="fp8", q_rows=4, k_rows=16, v="fp8", softmax_scale=0.3)


def make_inputs(length=77, dim=64, batch=2):
    """q of 4 heads, k and v of 2, and all options, random."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=g).to(DEVICE)

    angle = normal(length, dim // 2).repeat_interleave(2, 1)
    return tuple(normal(batch, length, heads, dim) for heads in (4, 2, 2)), {
        "norm_q": 1 + 0.2 * normal(dim),
        "norm_k": 1 + 0.2 * normal(dim),
        "rotary": (angle.cos(), angle.sin()),
        "order": torch.randperm(length, generator=g).to(DEVICE),
    }


# As an op -------------------------------------------------------------------------------------------

SCHEMA_ORDER = ("norm_q", "norm_k", "cos", "sin", "order", "key_order")


def op_arguments(spec, options):
    cos, sin = options.get("rotary") or (None, None)
    tensors = {**options, "cos": cos, "sin": sin}
    return (
        spec.qk, spec.q_rows, spec.k_rows, spec.k_groups, spec.v, spec.v_layout, spec.v_padding, spec.smooth_k,
        spec.softmax_scale, spec.eps, *(tensors.get(name) for name in SCHEMA_ORDER),
    )  # fmt: skip


@pytest.mark.parametrize("spec", [PrologueSpec(), INT8, FP8], ids=["same", "int8", "fp8"])
def test_the_op_keeps_its_contract(spec):
    tensors, options = make_inputs(length=20, dim=32, batch=1)
    options["key_order"] = torch.arange(19, -1, -1, device=DEVICE)
    # Not "test_aot_dispatch_dynamic" and autograd: there is no backward.
    checks = ("test_schema", "test_faketensor")
    library.opcheck(prologue_op, (*tensors, *op_arguments(spec, options)), test_utils=checks)
    library.opcheck(prologue_op, (*tensors, *op_arguments(spec, {})), test_utils=checks)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("spec", [PrologueSpec(), INT8, FP8], ids=["same", "int8", "fp8"])
def test_compiles_into_one_graph(spec, backend):
    tensors, options = make_inputs(length=20, dim=32, batch=1)

    def call(q, k, v, options):
        got = prologue(q + 0, k, v, spec, **options)
        return [x for x in got if x is not None]

    for kept in (options, {}):
        torch.compiler.reset()
        compiled = torch.compile(call, fullgraph=True, backend=backend)
        for x, y in zip(compiled(*tensors, kept), call(*tensors, kept), strict=True):
            assert x.dtype == y.dtype
            assert torch.equal(x.float(), y.float())


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_cuda_graphs_and_side_streams():
    tensors, options = make_inputs(length=300)
    expected = prologue(*tensors, INT8, **options)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        other = prologue(*tensors, INT8, **options)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    held = [x.clone() for x in tensors]
    with torch.cuda.graph(graph):
        captured = prologue(*held, INT8, **options)
    for x in captured[:3]:
        x.view(torch.uint8).fill_(1)
    for x in held:
        x.mul_(2)
    for x, y in zip(held, tensors, strict=True):
        x.copy_(y)
    graph.replay()
    torch.cuda.synchronize()
    for got in (other, captured):
        for x, y in zip(got, expected, strict=True):
            assert (x is None and y is None) or torch.equal(x.float(), y.float())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_of_another_device_than_the_current_one():
    tensors, options = make_inputs(length=40)
    expected = prologue(*tensors, INT8, **options)

    def moved(x):
        return tuple(map(moved, x)) if isinstance(x, tuple) else x.to("cuda:1")

    for _ in range(2):
        got = prologue(*moved(tensors), INT8, **{n: moved(x) for n, x in options.items()})
        for x, y in zip(got, expected, strict=True):
            assert (x is None and y is None) or torch.equal(x.cpu().float(), y.cpu().float())


# Compilation without a GPU ------------------------------------------------------------------------

SPECS = {"same": PrologueSpec(smooth_k=True, v_layout="channels"), "int8": INT8, "fp8": FP8,
         "blocks": replace(FP8, qk="int8", q_rows=128, k_rows=128),
         "groups": replace(FP8, qk="int8", k_rows=128, k_groups=4)}  # fmt: skip
COMPILED = [(name, dim, halves) for name in SPECS for dim in (64, 128) for halves in (False, True)]
FAST = [(name, 64 if i % 2 else 128, i % 3 > 0) for i, name in enumerate(SPECS)]


@pytest.mark.parametrize(
    "cases", [FAST, pytest.param(COMPILED, marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_compiles_for_hopper_without_spills_and_in_wide_accesses(cases):
    run = subprocess.run(
        [sys.executable, __file__, json.dumps(cases)], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    wrong = {}
    for case, reports in zip(cases, json.loads(run.stdout.splitlines()[-1]), strict=True):
        assert any("rows_kernel" in name for name in reports), case
        for name, report in reports.items():
            # 4 bytes: sums of K with halves of a rotary table, head dim 64.
            good = report["spills"] <= (4 if "first_kernel" in name else 0)
            if "first_kernel" not in name:  # stores of 16 bytes, none of one
                stores = report["stores"]
                good &= "st.global.v4.b32" in stores and "st.global.b8" not in stores
            if not good:
                wrong[f"{case} {name}"] = report
    assert not wrong


def compile_all(cases):
    found = []
    for name, dim, halves in cases:
        q, k = (torch.zeros(1, 300, heads, dim, dtype=torch.bfloat16) for heads in (24, 8))
        weight, table = torch.ones(dim), torch.zeros(300, dim // 2 if halves else dim)
        inputs = Inputs(q, k, k, weight, weight, table, table, torch.arange(300), None)
        _, launches = plan_launches(inputs, SPECS[name], early=True)
        reports = {}
        for launch in launches:
            with compile_target("cuda", 90):
                kernel = launch.kernel.warmup(*launch.arguments, grid=launch.grid, **launch.options)
                report = kernel_report(kernel)
            lines = report.assembly.splitlines()
            stores = sorted(
                {word for line in lines for word in line.split() if "st.global" in word}
            )
            reports[f"{launch.kernel.__name__} {len(reports)}"] = {
                "spills": report.spills, "registers": report.registers, "stores": stores,
            }  # fmt: skip
        found.append(reports)
    print(json.dumps(found))


if __name__ == "__main__":
    compile_all(json.loads(sys.argv[1]))

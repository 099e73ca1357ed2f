"""The Hopper kernel: compiled here for a GPU that is not there, run where there is one.

Run as a script, the file compiles variants of the kernel and prints what they need: the Triton
interpreter, which other tests turn on, replaces the compiler for a whole process.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from visionfuse.kernels.plan import (
    Dense,
    Neighborhood,
    TokenLayout,
    plan_attention,
)
from visionfuse.testing import check_attention, random_plan

ROOT = Path(__file__).resolve().parents[1]
hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
    reason="needs a Hopper GPU",
)


def check(plan, *, batch=1, heads=2, kv_heads=None, dim=128, dtype=torch.bfloat16, scale=None):
    from visionfuse.kernels.attention import gluon_sm90

    plan = plan.to("cuda")
    g = torch.Generator("cuda").manual_seed(0)
    q = torch.randn(batch, plan.length_q, heads, dim, generator=g, device="cuda", dtype=dtype)
    k, v = (
        torch.randn(
            batch, plan.length_k, kv_heads or heads, dim, generator=g, device="cuda", dtype=dtype
        )
        for _ in range(2)
    )
    assert not gluon_sm90.unsupported(q, k, v, plan)
    check_attention(gluon_sm90.forward, q, k, v, plan, scale or dim**-0.5)


def planned(grid, text=0, **spec):
    rule = Neighborhood(**spec) if spec else Dense()
    layout = TokenLayout.joint(text=text, grids=[grid])
    return plan_attention(layout, rule, impl="gluon_sm90", head_dim=128).blocks


@hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("length", [128, 384, 1000, 1])
def test_dense(length, dim, dtype):
    check(planned((length,)), dim=dim, dtype=dtype, batch=2)


@hopper
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(
    ("grid", "text", "spec"),
    [
        ((64, 48), 77, {"window": (24, 16), "stride": 8}),
        ((37, 29), 5, {"window": 9}),
        ((9, 20, 22), 0, {"window": (4, 8, 8)}),
        (
            (9, 20, 22),
            3,
            {"window": (3, 8, 8), "stride": (1, 4, 4), "causal": (True, False, False)},
        ),
        ((2000,), 0, {"window": 300, "dilation": 3}),
    ],
    ids=str,
)
def test_neighborhoods(grid, text, spec, dim):
    check(planned(grid, text, **spec), dim=dim)


@hopper
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("ragged", [False, True])
def test_random_lists(seed, ragged):
    plan = random_plan(
        seed, length_q=700, length_k=900, block_q=192 if seed % 3 else 128, block_k=128, ragged=ragged,
        axes=1 + seed % 3, tables=1 + seed % 2,
    )  # fmt: skip
    check(plan, batch=2, heads=4, kv_heads=2, dim=64 if seed % 2 else 128)


@hopper
def test_several_words_of_bounds():
    plan = random_plan(3, length_q=400, length_k=600, block_q=192, block_k=128, axes=6, tables=3)
    for x in (plan.mask.lo, plan.mask.hi, plan.mask.coord):
        x.mul_(1000).sub_(3000)
    check(plan)


@hopper
def test_variants_of_heads():
    plan = random_plan(6, length_q=300, length_k=300, block_q=192, block_k=128, variants=4)
    for shape in ((2, 1), (1, 2), (2, 2)):
        variant = torch.arange(shape[0] * shape[1], dtype=torch.int32).view(shape) * 3 % 4
        check(replace(plan, variant=variant), batch=2, heads=2, kv_heads=1)


@hopper
def test_reads_fused_projections_and_repeats_exactly():
    from visionfuse.kernels.attention import gluon_sm90

    plan = planned((40, 40), 16, window=16, stride=4).to("cuda")
    qkv = torch.randn(2, plan.length_q, 3, 4, 128, device="cuda", dtype=torch.bfloat16)
    q, k, v = qkv.unbind(2)
    first = gluon_sm90.forward(q, k, v, plan, 0.1, False)[0]
    again = gluon_sm90.forward(*(x.contiguous() for x in (q, k, v)), plan, 0.1, False)[0]
    assert torch.equal(first, again)


@hopper
def test_captured_in_a_graph_on_a_side_stream():
    from visionfuse.kernels.attention import block_sparse_attention

    plan = planned((48, 48), 16, window=16, stride=8).to("cuda")
    q, k, v = torch.randn(3, 1, plan.length_q, 4, 128, device="cuda", dtype=torch.bfloat16)
    expected = block_sparse_attention(q, k, v, plan, impl="gluon_sm90")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = block_sparse_attention(q, k, v, plan, impl="gluon_sm90")
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


VARIANTS = [
    # groups, head dim, words of bounds, ragged entries, lse
    (3, 128, 0, False, False),
    (3, 128, 1, True, True),
    (2, 128, 0, True, False),
    (2, 128, 1, True, True),
    (3, 64, 0, False, True),
    (2, 64, 1, True, False),
]


def test_compiles_for_hopper_without_spills_in_the_unmasked_loop():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for variant, report in zip(VARIANTS, json.loads(done.stdout), strict=True):
        assert report["shared"] <= 227 * 1024, variant
        assert not report["serialized"], variant
        assert report["wgmma"], variant
        assert report["tma"], variant
        if not variant[2]:
            assert report["spills"] == 0, variant


def compile_variant(groups: int, head_dim: int, words: int, ragged: bool, lse: bool) -> dict:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    from visionfuse.kernels.attention import gluon_sm90 as module
    from visionfuse.kernels.attention.gluon_sm90_kernel import forward_kernel
    from visionfuse.testing import kernel_report

    def boxes(dtype: str, shape: list[int]) -> str:
        kind = {"bf16": gl.bfloat16, "i32": gl.int32}[dtype]
        return f"tensordesc<{dtype}{shape},{gl.NVMMASharedLayout.get_default_for(shape, kind)!r}>"

    names = forward_kernel.arg_names
    entry, consumer, producer = module._REGISTERS[groups]
    signature = {n: "*i32" if n.startswith("p_") else "i32" for n in names}
    constants = {
        "D": head_dim, "BM": module.ROWS, "BN": module.BLOCK_K, "GROUPS": groups,
        "STAGES": module.stages(head_dim, groups, words), "WORDS": words, "TABLES": False, "RAGGED": ragged,
        "LSE": lse, "REGISTERS": consumer, "PRODUCER_REGISTERS": producer,
    }  # fmt: skip
    signature |= {
        "q_desc": boxes("bf16", [1, 1, module.ROWS, head_dim]),
        "k_desc": boxes("bf16", [1, 1, module.BLOCK_K, head_dim]),
        "v_desc": boxes("bf16", [1, 1, module.BLOCK_K, head_dim]),
        "coord_desc": boxes("i32", [1, module.BLOCK_K]),
        "run_desc": boxes("i32", [1, module.BLOCK_K]),
        "p_o": "*bf16", "p_lse": "*fp32", "scale_log2": "fp32",
    }  # fmt: skip
    signature |= dict.fromkeys(constants, "constexpr")
    kernel = triton.compile(
        GluonASTSource(fn=forward_kernel, signature=signature, constexprs=constants, attrs={}),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": 4, "maxnreg": entry},
    )
    report = kernel_report(kernel)
    return {
        "shared": report.shared,
        "spills": report.spills,
        "serialized": report.serialized,
        "wgmma": "wgmma.mma_async" in report.assembly,
        "tma": "cp.async.bulk.tensor" in report.assembly,
    }


if __name__ == "__main__":
    print(json.dumps([compile_variant(*variant) for variant in VARIANTS]))

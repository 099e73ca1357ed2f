"""The Hopper kernel: compiled here for a GPU that is not there, run where there is one.

Run as a script, the file compiles variants of the kernel and prints what they need: the Triton
interpreter, which other tests turn on, replaces the compiler for a whole process.
"""

import json
import os
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from visionfuse.kernels.plan import (
    Dense,
    Neighborhood,
    TokenLayout,
    plan_attention,
)
from visionfuse.testing import check_attention, compile_target, kernel_report, random_plan

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
@pytest.mark.parametrize("block_k", [128, 48])
@pytest.mark.parametrize("block_q", [192, 100])
def test_bits(block_q, block_k):
    check(
        random_plan(
            block_q, length_q=500, length_k=600, block_q=block_q, block_k=block_k, kind="bits"
        )
    )


@hopper
@pytest.mark.parametrize("dim", [8, 36, 40, 72, 80, 96, 160, 256])
def test_head_dims(dim):
    plan = random_plan(
        1, length_q=300, length_k=400, block_q=192 if dim <= 128 else 128, block_k=128
    )
    check(plan, batch=2, heads=2, kv_heads=1, dim=dim)


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


# Without a GPU -----------------------------------------------------------------------------------


@contextmanager
def compiled_launches():
    """Inside, the host side runs on CPU tensors; yields a list that gets the report of every launch."""
    from visionfuse.kernels.attention import gluon_sm90_launch as module

    reports = []

    class Launcher:
        def __getitem__(self, grid):
            return lambda *a, **k: reports.append(facts(kernel.warmup(*a, grid=grid, **k)))

    kernel = module.forward_kernel
    multiprocessors = SimpleNamespace(multi_processor_count=132)
    with (
        mock.patch.object(torch.cuda, "get_device_properties", return_value=multiprocessors),
        mock.patch.object(torch.cuda, "device_of", return_value=nullcontext()),
        mock.patch.object(module, "forward_kernel", Launcher()),
        compile_target("cuda", 90),
    ):
        yield reports


def facts(kernel) -> dict:
    from uniform_registers import disassembled, unset_descriptors

    report = kernel_report(kernel)
    return {
        "unset": unset_descriptors(disassembled(kernel.asm["cubin"])),
        "shared": report.shared, "registers": report.registers, "spills": report.spills,
        "serialized": report.serialized, "tma": "cp.async.bulk.tensor" in report.assembly,
        "bf16": report.assembly.count(".f32.bf16.bf16"), "fp16": report.assembly.count(".f32.f16.f16"),
        "fp8": report.assembly.count(".f32.e4m3.e4m3"), "int8": report.assembly.count(".s32.s8.s8"),
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["bits", "intervals"])
@pytest.mark.parametrize("block_k", [128, 64, 48])
def test_bits_of_any_mask(kind, block_k):
    pytest.importorskip("triton")
    from visionfuse.kernels.attention.gluon_sm90_mask import COLUMNS, masks_of

    plan = random_plan(
        3, length_q=700, length_k=900, block_q=192, block_k=block_k, kind=kind, axes=3, tables=2,
        variants=2,
    )  # fmt: skip
    (bits, mask), column = masks_of(plan), torch.arange(COLUMNS)
    seen = (bits[mask][..., column // 32] >> (column % 32)) & 1 == 1
    offset = plan.partial.offset.tolist()
    for row, (first, last) in enumerate(pairwise(offset)):
        if first == last:
            continue
        tile = row % plan.tiles
        expected = plan.partial_mask(slice(first, last), tile)
        got = seen[first:last, : int(plan.q_count[tile])]
        assert torch.equal(got[..., :block_k], expected)
        assert not got[..., block_k:].any()


def test_equal_masks_are_kept_once():
    pytest.importorskip("triton")
    from visionfuse.kernels.attention.gluon_sm90_mask import masks_of

    bits, mask = masks_of(planned((12, 20, 22), window=(4, 8, 8)))
    assert bits.shape[0] == mask.unique().numel() == bits.unique(dim=0).shape[0] < mask.numel() / 4


@pytest.mark.parametrize(("batch", "heads", "programs"), [(1, 1, 4), (2, 3, 7), (3, 2, 500)])
def test_every_tile_is_dealt_once(batch, heads, programs):
    pytest.importorskip("triton")
    from visionfuse.kernels.attention.gluon_sm90_work import deal

    plan = random_plan(4, length_q=900, length_k=900, block_q=64, block_k=64, variants=heads)
    offset, items = deal(plan, batch, heads, programs)
    assert (offset[0], offset[-1], offset.diff().min() >= 0) == (0, items.numel(), True)
    bh = torch.arange(batch * heads)[:, None]
    expected = (bh * plan.variants + bh % heads) * plan.tiles + torch.arange(plan.tiles)
    assert torch.equal(items.sort().values, expected.flatten().int())
    length = (plan.full.offset.diff() + plan.partial.offset.diff())[items % (heads * plan.tiles)]
    loads = [int(length[a:b].sum()) + 2 * (b - a) for a, b in pairwise(offset.tolist())]
    assert max(loads) <= max(sum(loads) / programs, 0) + int(length.max()) + 2


def some_plan(block_q: int, **kwargs):
    return random_plan(5, length_q=700, length_k=900, block_q=block_q, block_k=128, **kwargs)


# name: plan, head dim, whether the log-sum-exp is asked for, bytes that may be spilled: addresses that wait
# from tile to tile, next to nothing in the loop over whole blocks
COMPILED = {
    "dense": (lambda: some_plan(192, ragged=False, partial=0.0), 128, False, 64),
    "dense-64": (lambda: some_plan(192, ragged=False, partial=0.0), 64, True, 0),
    "dense-2-groups": (lambda: some_plan(128, partial=0.0), 128, False, 0),
    "masked": (lambda: some_plan(192), 128, True, 128),
    "masked-2-groups": (lambda: some_plan(128), 128, True, 0),
    "masked-64": (lambda: some_plan(192, kind="bits"), 64, False, 0),
    "dense-80": (lambda: some_plan(192, ragged=False, partial=0.0), 80, False, 64),
    "bounded": (lambda: some_plan(192), 128, True, 640),
    "bounded-2-groups": (lambda: some_plan(128), 64, True, 0),
    "dense-256": (lambda: some_plan(128, ragged=False, partial=0.0), 256, False, 320),
}


def compile_all() -> dict[str, dict]:
    from visionfuse.kernels.attention import gluon_sm90, score_bound

    def squares(q, k):
        return q.new_empty(q.shape[2], dtype=torch.float32), q.new_empty(
            k.shape[2], dtype=torch.float32
        )

    with (
        compiled_launches() as reports,
        mock.patch.object(score_bound, "pays") as pays,
        mock.patch.object(score_bound, "largest_squares", squares),
    ):
        for name, (make, dim, lse, _) in COMPILED.items():
            pays.return_value = name.startswith("bounded")
            plan = make()
            q = torch.randn(1, plan.length_q, 2, dim, dtype=torch.bfloat16)
            k, v = torch.randn(2, 1, plan.length_k, 2, dim, dtype=torch.bfloat16)
            gluon_sm90.forward(q, k, v, plan, 0.125, lse)
    return dict(zip(COMPILED, reports, strict=True))


def test_compiles_for_hopper():
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for name, report in json.loads(done.stdout).items():
        assert report["shared"] <= 227 * 1024, name
        assert not report["serialized"], name
        assert not report["unset"], (name, report["unset"])
        assert report["bf16"], name
        assert report["tma"], name
        assert report["spills"] <= COMPILED[name][3], (name, report["spills"])


if __name__ == "__main__":
    print(json.dumps(compile_all()))

"""The Hopper kernel compiled for a GPU that is not here: registers, spills, waits, descriptors.

Run as a script with a family of variants, the file compiles them and prints what they need as JSON: the
Triton interpreter, which other tests turn on, replaces the compiler for a whole process.
"""

import json
import os
import re
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import pytest
import torch

from visionfuse.bench.block_lists import all_keys, block_list
from visionfuse.testing import compile_target, group_plan, kernel_report, random_plan

ROOT = Path(__file__).resolve().parents[1]
PLANS = {
    "dense": lambda block_q: block_list(768, 1024, block_q, all_keys),
    "ragged": lambda block_q: block_list(1000, 1000, block_q, all_keys),
    "masked": lambda block_q: random_plan(
        5, length_q=700, length_k=896, block_q=block_q, block_k=128, ragged=False
    ),
    "masked-ragged": lambda block_q: random_plan(
        5, length_q=700, length_k=900, block_q=block_q, block_k=128
    ),
    "by-group": lambda _: group_plan(0, mixed=False),
    "by-mixed": lambda _: group_plan(0, mixed=True),
}


class Variant(NamedTuple):
    """precision: "bf16" or a name of `test_gluon_8bit.SPECS`. spills: bytes a thread may spill, most of them
    addresses that wait from tile to tile, and where there are masks some of the producer's. hot: instructions of any loop over blocks that may touch
    spilled registers. parts: of every tile."""

    precision: str
    head_dim: int
    plan: str
    groups: int = 3
    bias: bool = False
    lse: bool = False
    bounded: bool = False
    ordered: bool = False
    parts: int = 1
    spills: int = 0
    hot: int = 0

    @property
    def name(self) -> str:
        marks = [mark for mark in ("bias", "lse", "bounded", "ordered") if getattr(self, mark)]
        parts = [f"{self.parts}-parts"] if self.parts > 1 else []
        return "-".join(
            [self.precision, str(self.head_dim), self.plan, f"{self.groups}-groups", *marks, *parts]
        )


# What is compiled always has every precision, plan and option; "more" are the others.
FAMILIES = {
    "bf16": [
        Variant("bf16", 128, "dense"),
        Variant("bf16", 128, "by-group", bounded=True, ordered=True, spills=192, hot=6),
        Variant("bf16", 128, "masked-ragged", groups=2, lse=True),
        Variant("bf16", 64, "masked-ragged", bias=True),
        Variant("bf16", 256, "dense", groups=2, spills=72),
    ],
    "8bit": [
        Variant("fp8", 128, "ragged", lse=True, spills=60, hot=2),
        Variant("fp8", 128, "by-group", ordered=True, spills=56, hot=2),
        Variant("int8_fp8", 128, "dense", parts=3, spills=56, hot=2),
        Variant("int8_fp8_groups", 128, "dense", bias=True, spills=80, hot=10),
        Variant("int8_fp8_rows", 128, "masked-ragged", bias=True, spills=164, hot=12),
        Variant("int8_bf16", 128, "masked", lse=True),
        Variant("int8_fp8", 64, "dense", bias=True),
    ],
    "bf16-more": [
        Variant("bf16", 80, "dense"),
        Variant("bf16", 128, "dense", bias=True),
        Variant("bf16", 128, "dense", parts=3, lse=True, spills=16),
        Variant("bf16", 128, "masked", lse=True, ordered=True, spills=196, hot=20),
        Variant("bf16", 128, "masked-ragged", bounded=True, lse=True, spills=192),
        Variant("bf16", 64, "dense", lse=True),
        Variant("bf16", 64, "masked", groups=2, bounded=True, lse=True),
    ],
    "8bit-more": [
        Variant("fp8_rows", 128, "dense", spills=104, hot=15),
        Variant("fp8", 128, "dense", spills=32, hot=2),
        Variant("fp8", 128, "dense", bias=True, spills=80, hot=10),
        Variant("fp8", 128, "masked", ordered=True, spills=84, hot=3),
        Variant("fp8_head", 128, "masked", ordered=True, spills=104, hot=10),
        Variant("fp8", 128, "masked", groups=2),
        Variant("fp8", 64, "masked", lse=True),
        Variant("int8_fp8", 128, "ragged", lse=True, spills=60, hot=2),
        Variant("int8_fp8", 128, "dense", bias=True, spills=80, hot=10),
        Variant("int8_fp8", 128, "masked", ordered=True, spills=100, hot=6),
        Variant("int8_fp8_groups", 128, "dense", spills=40, hot=4),
        Variant("int8_fp8_groups", 128, "ragged", lse=True, spills=68, hot=4),
        Variant("int8_bf16_groups", 128, "masked", lse=True),
        Variant("int8_bf16", 128, "dense"),
    ],
}


@contextmanager
def compiled_launches():
    """Inside, the host side runs on CPU tensors; yields a list that gets the report of every launch."""
    from visionfuse.kernels.attention.gluon_sm90 import host as module
    from visionfuse.kernels.attention.gluon_sm90 import split
    from visionfuse.kernels.order import move

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
        mock.patch.object(split, "combine"),
        mock.patch.object(module, "entries_start_at", return_value=True),  # of some, not of these
        mock.patch.object(move, "_launch"),
        compile_target("cuda", 90),
    ):
        yield reports


def facts(kernel) -> dict:
    from sass import disassembled, hot_loops, order, unset_descriptors

    report = kernel_report(kernel)
    sass = disassembled(kernel.asm["cubin"])
    loops = hot_loops(sass)
    return {
        "unset": unset_descriptors(sass), "orders": [order(loop) for loop in loops],
        "hot": [sum(text.startswith(("LDL", "STL")) for text in loop) for loop in loops],
        "shared": report.shared, "registers": report.registers, "spills": report.spills,
        "serialized": report.serialized, "tma": "cp.async.bulk.tensor" in report.assembly,
        "bf16": report.assembly.count(".f32.bf16.bf16"), "fp8": report.assembly.count(".f32.e4m3.e4m3"),
        "int8": report.assembly.count(".s32.s8.s8"),
    }  # fmt: skip


def compile_variant(variant: Variant) -> dict:
    """Call `forward` on a CPU up to the launch, and compile what it would have launched."""
    from test_gluon_8bit import quantize

    from visionfuse.kernels.attention import BlockBias, gluon_sm90
    from visionfuse.kernels.attention.gluon_sm90 import eight_bit, score_bound, work
    from visionfuse.kernels.order.permute import Orders

    plan = PLANS[variant.plan](64 * variant.groups)
    q = torch.randn(1, plan.length_q, 2, variant.head_dim)
    k, v = torch.randn(2, 1, plan.length_k, 2, variant.head_dim)
    bias = BlockBias(torch.zeros(1, 2, plan.tiles, plan.length_k)) if variant.bias else None
    order = torch.arange(plan.length_q) if variant.ordered else None

    def parts(cost, *_):
        return torch.full_like(cost, variant.parts)

    with (
        compiled_launches() as reports,
        mock.patch.object(score_bound, "pays", return_value=variant.bounded),
        mock.patch.object(work, "_parts", parts),
    ):
        if variant.precision == "bf16":
            q, k, v = (x.bfloat16() for x in (q, k, v))
            gluon_sm90.forward(q, k, v, plan, 0.125, variant.lse, bias, Orders(order))
        else:
            x = quantize(q, k, v, variant.precision)
            eight_bit.forward(x, plan, 0.125, variant.lse, bias, order)
    return reports[0]


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=pytest.mark.slow) if f.endswith("more") else f for f in FAMILIES],
)
def test_compiles_for_hopper(family):
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, __file__, family], capture_output=True, text=True, env=environment,
        timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    reports = json.loads(done.stdout)
    wrong = {
        variant.name: faults
        for variant, report in zip(FAMILIES[family], reports, strict=True)
        if (faults := faults_of(variant, report))
    }
    assert not wrong, wrong


def faults_of(variant: Variant, report: dict) -> list[str]:
    """What is not as it should be."""
    products = {
        "bf16": "bf16" in variant.precision,
        "fp8": "fp8" in variant.precision,
        "int8": "int8" in variant.precision,
    }
    # Scores, their wait, exponentials, then the products of weights, their wait: no product is waited for
    # earlier than its result is needed, no exponential comes before the scores are there.
    order = "QwePw"
    # Some exponentials may wait until the first of these products run.
    halves = [found.partition("P") for found in report["orders"]]
    orders = {re.sub("P+", "P", a + p + b.replace("e", "")) for a, p, b in halves}
    checks = {
        "shared memory": report["shared"] <= 227 * 1024,
        "serialized": not report["serialized"],
        f"unset descriptors {report['unset']}": not report["unset"],
        "no TMA": report["tma"],
        f"spills {report['spills']}": report["spills"] <= variant.spills,
        f"spills in loops {report['hot']}": max(report["hot"]) <= variant.hot,
        f"order {set(report['orders'])}": orders == {order},
        **{f"products in {what}": bool(report[what]) == used for what, used in products.items()},
    }
    return [what for what, good in checks.items() if not good]


if __name__ == "__main__":
    print(json.dumps([compile_variant(variant) for variant in FAMILIES[sys.argv[1]]]))

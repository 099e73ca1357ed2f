"""The GPU kernels compiled for GPUs that are not here: matrix instructions, spills, serialized wgmma.

Run as a script with cases as JSON, the file compiles them and prints what they need: a compiler that hangs
or crashes then fails one case (the few fast ones share a process), and the Triton interpreter, which other
tests turn on, replaces the compiler for a whole process. What is worse than it should be stands in KNOWN: no case may get worse
than that, and a strict xfail says when one gets better.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from functools import cache
from itertools import product
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 180  # for a case that takes 5 s on an idle machine; some targets have hung Triton 3.6

# Matrix instruction that Triton 3.6 emits, and shared memory of a block in KiB.
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
INPUTS = [
    # dtype or precision, head dim, mask, queries and keys of a block
    ("bfloat16", 64, "intervals", 64, 64),
    ("bfloat16", 128, "intervals", 64, 64),
    ("bfloat16", 128, "intervals", 128, 64),
    ("bfloat16", 128, "intervals", 128, 128),
    ("float16", 128, "bits", 64, 64),
    ("float32", 64, "intervals", 64, 64),
    ("float32", 128, "intervals", 64, 64),
    *[(q, 128, "intervals", n, n) for q in ("int8", "fp8", "int8_fp8") for n in (64, 128)],
    ("int8", 128, "intervals", 128, 64),
    *[("int4", 128, "intervals", n, n) for n in (64, 128)],
    *[(q, 128, "intervals", 64, 128) for q in ("fp8", "int8_fp8")],
]
# Tensor cores have e4m3 from sm_89 on; that of gfx942 is another one.
WITHOUT_FP8 = [("cuda", 80), ("cuda", 86), ("hip", "gfx942")]
TRITON = [
    (target, inputs)
    for target, inputs in product(TARGETS, INPUTS)
    if not ("fp8" in inputs[0] and target in WITHOUT_FP8)
]
FAST = [
    (("cuda", 80), ("bfloat16", 128, "intervals", 128, 64)),
    (("cuda", 89), ("float16", 128, "bits", 64, 64)),
    (("cuda", 90), ("bfloat16", 128, "intervals", 128, 128)),
    (("cuda", 90), ("fp8", 128, "intervals", 128, 128)),
    (("cuda", 80), ("int4", 128, "intervals", 64, 64)),
    (("hip", "gfx942"), ("bfloat16", 128, "intervals", 64, 64)),
]
# Bytes of registers that a thread spills. fp32 is six bf16 products of operands in three parts (on sm_100 at
# head dim 128 no tensor cores at all); the others lose more with twice the warps or half the keys.
TRITON_SPILLS = {
    (80, "float32", 64, 64, 64): 32,
    (80, "float32", 128, 64, 64): 1780,
    (86, "float32", 64, 64, 64): 48,
    (86, "float32", 128, 64, 64): 1780,
    (89, "float32", 64, 64, 64): 48,
    (89, "float32", 128, 64, 64): 1780,
    (90, "float32", 128, 64, 64): 64,
    (90, "bfloat16", 128, 128, 64): 236,
    (90, "int8", 128, 128, 64): 32,
    (100, "float32", 128, 64, 64): 800,
    (100, "bfloat16", 128, 128, 128): 16,
    (100, "fp8", 128, 128, 128): 40,
    (120, "float32", 64, 64, 64): 56,
    (120, "float32", 128, 64, 64): 1884,
}
# Head dim, keys of a block, whether the results of another kernel are merged.
WHOLE = list(product((64, 128), (64, 128), (False, True)))
FAST_WHOLE = (128, 128, True)
TOGETHER = (
    *(json.dumps(["triton", *target, *inputs]) for target, inputs in FAST),
    json.dumps(["whole", *FAST_WHOLE]),
)
# Gradients: target, dtype, head dim, mask, queries and keys of a block, bias.
BACKWARD = [
    *[
        (target, ("bfloat16", dim, "intervals", side, side, None))
        for target, side in ((("cuda", 80), 64), (("cuda", 90), 128), (("cuda", 100), 128),
                             (("hip", "gfx942"), 64))
        for dim in (64, 128)
    ],
    *[(target, ("float32", 64, "intervals", 64, 64, None)) for target in (("cuda", 80), ("cuda", 90))],
    (("cuda", 89), ("bfloat16", 128, "intervals", 64, 64, None)),
    (("cuda", 90), ("float16", 128, "bits", 128, 128, None)),
    (("cuda", 90), ("bfloat16", 256, "intervals", 128, 128, None)),
    (("cuda", 90), ("bfloat16", 64, "intervals", 128, 128, "relative")),
    (("cuda", 90), ("bfloat16", 128, "intervals", 128, 128, "block")),
]  # fmt: skip
# By kernel, as above: most of them in loops under a mask, where a mask needs registers too. On sm_90 what spills is
# faster than larger blocks that do not (H200).
BACKWARD_SPILLS = {
    (("cuda", 90), ("float32", 64, "intervals", 64, 64, None), "queries_kernel"): 16,
    (("cuda", 90), ("bfloat16", 128, "intervals", 128, 128, None), "keys_kernel"): 96,
    (("cuda", 90), ("float16", 128, "bits", 128, 128, None), "keys_kernel"): 96,
    (("cuda", 90), ("bfloat16", 64, "intervals", 128, 128, "relative"), "keys_kernel"): 16,
    (("cuda", 90), ("bfloat16", 256, "intervals", 128, 128, None), "keys_kernel"): 96,
    (("cuda", 90), ("bfloat16", 128, "intervals", 128, 128, "block"), "keys_kernel"): 104,
}


def triton_spills(target, inputs) -> int:
    return TRITON_SPILLS.get((target[1], *inputs[:2], *inputs[3:]), 0)


def compiled(case: str) -> dict:
    """What a process of its own reports on a case (JSON); the fast ones share a process."""
    return compiled_together(*(TOGETHER if case in TOGETHER else (case,)))[case]


@cache
def compiled_together(*cases: str) -> dict[str, dict]:
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, __file__, *cases], capture_output=True, text=True, env=environment,
        timeout=SECONDS * len(cases),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def triton_report(target, inputs) -> dict:
    return compiled(json.dumps(["triton", *target, *inputs]))


def backward_report(target, inputs) -> dict[str, dict]:
    return compiled(json.dumps(["backward", *target, *inputs]))


def name(part) -> str:
    return "-".join(map(str, part))


# Triton --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "inputs"),
    [pytest.param(*c, marks=[] if c in FAST else pytest.mark.slow) for c in TRITON],
    ids=name,
)
def test_triton(target, inputs):
    instruction, shared = TARGETS[target]
    report = triton_report(target, inputs)
    assert not report["traps"], (
        "the kernel is a trap: tensor memory is too small (Triton 3.6, sm_100)"
    )
    if (
        target == ("cuda", 100) and "int" in inputs[0]
    ):  # has no tensor core instruction of its own for it
        assert "mma.sync" in report["instructions"]
    elif (target, inputs[:2]) == (("cuda", 100), ("float32", 128)):
        assert report["instructions"] == []
    else:
        assert report["instructions"] == [instruction]
    assert report["shared"] <= shared * 1024
    assert report["spills"] <= triton_spills(target, inputs)
    assert not report["serialized"]
    if not triton_spills(target, inputs):
        assert report["stack"] == 0


@pytest.mark.slow
@pytest.mark.xfail(strict=True, raises=AssertionError, reason="fp32 and masks take many registers")
@pytest.mark.parametrize(
    ("target", "inputs"), [c for c in TRITON if triton_spills(*c)], ids=name
)  # fmt: skip
def test_triton_does_not_spill(target, inputs):
    assert triton_report(target, inputs)["spills"] == 0


@pytest.mark.parametrize(
    "variant", [pytest.param(v, marks=[] if v == FAST_WHOLE else pytest.mark.slow) for v in WHOLE],
    ids=name,
)  # fmt: skip
def test_whole_entries_on_hopper(variant):
    """Triton specialises warps (it does not say where it does not), and loads as many rows as it waits for."""
    head_dim, block_k, _ = variant
    report = compiled(json.dumps(["whole", *variant]))
    assert report["warps"] == 12
    assert report["instructions"] == ["wgmma.mma_async"]
    assert report["shared"] <= 227 * 1024
    assert not report["serialized"]
    assert not report["spills"]
    assert sorted(report["boxes"]) == sorted(
        [[64, head_dim]] * 2 + [[block_k, head_dim]] * 2 + [[2 * 64 * head_dim]] * 2
        + [[2 * block_k * head_dim]] * 2
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("target", "inputs"), BACKWARD, ids=name)
def test_backward(target, inputs):
    instruction, shared = TARGETS[target]
    for kernel, report in backward_report(target, inputs).items():
        assert not report["traps"], kernel
        assert instruction in report["instructions"] or report["instructions"] == ["mma.sync"], (
            kernel
        )
        assert report["shared"] <= shared * 1024, kernel
        assert report["spills"] <= BACKWARD_SPILLS.get((target, inputs, kernel), 0), kernel
        assert not report["serialized"], kernel


@pytest.mark.slow
@pytest.mark.xfail(
    strict=True, raises=AssertionError, reason="masks and biases take many registers"
)
@pytest.mark.parametrize(("target", "inputs", "kernel"), BACKWARD_SPILLS, ids=name)
def test_backward_does_not_spill(target, inputs, kernel):
    assert backward_report(target, inputs)[kernel]["spills"] == 0


# In the process of one case -------------------------------------------------------------------------


def compile_triton(
    backend: str, arch: int | str, precision: str, head_dim: int, kind: str, block_q: int, block_k: int
) -> dict:  # fmt: skip
    import torch

    from visionfuse.kernels.attention import prologue
    from visionfuse.kernels.attention.triton import host
    from visionfuse.testing import compile_target, random_plan

    eight_bit = precision in host.TRITON_EIGHT_BIT
    plan = random_plan(
        0, length_q=384, length_k=384, block_q=block_q, block_k=block_k, kind=kind,
        ragged=not eight_bit,
    )  # fmt: skip
    scales, q = None, torch.zeros(1, 384, 2, head_dim)
    if eight_bit:
        x = prologue.reference(q, q, q, host.TRITON_EIGHT_BIT[precision])
        scales = host.Scales(x.q_scale, x.k_scale, x.v_scale, x.v_mean, x.k_scale.shape[2])
        q, k, v, out = x.q, x.k, x.v if x.v_scale is not None else q.bfloat16(), q.bfloat16()
    else:
        q = k = v = out = q.to(getattr(torch, precision))
    with compile_target(backend, arch):
        grid, arguments, options = host.launch(q, k, v, out, None, plan, 0.1, scales)
        kernel = host.forward_kernel.warmup(*arguments, grid=grid, **options)
    return facts(kernel)


def compile_whole(head_dim: int, block_k: int, merged: bool) -> dict:
    import torch

    from visionfuse.kernels.attention.triton import host, sm90
    from visionfuse.testing import compile_target, random_plan

    plan = random_plan(
        0, length_q=384, length_k=384, block_q=128, block_k=block_k, ragged=merged,
        full=0.3 if merged else 1.0,
    )  # fmt: skip
    q = torch.zeros(1, 384, 2, head_dim, dtype=torch.bfloat16)
    always = mock.patch.multiple(sm90, WORTH_A_SPLIT=0, HEAD_DIMS=(64, 128))
    with compile_target("cuda", 90), always:
        *others, (kernel, grid, arguments, options) = host.launches(q, q, q, q, None, plan, 0.1)
        made = kernel.warmup(*arguments, grid=grid, **options)
    assert len(others) == merged
    ttgir = made.asm["ttgir"]
    copied = re.findall(r"async_tma_copy_global_to_local .*tensordesc<tensor<(\d+)x(\d+)x", ttgir)
    awaited = re.findall(r"barrier_expect %\w+, (\d+)", ttgir)
    return facts(made) | {
        "warps": made.metadata.num_warps,
        "boxes": [list(map(int, box)) for box in copied] + [[int(n)] for n in awaited],
    }


def compile_backward(
    backend: str, arch: int | str, dtype: str, head_dim: int, kind: str, block_q: int, block_k: int,
    bias: str | None,
) -> dict[str, dict]:  # fmt: skip
    import torch

    from visionfuse.kernels.attention.triton import backward_host, bias_gradient
    from visionfuse.testing import compile_target, random_bias, random_plan

    plan = random_plan(0, length_q=384, length_k=384, block_q=block_q, block_k=block_k, kind=kind)
    q, rows = torch.zeros(1, 384, 2, head_dim, dtype=getattr(torch, dtype)), torch.zeros(1, 2, 384)
    added = random_bias(bias, plan, heads=2) if bias else None
    with compile_target(backend, arch):
        launches = backward_host.launches(
            q, None, q, q, q, q, rows, plan, 0.1, added, (rows, rows, q, q, q)
        )
        if bias == "relative":
            launches += [
                (bias_gradient.scores_kernel, *launch)
                for launch in bias_gradient.launches(
                    q, q, q, q, rows, rows, plan, 0.1, added, torch.zeros(2, 1 << 20), 0
                )
            ]
        return {
            kernel.fn.__name__: facts(kernel.warmup(*arguments, grid=grid, **options))
            for kernel, grid, arguments, options in launches
            if kernel.fn.__name__ != "prepare_kernel"
        }


def facts(kernel) -> dict:
    assembly = kernel.asm.get("amdgcn") or kernel.asm["ptx"]
    known = sorted({instruction for instruction, _ in TARGETS.values()})
    found_in = amd_facts if "amdgcn" in kernel.asm else nvidia_facts
    return found_in(assembly) | {
        "shared": kernel.metadata.shared,
        "traps": len(assembly) < 10_000 and "trap" in assembly,
        "instructions": [instruction for instruction in known if instruction in assembly],
    }


def nvidia_facts(ptx: str) -> dict:
    """The ptxas that Triton brings along for this GPU tells; -v is the only place with both facts."""
    import triton

    arch = found(r"\.target (sm_\d+a?)", ptx)
    tool = "ptxas-blackwell" if int(found(r"(\d+)", arch)) >= 100 else "ptxas"
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        log = subprocess.run(
            [path, "-v", f"--gpu-name={arch}", source, "-o", source.with_suffix(".cubin")],
            capture_output=True, text=True, check=True,
        ).stderr  # fmt: skip
    return {
        "spills": int(found(r"(\d+) bytes spill stores", log)),
        "stack": int(found(r"(\d+) bytes stack frame", log)),
        "serialized": "are serialized" in log,
    }


def amd_facts(assembly: str) -> dict:
    """Vector registers; scalar ones spill into lanes of a vector register, not into memory."""
    return {
        "spills": int(found(r"\.vgpr_spill_count:\s+(\d+)", assembly)),
        "stack": int(found(r"\.private_segment_fixed_size:\s+(\d+)", assembly)),
        "serialized": False,
    }


def found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match, f"{pattern!r} does not occur in:\n{text[:2000]}"
    return match[1]


if __name__ == "__main__":
    compilers = {"triton": compile_triton, "whole": compile_whole, "backward": compile_backward}
    cases = {case: json.loads(case) for case in sys.argv[1:]}
    print(json.dumps({case: compilers[what](*rest) for case, (what, *rest) in cases.items()}))

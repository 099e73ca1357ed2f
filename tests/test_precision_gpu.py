"""Rounded attention on a Hopper GPU, from bf16 inputs and plans of the planner to the output.

The reference is the emulation in float64 with exact weights (checked pair by pair in tests/test_precision.py)
on some tiles; the budget is twice the error of the same with the weights rounded. As a script, every case
in a process of its own:

    python tests/test_precision_gpu.py            # all, a line each; exit status 1 if one fails
    python tests/test_precision_gpu.py CASE       # one, in this process
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from visionfuse.kernels.attention import (
    Precision,
    block_sparse_attention,
    emulation,
    select_implementation,
    unsupported_reasons,
)
from visionfuse.kernels.order import Order
from visionfuse.kernels.plan import Dense, Neighborhood, TileWindow, TokenLayout, plan_attention
from visionfuse.testing import assert_within_budget, poisoned_memory

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 60
hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
    reason="needs a Hopper GPU",
)

FLUX = TokenLayout.joint(text=512, grids=[(64, 64)])
WAN = TokenLayout.joint(grids=[(21, 45, 80)])
WAN_480P = TokenLayout.joint(grids=[(21, 30, 52)])
WINDOW = Neighborhood(window=(24, 24), stride=(8, 8))
VIDEO = Neighborhood(window=(12, 24, 24), stride=(4, 8, 8))
ODD_VIDEO = Neighborhood(window=(9, 15, 17))
TILED = Order(kind="tiled", tile=(3, 5, 8))

# name: layout, rule, order, implementation, precision, dtype, head dim, heads, key heads
CASES = {
    "flux-fp8": (FLUX, WINDOW, None, "gluon_sm90", "fp8", "bfloat16", 128, 2, 1),
    "flux-int8-64": (FLUX, WINDOW, None, "gluon_sm90", "int8_fp8", "float16", 64, 4, 2),
    "flux-dense": (FLUX, Dense(), None, "gluon_sm90", "int8_fp8", "bfloat16", 128, 2, 2),
    "wan-int8": (WAN, VIDEO, TILED, "gluon_sm90", "int8_fp8", "bfloat16", 128, 2, 2),
    "wan-fp8": (WAN, ODD_VIDEO, None, "gluon_sm90", "fp8+smooth_v", "float16", 128, 1, 1),
    "wan-dense": (WAN_480P, Dense(), None, "gluon_sm90", "fp8", "bfloat16", 128, 1, 1),
    "ragged-64": (TokenLayout.joint(grids=[(1000,)]), Dense(), Order(kind="row"), "gluon_sm90", "fp8",
                  "bfloat16", 64, 2, 1),
    "ragged-v": (TokenLayout.joint(grids=[(333,)]), Dense(), Order(kind="row"), "gluon_sm90",
                 "int8_fp8+smooth_v", "float16", 128, 2, 2),
    "one-token": (TokenLayout.joint(grids=[(1,)]), Dense(), Order(kind="row"), "gluon_sm90", "int8_fp8",
                  "bfloat16", 128, 2, 1),
    "float32": (FLUX, WINDOW, None, "gluon_sm90", "fp8", "float32", 64, 1, 1),
    "not-smoothed": (FLUX, WINDOW, None, "gluon_sm90", "fp8-smooth_k", "bfloat16", 128, 1, 1),
    "int4": (FLUX, WINDOW, None, "gluon_sm90", "int4_fp8", "bfloat16", 128, 2, 2),
    "smooth-q": (FLUX, WINDOW, None, "triton", "int8_fp8+smooth_q", "bfloat16", 128, 2, 1),
    "int4-smooth-q": (FLUX, Dense(), None, "triton", "int4+smooth_q", "bfloat16", 64, 2, 1),
    "fp16-values": (FLUX, WINDOW, None, "gluon_sm90", "int8_fp16+q_warp+k_warp", "bfloat16", 128, 2, 1),
    "flux-int8": (FLUX, WINDOW, None, "gluon_sm90", "int8", "bfloat16", 128, 2, 1),
    "triton-flux-int8": (FLUX, WINDOW, None, "triton", "int8", "bfloat16", 128, 2, 1),
    "triton-wan-fp8": (WAN_480P, ODD_VIDEO, None, "triton", "fp8", "float16", 64, 1, 1),
    "wan-tiles": (WAN, TileWindow(density=0.09), None, "gluon_sm90", "fp8_tile", "bfloat16", 128, 2, 2),
    "wan-tiles-480p": (WAN_480P, TileWindow(density=0.25), None, "gluon_sm90", "fp8_tile-smooth_k", "float16",
                       128, 2, 1),
    "wan-tiles-heads": (WAN_480P, TileWindow(heads=((1, 3, 3), (1, 2, 9))), None, "gluon_sm90",
                        "int8_fp8_tile", "bfloat16", 128, 2, 2),
    "flux-tiles": (FLUX, TileWindow(window=3, tile=(9, 14)), None, "gluon_sm90", "fp8_tile", "bfloat16", 64, 2, 1),
    "flux-tiles-warp": (FLUX, TileWindow(density=0.3), None, "gluon_sm90", "fp8+q_warp", "bfloat16", 128, 2, 2),
    "triton-tiles": (WAN_480P, TileWindow(density=0.25), None, "triton", "fp8_tile", "bfloat16", 64, 1, 1),
    "threads": (WAN, VIDEO, TILED, "gluon_sm90", "int8_fp8+k_thread", "bfloat16", 128, 2, 1),
    "threads-smooth-q": (FLUX, WINDOW, None, "gluon_sm90", "int8+k_thread+smooth_q", "bfloat16", 64, 2, 1),
    "triton-threads": (WAN_480P, ODD_VIDEO, None, "triton", "int8_fp8+k_thread", "float16", 64, 1, 1),
    "triton-dense": (FLUX, Dense(), None, "triton", "int8_fp8", "bfloat16", 128, 1, 1),
}  # fmt: skip
# A query in between two codes may fall to either side in fp32 and fp64, which happens as 16-bit numbers have
# few digits. Without smoothing that moves all scores of its row alike: half a step of FP8 times a channel of
# keys that stands out.
LSE_BUDGET = {"fp8": 2e-2, "int8": 5e-3, "int4": 0.2}
NOT_SMOOTHED = 0.2
OF_WEIGHTS = 1 / 16  # half a step of e4m3: with FP8 weights the kernels sum what they multiply


def inputs(plan, dtype, dim, heads, kv_heads):
    """With a channel of keys and one of values that stand out, as those of real models."""
    g = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(1, plan.length_q, h, dim, generator=g, device="cuda")
        for h in (heads, kv_heads, kv_heads)
    )
    k[..., 0] += 4.0
    v[..., 1] -= 2.0
    return [x.to(dtype) for x in (q, k, v)]


def run_case(name: str) -> dict:
    layout, rule, order, impl, precision, dtype, dim, heads, kv_heads = CASES[name]
    plan = plan_attention(
        layout,
        rule,
        order=order,
        impl=impl,
        head_dim=dim,
        device="cuda",
        precision=Precision.parse(precision).name,
    ).blocks
    dtype = getattr(torch, dtype)
    q, k, v = inputs(plan, dtype, dim, heads, kv_heads)
    reasons = unsupported_reasons(impl, q, k, v, plan, precision)
    assert not reasons, reasons
    with poisoned_memory():
        out, lse = block_sparse_attention(
            q, k, v, plan, impl=impl, precision=precision, return_lse=True
        )
        alone = block_sparse_attention(q, k, v, plan, impl=impl, precision=precision)
    assert torch.equal(out, alone), "the output depends on whether the lse is asked for"
    assert (out.shape, out.dtype) == (q.shape, dtype)
    assert not out.isnan().any()
    assert lse.isfinite().all()
    tiles = sorted({0, plan.tiles // 3, plan.tiles // 2, plan.tiles - 1})
    formats = Precision.parse(precision)

    def emulated(formats, **options):
        return emulation.forward(
            q, k, v, plan, dim**-0.5, True, formats, dtype=torch.float64, tiles=tiles, **options
        )

    exact, low = emulated(formats, weights=emulation.exact_weights), emulated(formats)
    rows = torch.cat([
        torch.arange(int(plan.q_start[t]), int(plan.q_start[t] + plan.q_count[t])) for t in tiles
    ])  # fmt: skip
    got = out[:, rows]
    want, twin = exact[0][:, rows].double(), low[0][:, rows].bfloat16().double()
    whole = emulated(Precision(), weights=emulation.exact_weights)[0][:, rows].double()
    lse_error = (lse - exact[1])[:, :, rows].abs().max().item()
    report = {
        "error": (got.double() - want).abs().max().item(), "of_rounding": (twin - want).abs().max().item(),
        "lse_error": lse_error, "rel_l1": ((got - whole).abs().sum() / whole.abs().sum()).item(),
        "rel_l1_emulated": ((twin - whole).abs().sum() / whole.abs().sum()).item(),
    }  # fmt: skip
    print(json.dumps({key: float(f"{value:.3g}") for key, value in report.items()}), flush=True)
    # Kernels write bf16, whatever the inputs are: so their ulp counts.
    assert_within_budget(got.bfloat16(), want, twin)
    allowed = LSE_BUDGET[formats.qk] if formats.smooth_k else NOT_SMOOTHED
    allowed += OF_WEIGHTS * (formats.pv == "fp8")
    assert lse_error <= allowed, (lse_error, allowed)
    return report


# -- graphs, streams, compilation -------------------------------------------------------------------


def small(precision="int8_fp8", impl="gluon_sm90"):
    """A plan whose keys move into slots, and inputs."""
    plan = plan_attention(
        TokenLayout.joint(text=77, grids=[(30, 41)]), Neighborhood(window=(9, 13)), impl=impl,
        head_dim=64, device="cuda", precision=precision,
    ).blocks  # fmt: skip
    return plan, inputs(plan, torch.bfloat16, 64, 2, 1)


def cuda_graph() -> dict:
    plan, (q, k, v) = small()
    call = lambda: block_sparse_attention(q, k, v, plan, impl="gluon_sm90", precision="int8_fp8")
    before = call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    fresh = [torch.randn_like(x) for x in (q, k, v)]
    for x, y in zip((q, k, v), fresh, strict=True):
        x.copy_(y)
    captured.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert not torch.equal(captured, before)
    assert torch.equal(captured, call())
    return {}


def side_stream() -> dict:
    plan, (q, k, v) = small()
    expected = block_sparse_attention(q, k, v, plan, impl="gluon_sm90", precision="int8_fp8")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    late = torch.zeros_like(q)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # whoever reads q on another stream reads zeros
        late.copy_(q)
        got = block_sparse_attention(late, k, v, plan, impl="gluon_sm90", precision="int8_fp8")
    stream.synchronize()
    assert torch.equal(got, expected)
    return {}


def compiled() -> dict:
    plan, (q, k, v) = small()
    worst = {}
    for backend in ("aot_eager", "inductor"):
        torch._dynamo.reset()

        @torch.compile(fullgraph=True, backend=backend)
        def layer(q, k, v):
            return block_sparse_attention(q, k, v, plan, impl="auto", precision="int8_fp8") + 0.0

        expected = block_sparse_attention(q, k, v, plan, impl="gluon_sm90", precision="int8_fp8")
        got = layer(q, k, v)
        assert torch.equal(got, expected), backend
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = layer(q, k, v)
        captured.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured, expected), backend
        worst[backend] = 0.0
    return worst


def zeros_and_infinities() -> dict:
    plan, (q, k, v) = small("fp8")
    v[..., 5], k[:, 7], q[:, 9] = 0.0, 0.0, 0.0
    for precision in ("fp8", "int8_fp8", "int8_fp8+smooth_v"):
        out, lse = block_sparse_attention(q, k, v, plan, precision=precision, return_lse=True)
        assert out.isfinite().all()
        assert lse.isfinite().all()
    k[:] = 2.0
    assert block_sparse_attention(q, k, v, plan, precision="int8_fp8").isfinite().all()
    k[0, 3, 0, 0] = torch.inf
    assert block_sparse_attention(q, k, v, plan, precision="fp8").isnan().any()
    return {}


def choices() -> dict:
    for precision in ("fp8", "int8_fp8"):
        for dim in (64, 128):
            assert select_implementation("cuda", torch.bfloat16, dim, precision)[0] == "gluon_sm90"
    name, reasons = select_implementation("cuda", torch.bfloat16, 128, "int8+q_thread")
    assert name == "blocks"
    assert any("q_scale='thread'" in reason for reason in reasons)
    return {}


MORE = {f.__name__: f for f in (cuda_graph, side_stream, compiled, zeros_and_infinities, choices)}
NAMES = [*CASES, *MORE]


def run_one(name: str) -> dict:
    return MORE[name]() if name in MORE else run_case(name)


def run_all(workers: int) -> int:
    failed = []

    def one(name: str) -> None:
        try:
            done = subprocess.run(
                [sys.executable, __file__, name], capture_output=True, text=True, timeout=SECONDS,
                env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
            )  # fmt: skip
            good, text = (
                done.returncode == 0,
                done.stdout + done.stderr[-3000:] * (done.returncode != 0),
            )
        except subprocess.TimeoutExpired:
            good, text = False, f"no end after {SECONDS} s"
        lines = text.strip().splitlines()
        print(
            f"{'pass' if good else 'FAIL'} {name}: " + "\n    ".join(lines[-1 if good else -12 :]),
            flush=True,
        )
        if not good:
            failed.append(name)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(one, NAMES))
    print(f"{len(NAMES) - len(failed)} of {len(NAMES)} pass; failed: {', '.join(failed) or 'none'}")
    return bool(failed)


@hopper
@pytest.mark.parametrize("name", NAMES)
def test_case(name):
    run_one(name)


# Without a GPU -----------------------------------------------------------------------------------


def test_wan_plans_have_the_tiles_of_their_name():
    plan = plan_attention(WAN, VIDEO, order=TILED, impl="gluon_sm90", head_dim=128).blocks
    assert plan.tiles == 7 * 9 * 10
    assert all(b > a for a, b in pairwise(plan.q_start.tolist()))


if __name__ == "__main__":
    match sys.argv[1:]:
        case []:
            sys.exit(run_all(workers=min(16, os.cpu_count() or 1)))
        case [name]:
            print(json.dumps(run_one(name)))

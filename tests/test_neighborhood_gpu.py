"""neighborhood_attention on the GPU's kernels: in Triton's interpreter here, on the GPU where there is one."""

from __future__ import annotations

import pytest
import torch

from visionfuse.kernels.plan import Neighborhood, neighborhood_mask
from visionfuse.neighborhood import neighborhood_attention
from visionfuse.neighborhood.natten import natten_kernels
from visionfuse.testing import assert_within_budget, poisoned_memory

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = (
    torch.bfloat16 if DEVICE == "cuda" else torch.float32
)  # the interpreter multiplies bf16 wrongly

gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")

# Grid, rule, head dim. Cells of keys, rows that stay in place, residue classes, causal and strided windows.
CASES = [
    ((14, 14), {"window": 7}, 32),
    ((12, 20), {"window": (3, 7), "causal": (False, True)}, 64),
    ((16, 16), {"window": 3, "dilation": 4}, 32),
    ((4, 8, 8), {"window": 3}, 32),
    ((5, 9, 10), {"window": (3, 5, 5), "stride": (1, 2, 2)}, 16),
    ((90,), {"window": 31, "stride": 4}, 32),
]
LARGE = [
    ((56, 56), {"window": 7}, 32),
    ((28, 28), {"window": 7, "dilation": 4}, 32),
    ((21, 30, 52), {"window": (12, 16, 16), "stride": (4, 8, 8)}, 128),
    ((16, 34, 60), {"window": 11}, 64),
    ((16, 34, 60), {"window": (3, 7, 7)}, 64),
    ((64, 64), {"window": 48}, 256),
]


def dense(q, k, v, rule, dtype):
    """Exact attention in that dtype, differentiable."""
    rank = q.dim() - 3
    grid, heads = tuple(q.shape[1:-2]), q.shape[-2]
    mask = neighborhood_mask(Neighborhood(**rule).resolve(grid), q.device)
    q, k, v = (x.to(dtype).flatten(1, rank).transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).unflatten(1, grid)


def check(grid, rule, dim, impl, dtype, backward):
    g = torch.Generator().manual_seed(0)
    draw = lambda h: torch.randn(1, *grid, h, dim, generator=g).to(DEVICE, dtype)
    q, k, v, grad = draw(2), draw(1), draw(1), draw(2)

    def results(attend, cast):
        inputs = [x.to(cast).requires_grad_(backward) for x in (q, k, v)]
        out = attend(*inputs)
        return [out, *(torch.autograd.grad(out, inputs, grad.to(cast)) if backward else ())]

    ours = results(lambda *x: neighborhood_attention(*x, **rule, impl=impl), dtype)
    exact = results(lambda *x: dense(*x, rule, torch.float64), torch.float64)
    low = results(lambda *x: dense(*x, rule, dtype), dtype)
    for got, right, budget in zip(ours, exact, low, strict=True):
        assert got.dtype == dtype
        assert_within_budget(got.detach(), right.detach(), budget.detach())


@pytest.mark.parametrize(("grid", "rule", "dim"), CASES)
def test_triton(grid, rule, dim):
    check(grid, rule, dim, "triton", DTYPE, backward=False)


@pytest.mark.parametrize(("grid", "rule", "dim"), [CASES[0], CASES[2]])
def test_triton_backward(grid, rule, dim):
    check(grid, rule, dim, "triton", DTYPE, backward=True)


def test_triton_with_everything():
    """Extra tokens with queries, windows by head and a bias that is trained."""
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=g).to(DEVICE)
    q, k, v = (draw(1, 8, 9, 2, 16) for _ in range(3))
    options = {
        "window": [3, 5], "extra_kv": (draw(1, 3, 2, 16), draw(1, 3, 2, 16)),
        "extra_q": draw(1, 3, 2, 16), "bias": draw(2, 9, 9),
    }  # fmt: skip
    found = neighborhood_attention(q, k, v, **options, return_lse=True, impl="triton")
    right = neighborhood_attention(q, k, v, **options, return_lse=True, impl="reference")
    for a, b in zip((*found[0], *found[1]), (*right[0], *right[1]), strict=True):
        torch.testing.assert_close(a, b, atol=2e-2 if DEVICE == "cuda" else 1e-4, rtol=0)


@gpu
@pytest.mark.parametrize(("grid", "rule", "dim"), CASES + LARGE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_auto_on_the_gpu(grid, rule, dim, dtype):
    check(grid, rule, dim, "auto", dtype, backward=True)


@gpu
@pytest.mark.parametrize(
    "precision", ["fp8", "fp8+k_tensor", "int8_fp8", "int8_fp8+smooth_q+smooth_v"]
)
@pytest.mark.parametrize(
    ("grid", "rule"),
    [
        ((21, 30, 52), {"window": (12, 16, 16), "stride": (4, 8, 8)}),
        ((21, 30, 52), {"window": (21, 9, 17), "stride": (1, 3, 6)}),
        ((64, 80), {"window": 32, "stride": 16}),
        (
            (48, 64),
            {"window": 21},
        ),  # one scale for the keys of a head: cells of keys that divide the grid
        ((37, 29), {"window": 9, "causal": (True, False)}),
    ],
    ids=str,
)
def test_eight_bits_on_the_gpu(precision, grid, rule):
    """Two batch entries, grouped heads, extra tokens with queries; out and lse at their places, none left out."""
    g = torch.Generator().manual_seed(0)
    draw = lambda *s: torch.randn(s, generator=g).to("cuda", torch.bfloat16)
    q, k, v = draw(2, *grid, 4, 128), draw(2, *grid, 2, 128), draw(2, *grid, 2, 128)
    extra = {"extra_kv": (draw(2, 5, 2, 128), draw(2, 5, 2, 128)), "extra_q": draw(2, 5, 4, 128)}
    exact, lse = neighborhood_attention(q, k, v, **rule, **extra, return_lse=True)
    with poisoned_memory():
        out, rounded_lse = neighborhood_attention(
            q, k, v, **rule, **extra, return_lse=True, precision=precision
        )
    for a, b in zip(out, exact, strict=True):
        assert (a - b).float().abs().sum() / b.float().abs().sum() < 0.07
    for a, b in zip(rounded_lse, lse, strict=True):
        assert (a - b).abs().max() < 0.25


@gpu
@pytest.mark.parametrize("precision", ["model", "fp8"])
def test_compiled_inference_on_the_gpu(precision):
    q, k, v = torch.randn(3, 1, 24, 40, 4, 128, device="cuda", dtype=torch.bfloat16)
    call = lambda q, k, v: neighborhood_attention(q, k, v, 16, stride=8, precision=precision)
    torch.testing.assert_close(torch.compile(call, fullgraph=True)(q, k, v), call(q, k, v))


@gpu
def test_no_call_waits_for_the_gpu():
    q, k, v = torch.randn(3, 1, 32, 32, 2, 64, device="cuda", dtype=torch.bfloat16)
    table = torch.zeros(2, 13, 13, device="cuda")
    for _ in range(2):  # the first call makes the plan
        neighborhood_attention(q, k, v, 7)
        neighborhood_attention(q, k, v, 7, bias=table)
        neighborhood_attention(q, k, v, 16, stride=8, precision="fp8")
    torch.cuda.set_sync_debug_mode("error")
    try:
        neighborhood_attention(q, k, v, 7)
        neighborhood_attention(q, k, v, 16, stride=8, precision="fp8")
        neighborhood_attention(q, k, v, 7, bias=table)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
@pytest.mark.parametrize("options", [{}, {"dilation": 4}])
def test_compiled_training_on_the_gpu(options):
    """Forward and backward, with a bias."""
    g = torch.Generator().manual_seed(0)
    make = lambda *s: torch.randn(s, generator=g).to("cuda", torch.bfloat16).requires_grad_()
    inputs = [
        make(1, 28, 28, 2, 32),
        make(1, 28, 28, 2, 32),
        make(1, 28, 28, 2, 32),
        make(2, 13, 13),
    ]
    call = lambda q, k, v, table: neighborhood_attention(q, k, v, 7, bias=table, **options)
    grads = [
        torch.autograd.grad(f(*inputs).float().square().sum(), inputs)
        for f in (call, torch.compile(call, fullgraph=True))
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=0.05, rtol=0.05)


@gpu
@pytest.mark.skipif(natten_kernels() != "", reason="NATTEN's CUDA kernels are not installed")
@pytest.mark.parametrize(("grid", "rule", "dim"), LARGE[:5])
def test_natten_by_name(grid, rule, dim):
    g = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, *grid, 2, dim, generator=g).to("cuda", torch.bfloat16) for _ in range(3)
    )
    ours, theirs = (
        neighborhood_attention(q, k, v, **rule, impl=impl) for impl in ("auto", "natten")
    )
    torch.testing.assert_close(ours, theirs, atol=2e-2, rtol=2e-2)

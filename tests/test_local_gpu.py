"""Plans of local attention on the GPU's kernels: in Triton's interpreter here, on the GPU where there is one."""

from __future__ import annotations

import pytest
import torch

from visionfuse.kernels.attention import block_sparse_attention
from visionfuse.kernels.order import Order
from visionfuse.kernels.plan import Local, Segment, TokenLayout, plan_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
hopper = pytest.mark.skipif(
    DEVICE == "cpu" or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)
SPECS = {
    "columns": (Local(), Order()),
    "columns of 192x32": (Local(block=(192, 32)), Order()),
    "released": (Local(guidance="linear"), Order(kind="tiled")),
    "hilbert": (Local(), Order(kind="hilbert")),
    "token": (Local(block=None), Order()),
}
ALLOWED = {
    "model": 0.005,
    "fp8": 0.1,
    "int8_fp8": 0.08,
}  # relative L1 error; fp32 in the interpreter: nothing


def error(name, impl, precision, grid, coarse, text, head_dim, dtype, keys_only=False) -> float:
    """Relative L1 error against fp64 of two heads."""
    spec, order = SPECS[name]
    layout = TokenLayout((Segment("text", (text,)), Segment("grid", grid),
                          Segment("guidance", coarse, keys_only=keys_only)))  # fmt: skip
    plan = plan_attention(layout, spec, order=order, impl=impl, head_dim=head_dim, precision=precision,
                          device=DEVICE).blocks  # fmt: skip
    generator = torch.Generator(DEVICE).manual_seed(0)
    q, k, v = torch.randn(
        3, 1, layout.length, 2, head_dim, generator=generator, device=DEVICE, dtype=dtype
    )
    q = q[:, : layout.queries]
    out = block_sparse_attention(q, k, v, plan, impl=impl, precision=precision)
    mask = plan.dense_mask()
    qd, kd, vd = (x[0].double().transpose(0, 1) for x in (q, k, v))  # [H, S, D]
    scores = (qd @ kd.mT * head_dim**-0.5).masked_fill(~mask, -torch.inf)
    exact = (scores.softmax(-1) @ vd).transpose(0, 1)
    return float((out[0].double() - exact).abs().sum() / exact.abs().sum())


@pytest.mark.parametrize("name", ["columns", "token"])
def test_the_portable_kernel(name):
    if DEVICE == "cuda":
        found = error(name, "triton", "model", (40, 26), (10, 7), 40, 64, torch.bfloat16)
        assert found < ALLOWED["model"]
    else:
        assert error(name, "triton", "model", (12, 9), (3, 3), 5, 16, torch.float32) < 1e-5


@gpu
@hopper
@pytest.mark.parametrize("precision", ["model", "fp8", "int8_fp8"])
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(
    ("grid", "coarse", "keys_only"), [((64, 48), (16, 12), False), ((47, 31), (12, 8), True)]
)
def test_the_hopper_kernel(name, precision, grid, coarse, keys_only):
    found = error(name, "gluon_sm90", precision, grid, coarse, 77, 128, torch.bfloat16, keys_only)
    assert found < ALLOWED[precision]

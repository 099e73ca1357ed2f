"""The bound of scores: its kernel in the interpreter, and on a Hopper GPU attention that relies on it."""

import pytest
import torch

from visionfuse.kernels.attention.gluon_sm90 import score_bound
from visionfuse.kernels.order import move
from visionfuse.kernels.plan import Dense, Neighborhood, TokenLayout, plan_attention
from visionfuse.testing import check_attention, random_plan

hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
    reason="needs a Hopper GPU",
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def planned(grid, text=0, **spec):
    rule = Neighborhood(**spec) if spec else Dense()
    layout = TokenLayout.joint(text=text, grids=[grid])
    return plan_attention(layout, rule, impl="gluon_sm90", head_dim=128).blocks


def make(plan, *, dim=128, heads=4, kv_heads=2, factor=1.0, dtype=torch.bfloat16, device="cuda"):
    g = torch.Generator(device).manual_seed(0)
    q = torch.randn(2, plan.length_q, heads, dim, generator=g, device=device, dtype=dtype) * factor
    k, v = (
        torch.randn(2, plan.length_k, kv_heads, dim, generator=g, device=device, dtype=dtype)
        for _ in range(2)
    )
    return q, k, v


@pytest.mark.parametrize("dim", [64, 72, 128])
def test_largest_squares(dim):
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32  # the interpreter truncates bf16
    x = torch.randn(2, 333, 3, 3, dim, device=DEVICE).to(dtype)
    q, k = x[:, :, 0], x[:, :200, 1, :1]
    for tensor, most in zip((q, k), move.moved_with_squares(q, k, k, None, None)[3], strict=True):
        expected = tensor.float().square().sum(-1).amax(1).flatten()
        assert torch.allclose(most, expected, rtol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_gives_no_bound(bad):
    q = torch.zeros(1, 100, 2, 64, device=DEVICE)
    q[0, 50, 1, 3] = bad
    most = move.moved_with_squares(q, q, q, None, None)[3][0]
    assert most[0] == 0
    assert not most[1] < 1e30


def test_it_pays_with_many_keys():
    assert score_bound.pays(planned((8192,)))
    assert score_bound.pays(planned((4608,)))
    assert not score_bound.pays(planned((3000,)))
    assert not score_bound.pays(planned((96, 96), window=32, stride=16))


PLANS = {
    "dense": lambda: planned((1000,)),
    "whole": lambda: planned((768,)),
    "windows": lambda: planned((64, 48), 77, window=(24, 16), stride=8),
    "volume": lambda: planned((9, 20, 22), 3, window=(3, 8, 8), causal=(True, False, False)),
    "lists": lambda: random_plan(1, length_q=700, length_k=900, block_q=192, block_k=128, axes=2),
    "lists-2": lambda: random_plan(
        2, length_q=700, length_k=900, block_q=128, block_k=128, axes=1, ragged=True
    ),
}


@hopper
@pytest.mark.parametrize("factor", [1.0, 30.0], ids=["bounded", "beyond"])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", PLANS)
def test_attention(name, dim, factor, monkeypatch):
    """With a factor of 30 the bound is too far above the scores, and the kernel finds the maximum."""
    from visionfuse.kernels.attention import gluon_sm90

    monkeypatch.setattr(score_bound, "pays", lambda plan: True)
    plan = PLANS[name]().to("cuda")
    q, k, v = make(plan, dim=dim, factor=factor)
    check_attention(gluon_sm90.forward, q, k, v, plan, dim**-0.5)


@hopper
def test_nan_stays_in_its_rows(monkeypatch):
    from visionfuse.kernels.attention import gluon_sm90

    monkeypatch.setattr(score_bound, "pays", lambda plan: True)
    plan = planned((1000,)).to("cuda")
    q, k, v = make(plan)
    q[1, 7, 2] = float("nan")
    out = gluon_sm90.forward(q, k, v, plan, 0.1, False)[0]
    bad = out.isnan().any(-1)
    assert bad[1, 7, 2]
    assert bad.sum() == 1

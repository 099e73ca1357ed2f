"""Whole entries on Hopper: `whole_kernel` in the interpreter here, on the GPU where that is one.

How it compiles, which decides about its speed and whether it ends: test_compile_matrix.py.
"""

import pytest
import torch

from visionfuse.kernels.attention.triton import host, sm90
from visionfuse.kernels.plan.compress import compress
from visionfuse.testing import check_attention, random_plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def tensors(plan, *, batch=1, heads=2, kv_heads=1, dim=32, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    k_shape = (batch, plan.length_k, kv_heads, dim)
    shapes = ((batch, plan.length_q, heads, dim), k_shape, k_shape)
    return tuple(torch.randn(s, generator=g).to(DEVICE, dtype) for s in shapes)


@pytest.fixture
def everything_splits(monkeypatch):
    """The kernel for Hopper takes all whole entries, also where another is faster, and when interpreted."""
    monkeypatch.setattr(sm90, "WORTH_A_SPLIT", 0)
    monkeypatch.setattr(sm90, "HEAD_DIMS", (64, 128))
    if DEVICE == "cpu":
        monkeypatch.setattr(sm90, "_is_hopper", lambda: True)
    elif not sm90._is_hopper():
        pytest.skip("needs a Hopper GPU")


def check_whole(plan, q, k, v, scale=0.1):
    plan = plan.to(DEVICE)
    launches = host.launches(q, k, v, q, None, plan, scale)
    assert launches[-1][0] is sm90.whole_kernel
    check_attention(host.forward, q, k, v, plan, scale)
    return len(launches)


WHOLE_PLANS = {
    "mixed": {"length_k": 256, "block_k": 64},
    "bits and variants": {"length_k": 200, "block_k": 128, "kind": "bits", "variants": 2},
    "whole alone": {"length_k": 512, "block_k": 128, "ragged": False, "full": 0.5, "partial": 0.0},
}


@pytest.mark.usefixtures("everything_splits")
@pytest.mark.parametrize("name", WHOLE_PLANS)
def test_whole_entries_alone(name):
    plan = random_plan(14, length_q=256, block_q=128, **WHOLE_PLANS[name])
    q, k, v = tensors(plan, batch=2, heads=2, kv_heads=1, dim=64, dtype=torch.float16)
    assert check_whole(plan, q, k, v) == (1 if name == "whole alone" else 2)


@pytest.mark.usefixtures("everything_splits")
@pytest.mark.parametrize("form", ["heads first", "fused", "one batch entry"])
def test_whole_entries_of_strided_inputs(form):
    plan = random_plan(15, length_q=256, length_k=256, block_q=128, block_k=64, ragged=False)
    g = torch.Generator().manual_seed(0)
    fused = torch.randn(2, 256, 6, 64, generator=g).to(DEVICE, torch.float16)
    q, k, v = fused.split(2, 2)
    if form == "heads first":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    if form == "one batch entry":
        q, k, v = q[1:], k[1:], v[1:]
    check_whole(plan, q, k, v)


def test_matrices_of_tma():
    as_matrix = sm90._as_matrix
    x = torch.empty(2, 100, 4, 64, dtype=torch.float16)
    assert as_matrix(x) == ([200, 256], (100, 0, 64))
    assert as_matrix(x.transpose(1, 2).contiguous().transpose(1, 2)) == ([800, 64], (400, 100, 0))
    assert as_matrix(x[..., ::2]) is None
    assert as_matrix(x.as_strided((2, 50, 4, 64), (13000, 260, 65, 1))) is None  # 65 * 2 bytes
    assert (
        as_matrix(x.flatten()[1:-255].view(-1, 64)[None, :, None]) is None
    )  # no multiple of 16 bytes


@pytest.mark.gpu
@pytest.mark.usefixtures("everything_splits")
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: too large for the interpreter")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("block_k", [64, 128])
@pytest.mark.parametrize("dim", [64, 128])
def test_lists_of_every_length(dim, block_k, dtype):
    """None to nine entries, in any order: what two warpgroups and two loads in flight could get wrong."""
    g = torch.Generator().manual_seed(0)
    mask = torch.zeros(20, 128, 9, block_k, dtype=torch.bool)
    for tile in range(20):
        mask[tile, :, torch.randperm(9, generator=g)[: tile % 10]] = True
    plan = compress(mask.view(20 * 128, 9 * block_k), block_q=128, block_k=block_k)
    q, k, v = tensors(plan, batch=2, heads=4, kv_heads=2, dim=dim, dtype=dtype)
    assert check_whole(plan, q, k, v) == 1

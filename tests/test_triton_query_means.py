"""Smoothing of queries by kernels against its definition in `quantize`: in the interpreter, or on a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from visionfuse.kernels.attention import quantize, query_means
from visionfuse.kernels.plan import sequences
from visionfuse.testing import random_plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(length=77, dim=24, heads=2, kv_heads=1, dtype=torch.float32, offset=20.0):
    g = torch.Generator().manual_seed(0)
    q = torch.randn(1, length, heads, dim, generator=g)
    k = torch.randn(1, length, kv_heads, dim, generator=g)
    q[..., 1] += offset
    k[..., 0] += offset
    return q.to(DEVICE, dtype), k.to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_queries_lose_the_mean_of_their_tile(dtype):
    plan = random_plan(5, length_q=77, length_k=77, block_q=40, block_k=32).to(DEVICE)
    q = inputs(dtype=dtype)[0].transpose(1, 2).contiguous().transpose(1, 2)  # strides of heads
    out, means = query_means.without_means(q, plan)
    want = quantize.tile_means(q.double(), plan)
    step = {torch.float32: 2.0**-20, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[dtype]
    torch.testing.assert_close(means.double(), want, atol=step, rtol=step)
    torch.testing.assert_close(
        out,
        quantize.without_tile_means(q.float(), means.float(), plan).to(dtype),
        atol=0,
        rtol=step,
    )
    assert out.is_contiguous()


def test_large_numbers_stay_finite_and_nan_stays_in_its_tile():
    plan = sequences.padded([64], 64, 64, block_q=32, block_k=32, device=DEVICE)
    q = torch.full((1, 64, 2, 16), 65504.0, device=DEVICE, dtype=torch.float16)
    q[:, ::2] *= -1
    q[0, 1] *= -1
    q[0, 40, 1, 3] = torch.nan
    out, _ = query_means.without_means(q, plan)
    assert out[0, :32].isfinite().all()
    assert out[0, 32:, 1, 3].isnan().all()
    assert int(out.isnan().sum()) == 32


def test_queries_in_no_tile_stay_as_they_are():
    plan = random_plan(5, length_q=77, length_k=77, block_q=40, block_k=32).to(DEVICE)
    q = inputs(length=80)[0]
    out, _ = query_means.without_means(q, replace(plan, length_q=80))
    assert torch.equal(out[:, 77:], q[:, 77:])
    assert not torch.equal(out[:, :77], q[:, :77])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("smooth_k", [True, False])
@pytest.mark.parametrize("padding", [True, False])
def test_rows_are_products_of_means_and_keys(dtype, smooth_k, padding):
    plan = random_plan(5, length_q=77, length_k=77, block_q=16, block_k=32).to(DEVICE)
    q, k = inputs(dtype=dtype)
    _, means = query_means.without_means(q, plan)
    k_mean = k.float().mean(1) if smooth_k else None
    order = torch.randperm(77, generator=torch.Generator().manual_seed(1)).int()
    order = torch.cat([order, torch.tensor([-1, -1, 3], dtype=torch.int32)]).to(DEVICE)
    rows = query_means.rows(means, k, k_mean, 0.3, order if padding else None)
    assert rows.stride(2) % 4 == 0
    smooth = k.double() - (0.0 if k_mean is None else k_mean[:, None].double())
    want = quantize.mean_rows(means.double(), smooth, 0.3)
    size = quantize.mean_rows(means.double().abs(), smooth.abs(), 0.3)
    if padding:
        there = order[order >= 0].long()
        rows, want, size = rows[..., order >= 0], want[..., there], size[..., there]
    assert rows.shape == want.shape
    assert ((rows - want).abs() <= 2.0**-14 * size).all()

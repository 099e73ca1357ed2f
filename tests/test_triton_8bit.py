"""The portable Triton forward of 8-bit operands: in the interpreter here, on the GPU where there is one."""

from dataclasses import replace

import pytest
import torch

from visionfuse.kernels.attention import triton as triton_attention
from visionfuse.kernels.attention.prologue import dequantized, reference
from visionfuse.kernels.attention.triton import TRITON_EIGHT_BIT
from visionfuse.kernels.plan.compress import compress
from visionfuse.testing import (
    dense_attention,
    dense_bias,
    plan_mask,
    poisoned_memory,
    random_bias,
    random_plan,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def tensors(plan, *, batch=1, heads=2, kv_heads=1, dim=32, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    k_shape = (batch, plan.length_k, kv_heads, dim)
    shapes = ((batch, plan.length_q, heads, dim), k_shape, k_shape)
    return tuple(torch.randn(s, generator=g).to(DEVICE, dtype) for s in shapes)


def check_quantized(precision, plan, *, dim, k_rows=128, heads=2, kv_heads=1, scale=0.2, bias=None):
    """Against float64 of the dequantised operands; FP8 weights are rounded, to 1/16 at worst."""
    plan, spec = plan.to(DEVICE), replace(TRITON_EIGHT_BIT[precision], k_rows=k_rows)
    q, k, v = tensors(plan, heads=heads, kv_heads=kv_heads, dim=dim)
    x = reference(q, k, v, spec)
    if x.v_scale is None:
        x = x._replace(v=v.half())
    assert triton_attention.unsupported_quantized(x, plan) == []
    with poisoned_memory():
        out, lse = triton_attention.forward_quantized(x, plan, scale, True, bias)
        alone, nothing = triton_attention.forward_quantized(x, plan, scale, False, bias)
    q, k, v = (t.double() for t in dequantized(x, spec))
    mask = plan_mask(plan, 1, heads)
    dense = {"accumulate": torch.float64, "bias": dense_bias(bias, plan) if bias else 0.0}
    exact, exact_lse = dense_attention(q, k, v, mask, scale, **dense)
    size, _ = dense_attention(q, k, v.abs(), mask, scale, **dense)
    error = (out.double() - exact).abs()
    assert out.dtype == (torch.float16 if x.v_scale is None else torch.bfloat16)
    if x.v_scale is None:
        assert (error <= 2**-10 * size + 2**-10).all()
    elif (
        DEVICE == "cpu"
    ):  # the interpreter casts some weights to half or twice their size (Triton 3.6)
        assert (error <= size / 2 + 2**-7).all()
        assert error.sum() <= 0.04 * size.sum()
    else:
        assert (error <= size / 16 + 2**-8 * exact.abs() + 2**-10).all()
    assert lse is not None
    seen = lse.isfinite()
    assert torch.equal(seen, exact_lse.isfinite())
    # The tensor cores of sm_89 and sm_90 sum e4m3 scores with 14 bits.
    assert (lse - exact_lse)[seen].abs().max() <= (1e-2 if precision == "fp8" else 2e-3)
    assert nothing is None
    assert torch.equal(out, alone)


@pytest.mark.parametrize("precision", TRITON_EIGHT_BIT)
@pytest.mark.parametrize("kind", ["intervals", "bits"])
@pytest.mark.parametrize("dim", [40, 64])
def test_random_lists(precision, kind, dim):
    """Entries of a whole block and shorter ones at the end, two to a block of scales."""
    plan = random_plan(
        16, length_q=50, length_k=200, block_q=32, block_k=64, ragged=False, kind=kind
    )
    check_quantized(precision, plan, dim=dim)


@pytest.mark.parametrize("precision", TRITON_EIGHT_BIT)
def test_with_a_scale_for_every_key(precision):
    plan = random_plan(17, length_q=50, length_k=90, block_q=32, block_k=32, ragged=False)
    check_quantized(precision, plan, dim=32, k_rows=1)


def test_runs_of_any_length():
    """Values of 16 bits do not ask where a run starts, only scales do."""
    plan = random_plan(18, length_q=50, length_k=120, block_q=32, block_k=32)
    check_quantized("int8", plan, dim=32)
    check_quantized("int8", plan, dim=32, k_rows=1)


def test_grouped_heads_and_variants():
    plan = random_plan(
        19, length_q=40, length_k=64, block_q=32, block_k=32, variants=4, ragged=False
    )
    check_quantized("fp8", plan, dim=32, heads=4, kv_heads=2)


@pytest.mark.parametrize("kind", ["relative", "block"])
@pytest.mark.parametrize(("precision", "k_rows"), [("fp8", 128), ("int8", 1)])
def test_biases(kind, precision, k_rows):
    """The bias meets the scores where they are in real units, whatever their scales are."""
    plan = random_plan(21, length_q=50, length_k=90, block_q=32, block_k=32, ragged=False)
    bias = random_bias(kind, plan.to(DEVICE), heads=2)
    check_quantized(precision, plan, dim=32, k_rows=k_rows, bias=bias)


def test_rows_without_keys_are_zero():
    mask = torch.zeros(32, 32, dtype=torch.bool)
    mask[3, 4] = True
    plan = compress(mask, block_q=16, block_k=16).to(DEVICE)
    x = reference(*tensors(plan), TRITON_EIGHT_BIT["fp8"])
    out, lse = triton_attention.forward_quantized(x, plan, 1.0, True)
    alone = torch.arange(32, device=DEVICE) == 3
    assert (out[:, ~alone] == 0).all()
    assert (lse[..., ~alone] == -torch.inf).all()
    assert lse[..., alone].isfinite().all()


def test_lists_every_reason():
    plan = random_plan(20, length_q=64, length_k=300, block_q=32, block_k=200).to(DEVICE)
    x = reference(*tensors(plan), TRITON_EIGHT_BIT["fp8"])
    reasons = " ".join(
        triton_attention.unsupported_quantized(x._replace(k=x.k.float(), v=x.v[..., 1:]), plan)
    )
    for word in ("both be int8", "v must be", "128 keys", "straddle", "multiples of 16"):
        assert word in reasons
    assert "no scales" in triton_attention.unsupported_quantized(x._replace(q_scale=None), plan)[0]
    with pytest.raises(ValueError, match="positive"):
        triton_attention.forward_quantized(x, plan, -1.0, False)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: too large for the interpreter")
@pytest.mark.parametrize("precision", TRITON_EIGHT_BIT)
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("dim", [64, 72, 128])
def test_real_sizes(precision, block, dim):
    plan = random_plan(21, length_q=700, length_k=1000, block_q=block, block_k=block, ragged=False)
    check_quantized(precision, plan, dim=dim, scale=dim**-0.5)

"""`sage_attention` on kernels that multiply codes, in Triton's interpreter: plans, strides, offsets.

INT8 with values of 16 bits: the interpreter loses the carry where it rounds to FP8 (Triton 3.6). On a GPU
tests/test_sage_gpu.py asks the same of the real kernels.
"""

from __future__ import annotations

import pytest
import torch

from visionfuse.sage import sage_attention, sage_attention_varlen

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton is not interpreted")


def inputs(length_q=40, length_k=70, dtype=torch.float16):
    """(B, H, S, D), keys with a channel far from 0."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(1, 2, length_q, 16, generator=g)
    k, v = torch.randn(2, 1, 1, length_k, 16, generator=g)
    k[..., 0] += 5.0
    q[..., 1] += 5.0
    return [x.to(dtype) for x in (q, k, v)]


def assert_same(got, want):
    """A number in between two codes may fall to either side in fp32 and fp64."""
    for a, b, tolerance in zip(got, want, (1e-2, 5e-3), strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


@pytest.mark.parametrize(
    "precision", ["int8", "int8+smooth_q", "int8+k_thread", "int8_fp16+k_token"]
)
@pytest.mark.parametrize("which", ["plain", "causal", "mask", "padding"])
def test_plans_of_masks(which, precision):
    q, k, v = inputs()
    g = torch.Generator().manual_seed(1)
    mask = {
        "mask": torch.rand(40, 70, generator=g) < 0.5,
        "padding": (torch.arange(70) < 33)[None, None, None],
    }.get(which)
    assert_same(*(
        sage_attention(
            q, k, v, attn_mask=mask, is_causal=which == "causal", return_lse=True, impl=impl,
            precision=precision,
        ) for impl in ("triton", "blocks")
    ))  # fmt: skip


@pytest.mark.parametrize("is_causal", [False, True])
def test_packed_sequences(is_causal):
    q, k, v = (x[0].transpose(0, 1) for x in inputs())
    k[25:, :, 2] += 20.0
    cu_q, cu_k = torch.tensor([0, 10, 10, 40]), torch.tensor([0, 25, 30, 70])
    assert_same(*(
        sage_attention_varlen(
            q, k, v, cu_q, cu_k, is_causal=is_causal, return_lse=True, impl=impl,
            precision="int8+k_token",  # blocks of keys are not the same for both
        ) for impl in ("triton", "blocks")
    ))  # fmt: skip


@pytest.mark.parametrize("impl", ["blocks", "triton"])
def test_offsets_past_two_to_the_31(impl):
    """Tokens 2^27 elements apart in memory that is reserved, and touched only where they are."""
    try:
        memory = torch.empty(20 << 27, dtype=torch.float16)
    except RuntimeError:
        pytest.skip("the machine does not reserve 5 GB")
    q, k, v = inputs(length_k=20)
    far = memory.as_strided(k.shape, (0, 0, 1 << 27, 1))
    far.copy_(k)
    assert far.storage_offset() + 19 * far.stride(2) > 2**31
    got, want = (
        sage_attention(q, x, v, impl=impl, precision="int8", return_lse=True) for x in (far, k)
    )
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)

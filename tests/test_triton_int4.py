"""INT4 codes, two a byte: who writes them, who reads them, and what they save. In the interpreter or on a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import library

from visionfuse.kernels.attention import Precision, block_sparse_attention, quantized
from visionfuse.kernels.attention import triton as triton_attention
from visionfuse.kernels.attention.prologue import (
    PrologueSpec,
    pack_int4,
    prologue,
    prologue_op,
    reference,
    unpack_int4,
)
from visionfuse.kernels.attention.query_tiles import round_tiles
from visionfuse.kernels.attention.triton import TRITON_EIGHT_BIT
from visionfuse.testing import random_plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PACKED = PrologueSpec(qk="int4x2", q_rows=16, k_rows=128, smooth_k=True)


def inputs(length=77, dim=64, heads=2, kv_heads=1, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    shapes = [(2, length, h, dim) for h in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, generator=g).to(DEVICE, dtype) for shape in shapes]


@pytest.mark.parametrize("write", [prologue, reference])
@pytest.mark.parametrize("dim", [24, 64])
def test_codes_are_those_of_a_byte_each(write, dim):
    tensors = inputs(dim=dim)
    order = torch.randperm(77, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    packed = write(*tensors, PACKED, order=order)
    plain = write(*tensors, replace(PACKED, qk="int4"), order=order)
    assert packed.q.dtype == torch.uint8
    assert packed.head_dim == dim == 2 * packed.q.shape[-1]
    assert torch.equal(unpack_int4(packed.q), plain.q)
    assert torch.equal(packed.k, pack_int4(plain.k))
    assert packed.nbytes == plain.nbytes - (plain.q.nbytes + plain.k.nbytes) // 2
    for a, b in zip(packed[2:], plain[2:], strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


def test_codes_of_tiles():
    plan = random_plan(3, length_q=77, length_k=77, block_q=32, block_k=32).to(DEVICE)
    q = inputs(dim=24)[0]
    (packed, scale), (codes, same) = (round_tiles(q, plan, name) for name in ("int4x2", "int4"))
    tile = torch.cat(
        [torch.arange(s, s + c) for s, c in zip(plan.q_start, plan.q_count, strict=True)]
    )
    assert torch.equal(unpack_int4(packed)[:, tile], codes[:, tile])
    assert torch.equal(scale[..., tile], same[..., tile])


@pytest.mark.parametrize(("k_rows", "kind"), [(128, "intervals"), (1, "bits")])
@pytest.mark.parametrize("dim", [32, 40, 128])
def test_the_kernel_unpacks_in_registers(k_rows, kind, dim):
    """To the bit in the interpreter. A GPU's registers hold the scores in another order, and sum them so."""
    plan = random_plan(
        16, length_q=50, length_k=200, block_q=32, block_k=64, ragged=False, kind=kind
    ).to(DEVICE)
    spec = replace(TRITON_EIGHT_BIT["int4"], k_rows=k_rows)
    q, k, v = inputs(length=200, dim=dim, dtype=torch.float16)
    packed = prologue(q[:, :50], k, v, spec)
    plain = packed._replace(q=unpack_int4(packed.q), k=unpack_int4(packed.k))
    assert triton_attention.unsupported_quantized(packed, plan) == []
    got, want = (triton_attention.forward_quantized(x, plan, 0.2, True) for x in (packed, plain))
    for a, b, step in zip(got, want, (2.0**-10, 1e-5), strict=True):
        assert a is not None
        assert b is not None
        if DEVICE == "cpu":
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b, atol=step, rtol=step)


@pytest.mark.parametrize("precision", ["int4", "int4+smooth_q", "int4_tile", "int4_fp16+k_token"])
def test_of_all_precisions(precision):
    """What the portable kernel computes is the emulation's; its operands are half as long as the model's heads."""
    q, k, v = inputs(length=150, dim=32, dtype=torch.float16)
    plan = random_plan(22, length_q=150, length_k=150, block_q=32, block_k=64, ragged=False).to(
        DEVICE
    )
    spec = quantized._spec(quantized.NATIVE["triton"], Precision.parse(precision))
    assert spec.qk == "int4x2"
    got, want = (
        block_sparse_attention(
            q, k, v, plan, precision=precision, impl=impl, return_lse=True
        ) for impl in ("triton", "reference")
    )  # fmt: skip
    for a, b in zip(got, want, strict=True):
        off = (a - b)[a.isfinite()].abs()
        assert off.mean() < 1e-3
        assert off.max() < 0.2  # a number between two codes may fall to either side


def test_the_hopper_kernel_reads_a_byte_a_code():
    precision = Precision.parse("int4_fp8")
    assert quantized._spec(quantized.NATIVE["gluon_sm90"], precision).qk == "int4"


def test_under_torch_compile():
    q, k, v = inputs(length=20, dim=32)
    fixed = ("int4x2", 1, 16, 1, "same", "tokens", 128, True, 1.0, 1e-6)
    library.opcheck(prologue_op, (q, k, v, *fixed, *[None] * 6))


def test_what_does_not_fit_is_refused():
    plan = random_plan(20, length_q=64, length_k=300, block_q=32, block_k=64, ragged=False).to(
        DEVICE
    )
    q, k, v = inputs(length=300)
    x = reference(q[:, :64], k, v, TRITON_EIGHT_BIT["int4"])
    reasons = triton_attention.unsupported_quantized(x._replace(k=unpack_int4(x.k)), plan)
    assert any("two codes of INT4 a byte" in reason for reason in reasons)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: its memory is measured")
def test_memory_on_a_gpu():
    """Queries and keys of 16 heads and 16,384 tokens: 2 x 32 MiB a byte a code, half of it packed."""
    q, k, v = inputs(length=8192, dim=128, heads=16, kv_heads=16, dtype=torch.bfloat16)
    peaks = {}
    for name in ("int4x2", "int4"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        x = prologue(q, k, v, PrologueSpec(qk=name, k_rows=128))
        peaks[name] = torch.cuda.max_memory_allocated() - before
        assert x.nbytes - v.nbytes <= peaks[name]
        del x
    assert 0.5 * 2**25 <= (peaks["int4"] - peaks["int4x2"]) <= 1.1 * 2**25

"""The choices of SageAttention2, each against what happens without it: relative L1 errors of attention."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from visionfuse.kernels.attention import (
    Precision,
    block_sparse_attention,
    emulation,
    prologue,
    quantize,
)
from visionfuse.kernels.attention.precision import SCALES
from visionfuse.kernels.plan import sequences

TOKENS = 1024


@cache
def plan():
    return sequences.padded([TOKENS], TOKENS, TOKENS)


def inputs(offset: float = 0.0, *, dim=64, outliers=False, dtype=torch.float32):
    """Normal numbers; channels of queries and keys that are `offset` off, as in real models, one in common."""
    g = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, TOKENS, 2, dim, generator=g)
    q[..., [1, 5]] += offset
    k[..., [0, 5]] += offset
    if outliers:  # a token in fifty is eight times as large
        size = torch.ones(TOKENS).masked_fill(torch.rand(TOKENS, generator=g) < 0.02, 8.0)
        q, k = q * size[:, None, None], k * size[:, None, None]
    return tuple(x.to(dtype) for x in (q, k, v))


@cache
def error(precision: str, offset: float = 0.0, dim: int = 64, outliers: bool = False) -> float:
    q, k, v = inputs(offset, dim=dim, outliers=outliers)
    exact = block_sparse_attention(q, k, v, plan(), impl="reference")
    out = block_sparse_attention(q, k, v, plan(), impl="blocks", precision=precision)
    return relative_l1(out, exact)


def relative_l1(out, exact) -> float:
    return float((out.double() - exact.double()).abs().sum() / exact.double().abs().sum())


# -- formats ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [64, 128])
def test_errors_on_normal_numbers_are_those_of_the_kernels(dim):
    """What one H200 measured (assets/bench/engine.csv): 0.038 for int8_fp8, 0.053 for fp8."""
    assert 0.034 < error("int8_fp8", dim=dim) <= 0.0385
    assert 0.048 < error("fp8", dim=dim) < 0.058
    assert error("int8", dim=dim) <= 0.015
    assert error("int8_fp16", dim=dim) <= 0.015
    assert error("int4", dim=dim) < 0.22


def test_smoothing_of_values_that_need_none_costs_nothing():
    """Numbers of one exponent less a mean are rounded to one side by the model's format: 50% more error on an H200,
    if the mean that is added in the end is not that of what was taken."""
    q, k, v = inputs(dtype=torch.bfloat16)
    exact, plain, smooth = (
        block_sparse_attention(q, k, v, plan(), impl="reference", precision=precision)
        for precision in ("model", "int8_fp8", "int8_fp8+smooth_v")
    )
    assert relative_l1(smooth, exact) < 1.03 * relative_l1(plain, exact)


def test_int8_is_nearer_than_fp8_and_int4():
    """SageAttention (arXiv 2410.02367), table 2: 1.76 times less error with INT8 than with FP8 queries and keys."""
    assert error("fp8_model") > 1.76 * error("int8")
    assert error("int4") > 10 * error("int8")


def test_the_rounding_of_weights_is_counted():
    q, k, v = inputs()
    exact = block_sparse_attention(q, k, v, plan(), impl="reference")
    formats = Precision.parse("int8_fp8")
    without, _ = emulation.forward(
        q, k, v, plan(), 64**-0.5, False, formats, weights=emulation.exact_weights
    )
    assert relative_l1(without, exact) < 0.85 * error("int8_fp8")


def test_fp16_weights_are_nearer_than_bf16_ones():
    """Inputs that bf16 and INT8 hold exactly, so that weights alone are rounded."""
    g = torch.Generator().manual_seed(0)
    q, k, v = torch.randint(-7, 8, (3, 1, TOKENS, 1, 64), generator=g).bfloat16()
    q[:, :, :, 0] = k[:, :, :, 0] = 127  # the scales are 1
    exact = block_sparse_attention(q.double(), k.double(), v.double(), plan(), impl="reference",
                                   scale=0.01)  # fmt: skip

    def of_weights(pv: str) -> float:
        formats = Precision(qk="int8", pv=pv, smooth_k=False)
        weights = emulation.weights_of(formats, torch.bfloat16)
        out, _ = emulation.forward(
            q.double(), k.double(), v.double(), plan(), 0.01, False, formats, dtype=torch.float64,
            weights=weights,
        )  # fmt: skip
        return relative_l1(out, exact)

    assert 1e-5 < of_weights("fp16") < of_weights("model") / 4


def test_fp16_values_reach_past_both_ends_of_float16():
    q, k, v = inputs(dtype=torch.bfloat16)
    v[..., 3] *= 1e8
    v[..., 4] *= 1e-8
    exact = block_sparse_attention(q, k, v, plan(), impl="reference")
    out = block_sparse_attention(q, k, v, plan(), precision="int8_fp16")
    for channel in (3, 4, 5):
        assert relative_l1(out[..., channel], exact[..., channel]) < 0.03


# -- smoothing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [10.0, 20.0, 50.0])
def test_smoothing_takes_offsets_of_channels_away(offset):
    assert error("int8+smooth_q", offset) <= 1.1 * error("int8")
    assert error("int8-smooth_k", offset) > 3 * error("int8+smooth_q", offset)
    assert error("int8", offset) > 2 * error("int8+smooth_q", offset)
    assert error("int4+smooth_q", offset) <= 0.22
    assert error("int4+smooth_q", offset) <= error("int4", offset) / 2
    assert error("int4+smooth_q", offset) < error("int4+smooth_q-smooth_k", offset) / 2


def test_smoothing_of_values_takes_offsets_of_channels_away():
    q, k, v = inputs()
    v = v + torch.tensor([0.0, 4.0, -8.0, 30.0]).repeat(16)
    exact = block_sparse_attention(q, k, v, plan(), impl="reference")
    noise = exact - v.mean(1, keepdim=True)
    smooth, plain = (
        block_sparse_attention(q, k, v, plan(), impl="blocks", precision=name)
        for name in ("int8_fp8+smooth_v", "int8_fp8")
    )
    assert (smooth - exact).abs().sum() < 0.2 * (plain - exact).abs().sum()
    assert (smooth - exact).abs().sum() < 0.05 * noise.abs().sum()


# -- granularity ------------------------------------------------------------------------------------


def test_fewer_tokens_to_a_scale_are_better():
    """In the order of SageAttention2, table 5. Queries and keys in INT4, some tokens eight times the others."""
    of = {name: error(f"int4+smooth_q+q_{name}+k_{name}", outliers=True) for name in SCALES}
    assert of["token"] < 0.95 * of["thread"]
    assert of["thread"] < 0.7 * of["warp"] < 0.7 * 0.7 * of["block"]
    assert of["block"] < 0.9 * of["tensor"]
    assert of["thread"] < 0.95 * of["thread_sm80"] < 0.95 * 0.7 * of["warp_sm80"]
    assert of["warp"] < 0.9 * of["warp_sm80"] < 0.9 * 0.8 * of["block_sm80"]
    only_keys = {name: error(f"int4+smooth_q+k_{name}", outliers=True) for name in SCALES}
    assert only_keys["block_sm80"] < 0.98 * only_keys["block"]


@pytest.mark.parametrize("name", SCALES)
def test_scales_are_stored_in_the_order_of_the_threads(name):
    """SageAttention2 on Hopper: that of query n is (n // 64) * 32 + warp * 8 + lane // 4, of key n
    (n // 128) * 4 + lane % 4, where the lane that holds a pair of columns is theirs by 8 and 2."""
    of_q, of_k = (quantize.group_of(groups, 256, torch.device("cpu")) for groups in SCALES[name])
    n = torch.arange(256)
    if name == "thread":
        warp, row = n % 64 // 16, n % 16
        assert torch.equal(of_q, n // 64 * 32 + warp * 8 + row % 8)
        assert torch.equal(of_k, n // 128 * 4 + n % 8 // 2)
    for group in (of_q, of_k):
        assert torch.equal(group.unique(), torch.arange(int(group.max()) + 1))


def test_codes_reach_the_largest_one_in_every_group():
    g = torch.Generator().manual_seed(0)
    x = (
        torch.randn(2, 300, 3, 16, generator=g, dtype=torch.float64)
        * 10.0 ** torch.arange(3)[:, None]
    )
    for format, largest in (("int8", 127), ("int4", 7), ("fp8", 448)):
        for pair in SCALES.values():
            for groups in pair:
                codes, scale = quantize.quantized_tokens(x, format, groups)
                assert scale.shape == (
                    2,
                    3,
                    int(quantize.group_of(groups, 300, x.device).max()) + 1,
                )
                assert codes.double().abs().max() == largest
                back = quantize.dequantized(codes, scale, groups)
                step = (
                    1 / 16 * x.abs() + 2.0**-9 * scale.max() if format == "fp8" else scale.max() / 2
                )
                assert ((back - x).abs() <= step * (1 + 1e-12)).all()


# -- two-level accumulation -------------------------------------------------------------------------


def tensor_core_sum(p, v, *, block: int) -> torch.Tensor:
    """p [keys] times v [keys, D] as tensor cores of Hopper sum FP8: 32 products at once are cut to 13 bits
    behind the leading one of the largest and of the accumulator. `block` keys are summed so, then added in fp32."""
    out = torch.zeros(v.shape[1], dtype=torch.float32)
    for start in range(0, len(p), block):
        inner = torch.zeros(v.shape[1], dtype=torch.float64)
        for k in range(start, min(start + block, len(p)), 32):
            terms = torch.cat([inner[None], p[k : k + 32, None] * v[k : k + 32]])
            exponent = torch.frexp(terms.abs().amax(0))[1]
            unit = torch.exp2(exponent.double() - 14)
            inner = ((terms / unit).trunc() * unit).sum(0)
        out = out + inner.float()
    return out


def test_blocks_are_summed_from_zero_and_added_in_fp32():
    """SageAttention2, section 3.4. Over 16,384 keys one accumulator of 14 bits loses what two levels keep."""
    g = torch.Generator().manual_seed(0)
    p = (torch.rand(16384, generator=g) * 448).to(torch.float8_e4m3fn).double()
    v = (torch.randn(16384, 16, generator=g) + 1).to(torch.float8_e4m3fn).double()
    exact = p @ v
    of = {
        b: float(((tensor_core_sum(p, v, block=b) - exact) / exact).abs().mean())
        for b in (128, 16384)
    }
    assert of[128] < 1e-3
    assert of[16384] > 10 * of[128]


# -- storage ----------------------------------------------------------------------------------------


def test_int4_codes_take_half_a_byte():
    every = torch.arange(-7, 8, dtype=torch.int8)
    codes = torch.cartesian_prod(every, every).reshape(15, 15, 2)
    packed = prologue.pack_int4(codes)
    assert packed.dtype == torch.uint8
    assert packed.numel() * 2 == codes.numel()
    assert torch.equal(prologue.unpack_int4(packed), codes)
    assert packed.unique().numel() == 225
    low_first = prologue.pack_int4(torch.tensor([3, -2], dtype=torch.int8))
    assert low_first.tolist() == [0xE3]


def test_int4_keys_survive_their_storage():
    _, k, _ = inputs(dtype=torch.bfloat16)
    groups = SCALES["block"][1]
    codes, scale = quantize.quantized_tokens(k.double(), "int4", groups)
    back = quantize.dequantized(prologue.unpack_int4(prologue.pack_int4(codes)), scale, groups)
    assert torch.equal(back, quantize.dequantized(codes, scale, groups))


@pytest.mark.parametrize(
    ("call", "x"),
    [
        (prologue.pack_int4, torch.zeros(3, dtype=torch.int8)),
        (prologue.pack_int4, torch.zeros(4)),
        (prologue.unpack_int4, torch.zeros(4, dtype=torch.int8)),
    ],
)
def test_wrong_storage_is_refused(call, x):
    with pytest.raises(ValueError, match="takes"):
        call(x)

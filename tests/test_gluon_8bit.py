"""The 8-bit Hopper kernel where there is a Hopper GPU (`test_compile_gluon` compiles it anywhere)."""

from dataclasses import replace

import pytest
import torch

from visionfuse.bench.block_lists import all_keys, band, block_list
from visionfuse.kernels.attention.bias import BlockBias
from visionfuse.kernels.attention.prologue import (
    EIGHT_BIT,
    SWAPPED,
    PrologueSpec,
    dequantized,
    reference,
)
from visionfuse.testing import (
    assert_within_budget,
    dense_bias,
    plan_mask,
    poisoned_memory,
    random_plan,
)

hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
    reason="needs a Hopper GPU",
)

SPECS = {
    **EIGHT_BIT,
    **{
        f"{name}_rows": replace(spec, k_rows=1) for name, spec in EIGHT_BIT.items()
    },  # a scale a key
    "int8_bf16": PrologueSpec(qk="int8", k_rows=128),  # values in 16 bits
    **{
        f"{name}_groups": replace(spec, k_groups=4) for name, spec in EIGHT_BIT.items()
    },  # four scales for the keys of a block
    "int8_bf16_groups": PrologueSpec(qk="int8", k_rows=128, k_groups=4),
    "fp8_head": replace(EIGHT_BIT["fp8"], k_rows=0),  # a scale for all keys of a head
}
# e4m3 weights are summed as they are multiplied, rounded to 4 bits: a sixteenth where one key has all of it.
LSE_BUDGET = {name: 2e-3 if "bf16" in name else 1 / 16 for name in SPECS}


def quantize(q, k, v, precision):
    x = reference(q.float(), k.float(), v.float(), SPECS[precision])
    return x if x.v_scale is not None else x._replace(v=x.v.bfloat16())


def dequantize(x, precision):
    return tuple(t.double() for t in dequantized(x, SPECS[precision]))


def some_keys(tile: int, tiles: int, blocks: int) -> list[int]:
    """Lists of every length from none, first and last block among them."""
    return [j for j in range(blocks) if (j * 7 + tile * 3) % 5 < tile % 6]


def random_bounds(block_q: int, **kwargs):
    return random_plan(
        5, length_q=700, length_k=900, block_q=block_q, block_k=128, ragged=False, **kwargs
    )


def many_words():
    plan = random_bounds(192, axes=6, tables=3)
    for x in (plan.mask.lo, plan.mask.hi, plan.mask.coord):
        x.mul_(1000).sub_(3000)
    return plan


# name: plan, batch, heads, key heads, what multiplies the queries
CASES = {
    "dense": (lambda: block_list(768, 1024, 192, all_keys), 1, 2, 2, 1.0),
    "dense-ragged": (lambda: block_list(1000, 1000, 192, all_keys), 2, 4, 2, 1.0),
    "dense-2-groups": (lambda: block_list(1000, 1000, 128, all_keys), 2, 2, 1, 1.0),
    "dense-one-token": (lambda: block_list(1, 1, 192, all_keys), 1, 1, 1, 1.0),
    "dense-129": (lambda: block_list(129, 129, 192, all_keys), 3, 2, 2, 1.0),
    "dense-peaked": (lambda: block_list(400, 1500, 192, all_keys), 1, 2, 2, 4.0),
    "band": (lambda: block_list(4000, 4000, 192, band), 1, 2, 2, 1.0),
    "lists": (lambda: block_list(2000, 1111, 192, some_keys), 2, 2, 1, 1.0),
    "lists-2-groups": (lambda: block_list(1500, 1280, 128, some_keys), 1, 3, 3, 1.0),
    "intervals": (lambda: random_bounds(192, axes=2), 2, 4, 2, 1.0),
    "intervals-2-groups": (lambda: random_bounds(128, axes=3, tables=2), 1, 2, 2, 1.0),
    "intervals-words": (many_words, 1, 2, 2, 1.0),
    "variants": (lambda: random_bounds(192, variants=4), 2, 4, 2, 1.0),
    "bits": (lambda: random_bounds(192, kind="bits"), 1, 2, 1, 1.0),
}  # fmt: skip
DIMS = (128, 64)


def pairs(precisions, cases) -> list[str]:
    """Every format with every case, and both with every head dim, but not all three with each other: each
    combination of features is a kernel to compile, which is what takes the time."""
    return [
        f"{precision}-{DIMS[(i + j) % len(DIMS)]}-{case}"
        for i, precision in enumerate(precisions)
        for j, case in enumerate(cases)
    ]


NAMES = pairs(EIGHT_BIT, CASES)
NAMES += pairs(["int8_bf16"], ["dense", "lists", "bits", "variants"])
NAMES += ["int8_bf16-256-dense-2-groups"]
NAMES += [f"{p}-{d}-variants" for p in ("int8_fp8", "int8_bf16") for d in (32, 72, 80)]
NAMES += pairs(
    [f"{p}_rows" for p in EIGHT_BIT],
    ["dense", "dense-ragged", "lists-2-groups", "intervals", "bits"],
)
NAMES += pairs(["int8_fp8_groups"], ["dense", "dense-ragged", "dense-one-token", "dense-peaked", "lists-2-groups",
                                    "intervals", "variants", "bits"])  # fmt: skip
NAMES += pairs(
    ["fp8_head"], ["dense-ragged", "dense-one-token", "lists", "intervals", "variants", "bits"]
)
NAMES += pairs(["fp8_groups", "int8_bf16_groups"], ["dense-ragged", "bits"])
# With a row of numbers added to the scores of every tile: each format and each case at both head dims.
BIASED = ("dense", "dense-ragged", "lists", "intervals-2-groups", "bits")
NAMES += [f"{p}-{d}-{BIASED[(i + j) % 5]}+bias" for i, p in enumerate(SPECS)
          for j, d in enumerate(DIMS)]  # fmt: skip


def rounded_weights_attention(q, k, v, mask, scale, rounding=torch.float8_e4m3fn, bias=0.0):
    """Exact attention, and the same with weights rounded at 448 times their size, in bf16; the lse."""
    group = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (q @ k.mT * scale + bias).masked_fill(~mask, -torch.inf)
    top = scores.amax(-1, keepdim=True)
    weights = (scores - top.masked_fill(top == -torch.inf, 0.0)).exp() * 448
    total = weights.sum(-1, keepdim=True)
    exact = weights @ v / total.masked_fill(total == 0, 1.0)
    low = weights.float().to(rounding).float().to(v.dtype) @ v
    low = (low / total.masked_fill(total == 0, 1.0)).bfloat16()
    return exact.transpose(1, 2), low.transpose(1, 2), scores.logsumexp(-1)


@hopper
@pytest.mark.parametrize("name", NAMES)
def test_case(name):
    """Against float64 of the dequantised operands, and all of it against attention that rounds nothing."""
    from visionfuse.kernels.attention.gluon_sm90 import eight_bit

    precision, dim, case = name.split("-", 2)
    case, _, biased = case.partition("+")
    make, batch, heads, kv_heads, factor = CASES[case]
    dim, plan = int(dim), make().to("cuda")
    if case == "variants":
        plan = type(plan).from_tensors(plan.to_tensors(), plan.scalars())
    g = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(batch, n, h, dim, generator=g, device="cuda")
        for n, h in ((plan.length_q, heads), (plan.length_k, kv_heads), (plan.length_k, kv_heads))
    )
    q *= factor
    k[..., 0] += 2.0  # a channel that stands out, as keys of real models have
    x = quantize(q, k, v, precision)
    scale = dim**-0.5
    mask = plan_mask(plan, batch, heads)
    rounding = torch.bfloat16 if x.v_scale is None else torch.float8_e4m3fn
    bias, dense = None, 0.0
    if biased:
        bias = BlockBias(
            3 * torch.randn(batch, heads, plan.tiles, plan.length_k, generator=g, device="cuda")
        )
        dense = dense_bias(bias, plan)
    exact, low, exact_lse = rounded_weights_attention(
        *dequantize(x, precision), mask, scale, rounding, dense
    )
    whole = rounded_weights_attention(*(t.double() for t in (q, k, v)), mask, scale, bias=dense)[0]
    reasons = eight_bit.unsupported(x, plan)
    assert not reasons, reasons
    with poisoned_memory():
        out, lse = eight_bit.forward(x, plan, scale, True, bias)
        alone, nothing = eight_bit.forward(x, plan, scale, False, bias)
    assert (out.shape, out.dtype) == (q.shape, torch.bfloat16)
    assert_within_budget(out, exact, low)
    assert not lse.isnan().any(), "lse has NaN"
    assert torch.equal(lse.isfinite(), exact_lse.isfinite()), "lse: infinities differ"
    lse_error = (lse - exact_lse).nan_to_num(0.0, 0.0, 0.0).abs().max()
    assert lse_error <= LSE_BUDGET[precision] * factor
    assert nothing is None
    assert torch.equal(out, alone), "the output depends on whether the lse is asked for"
    assert torch.cosine_similarity(out.double().flatten(), whole.flatten(), dim=0) > 0.99


@hopper
@pytest.mark.parametrize("precision", EIGHT_BIT)
def test_reads_fused_projections_and_repeats_exactly(precision):
    from visionfuse.kernels.attention.gluon_sm90 import eight_bit

    plan = block_list(500, 500, 192, all_keys).to("cuda")
    q, k, v = torch.randn(3, 2, 500, 4, 128, device="cuda")
    x = quantize(q, k, v, precision)
    fused = torch.stack([x.q.view(torch.int8), x.k.view(torch.int8)], 2).view(x.q.dtype)
    views = x._replace(q=fused[:, :, 0], k=fused[:, :, 1])
    first = eight_bit.forward(x, plan, 0.1, False)[0]
    assert torch.equal(first, eight_bit.forward(views, plan, 0.1, False)[0])


# Without a GPU -----------------------------------------------------------------------------------


def test_stored_values_lie_as_weights_do_in_registers():
    """A thread holds scores of columns 2c, 2c + 1, 2c + 8, 2c + 9 of 16; wgmma wants 4c .. 4c + 3 there."""
    columns = torch.arange(16).view(2, 4, 2).permute(1, 0, 2).flatten()
    assert columns.tolist() == list(SWAPPED)


@pytest.mark.parametrize("precision", EIGHT_BIT)
@pytest.mark.parametrize("length", [1, 128, 300])
def test_quantizer(precision, length):
    q, k, v = torch.randn(3, 2, length, 4, 64, generator=torch.Generator().manual_seed(0))
    k[0, :, 0] = 0.0
    x = quantize(q, k[:, :, :2], v[:, :, :2], precision)
    assert x.v.shape == (2, 2, 64, -(-length // 128) * 128)
    assert x.k_scale.shape == (2, 2, -(-length // 128))
    for stored, exact in zip(dequantize(x, precision), (q, k[:, :, :2], v[:, :, :2]), strict=True):
        assert (stored - exact).abs().max() <= exact.abs().max() / 15  # half a step of e4m3 is 1/16
        assert not stored.isnan().any()
    assert not x.v.float()[..., length:].any() or length % 16


def test_refuses_with_every_reason():
    pytest.importorskip("triton")
    from visionfuse.kernels.attention.gluon_sm90 import eight_bit

    plan = random_plan(1, length_q=160, length_k=160, block_q=256, block_k=32, kind="bits")
    q, k, v = torch.randn(3, 1, 160, 2, 144)
    x = quantize(q, k, v, "fp8")
    reasons = " ".join(eight_bit.unsupported(x, plan))
    for word in ("Hopper", "head dim", "at most 128 queries", "start at multiples of 128"):
        assert word in reasons
    with pytest.raises(ValueError, match="positive"):
        eight_bit.forward(x, plan, -1.0, False)

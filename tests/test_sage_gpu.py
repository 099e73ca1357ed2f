"""`sage_attention` on a GPU: both layouts, masks, packed sequences, graphs, streams, compilation, gradients.

Without one, nothing here runs; tests/test_sage.py has the same questions for a CPU.
"""

from __future__ import annotations

import math
import warnings
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from visionfuse.kernels.attention import block_sparse_attention, unsupported_reasons
from visionfuse.kernels.plan import sequences
from visionfuse.sage import sage_attention, sage_attention_varlen
from visionfuse.testing import poisoned_memory

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
    reason="needs a GPU that multiplies FP8",
)
# Relative L1 error on normal numbers: tests/test_sage_numerics.py has that of the emulation.
MOST = {"int8_fp8": 0.042, "fp8": 0.058, "int8": 0.016, "int8_fp16": 0.016, "int4_fp8": 0.25,
        "int8_fp8+smooth_q": 0.042, "int4+smooth_q": 0.24, "int8_fp8+k_thread": 0.042,
        "int8_fp8+k_thread+smooth_q": 0.042, "int8+k_thread": 0.016}  # fmt: skip


def inputs(length_q=1000, length_k=1000, heads=4, kv_heads=2, dim=128, batch=2, offset=0.0):
    """(B, H, S, D) in bf16."""
    g = torch.Generator("cuda").manual_seed(0)
    q = torch.randn(batch, heads, length_q, dim, generator=g, device="cuda")
    k, v = torch.randn(2, batch, kv_heads, length_k, dim, generator=g, device="cuda")
    q[..., 1] += offset
    k[..., 0] += offset
    return [x.bfloat16() for x in (q, k, v)]


def exact(q, k, v, mask=None):
    out = F.scaled_dot_product_attention(
        q.float(), k.float(), v.float(), attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.nan_to_num(0.0)


def error(out, want) -> float:
    assert not out.isnan().any()
    return ((out.float() - want).abs().sum() / want.abs().sum()).item()


@pytest.fixture(autouse=True)
def kernels_run():
    """Exact attention in place of a kernel would pass most tests: the warning about it is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("precision", MOST)
def test_precisions(layout, precision):
    q, k, v = inputs()
    want = exact(q, k, v)
    if layout == "NHD":
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        want = want.transpose(1, 2)
    with poisoned_memory():
        out = sage_attention(q, k, v, layout, precision=precision)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    assert MOST[precision] / 4 < error(out, want) < MOST[precision]


@pytest.mark.parametrize("offset", [10.0, 50.0])
def test_smoothing_takes_offsets_of_channels_away(offset):
    want = exact(*inputs(offset=offset))
    of = {
        name: error(sage_attention(*inputs(offset=offset), precision=name), want)
        for name in ("int8", "int8+smooth_q", "int4", "int4+smooth_q")
    }
    assert of["int8+smooth_q"] < 0.6 * of["int8"]
    assert of["int4+smooth_q"] < min(0.22, 0.5 * of["int4"])


@pytest.mark.parametrize("dim", [64, 72, 96, 128, 192, 256])
def test_head_sizes(dim):
    q, k, v = inputs(dim=dim)
    for precision in ("int8_fp8", "int8"):
        out = sage_attention(q, k, v, precision=precision)
        assert error(out, exact(q, k, v)) < MOST[precision]


@pytest.mark.parametrize("lengths", [(1000, 1000), (300, 1000), (1, 777), (1000, 300)])
def test_causal_is_right_aligned(lengths):
    q, k, v = inputs(*lengths)
    seen = torch.ones(lengths, dtype=torch.bool, device="cuda").tril(lengths[1] - lengths[0])
    out, lse = sage_attention(q, k, v, is_causal=True, return_lse=True)
    assert error(out, exact(q, k, v, seen)) < 0.06
    blind = ~seen.any(-1)
    assert not out[:, :, blind].any()
    assert torch.equal(lse == -torch.inf, blind.expand_as(lse))


def test_masks():
    q, k, v = inputs()
    g = torch.Generator("cuda").manual_seed(1)
    key = torch.arange(1000, device="cuda")
    for mask in (
        torch.rand(2, 1, 1000, 1000, generator=g, device="cuda") < 0.5,
        (key < torch.tensor([[300], [1000]], device="cuda"))[:, None, None],
        (key >= torch.tensor([[301], [5]], device="cuda"))[:, None, None],
    ):
        want = exact(q, k, v, mask)
        assert error(sage_attention(q, k, v, attn_mask=mask), want) < MOST["int8_fp8"]
        added = torch.zeros(mask.shape, device="cuda").masked_fill(~mask, -torch.inf)
        assert error(sage_attention(q, k, v, attn_mask=added), want) < MOST["int8_fp8"]


@pytest.mark.parametrize("is_causal", [False, True])
def test_packed_sequences(is_causal):
    q, k, v = (x[0].transpose(0, 1) for x in inputs())
    ends = [0, 100, 100, 517, 1000]
    cu = torch.tensor(ends, dtype=torch.int32, device="cuda")
    k[517:, :, 1] += 40.0
    blocks = [torch.ones(b - a, b - a, device="cuda") for a, b in pairwise(ends)]
    seen = torch.block_diag(*(x.tril() if is_causal else x for x in blocks)).bool()
    want = exact(*(x.transpose(0, 1)[None] for x in (q, k, v)), seen)[0].transpose(0, 1)
    out = sage_attention_varlen(q, k, v, cu, cu, 483, 483, is_causal=is_causal)
    assert error(out, want) < 0.06


@pytest.mark.parametrize("impl", ["gluon_sm90", "triton"])
def test_blocks_are_summed_from_zero_and_added_in_fp32(impl):
    """One accumulator of 14 bits over 32,768 keys would lose several percent, see tests/test_sage_numerics.py."""
    q, k, v = inputs(length_q=128, length_k=32768, heads=1, kv_heads=1, batch=1)
    q, v = torch.zeros_like(q), v.abs() + 0.5
    plan = sequences.padded([32768], 128, 32768, device="cuda")
    tensors = [x.transpose(1, 2) for x in (q, k, v)]
    if reasons := unsupported_reasons(impl, *tensors, plan, "int8_fp8"):
        pytest.skip("; ".join(reasons))
    out = block_sparse_attention(*tensors, plan, impl=impl, precision="int8_fp8")
    top = v.float().amax(2, keepdim=True) / 448
    mean = ((v.float() / top).to(torch.float8_e4m3fn).double() * top).mean(2)
    assert ((out[0, 0, 0].double() - mean[0, 0]) / mean[0, 0]).abs().mean() < 3e-3


# -- graphs, streams, compilation, gradients --------------------------------------------------------


def calls():
    q, k, v = inputs()
    mask = torch.rand(1000, 1000, device="cuda") < 0.5
    cu = torch.tensor([0, 300, 1000], dtype=torch.int32, device="cuda")
    packed = [x[0].transpose(0, 1).contiguous() for x in (q, k, v)]
    return {
        "plain": (lambda *x: sage_attention(*x), (q, k, v)),
        "causal": (lambda *x: sage_attention(*x, is_causal=True), (q, k, v)),
        "mask": (lambda *x: sage_attention(*x, attn_mask=mask), (q, k, v)),
        "smooth_q": (lambda *x: sage_attention(*x, precision="int4+smooth_q"), (q, k, v)),
        "smooth_v": (lambda *x: sage_attention(*x, precision="int8_fp8+smooth_v"), (q, k, v)),
        "fp16": (lambda *x: sage_attention(*x, precision="int8_fp16"), (q, k, v)),
        "varlen": (lambda *x: sage_attention_varlen(*x, cu, cu, return_lse=True)[0], packed),
    }


NAMES = ("plain", "causal", "mask", "smooth_q", "smooth_v", "fp16", "varlen")


@pytest.mark.parametrize("name", NAMES)
def test_cuda_graphs(name):
    call, tensors = calls()[name]
    tensors = [x.clone() for x in tensors]
    before = call(*tensors)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(*tensors)
    for x in tensors:
        x.copy_(torch.randn_like(x))
    captured.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, call(*tensors))
    assert not torch.equal(captured, before)


@pytest.mark.parametrize("name", NAMES)
def test_side_streams(name):
    call, tensors = calls()[name]
    want = call(*tensors)
    late = [torch.zeros_like(x) for x in tensors]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # whoever reads on another stream reads zeros
        for x, y in zip(late, tensors, strict=True):
            x.copy_(y)
        got = call(*late)
    stream.synchronize()
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["causal", "mask", "varlen"])
def test_compiled_without_graph_breaks(name):
    call, tensors = calls()[name]
    compiled = torch.compile(lambda *x: call(*x) + 0.0, fullgraph=True)
    assert torch.equal(compiled(*tensors), call(*tensors))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("impl", ["gluon_sm90", "triton"])
def test_tensors_of_another_gpu_than_the_current_one(impl):
    tensors = inputs(length_q=300)
    mask = torch.rand(300, 1000, device="cuda") < 0.5
    for options in ({}, {"is_causal": True}, {"attn_mask": mask}, {"precision": "int4+smooth_q"}):
        want = sage_attention(*tensors, impl=impl, **options)
        there = {
            k: x.to("cuda:1") if isinstance(x, torch.Tensor) else x for k, x in options.items()
        }
        got = sage_attention(*(x.to("cuda:1") for x in tensors), impl=impl, **there)
        assert torch.cuda.current_device() == 0
        assert got.device == torch.device("cuda:1")
        assert torch.equal(got.cpu(), want.cpu())


def test_gradients_are_those_of_exact_attention():
    q, k, v = (x.requires_grad_() for x in inputs(batch=1))
    seen = torch.ones(1000, 1000, dtype=torch.bool, device="cuda").tril()
    out = sage_attention(q, k, v, is_causal=True)
    want = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=seen,
                                          enable_gqa=True)  # fmt: skip
    up = torch.randn_like(out)
    found = torch.autograd.grad(out, (q, k, v), up)
    for a, b in zip(found, torch.autograd.grad(want, (q, k, v), up.float()), strict=True):
        assert error(a, b.float()) < 0.01


def test_offsets_past_two_to_the_31():
    q, k, v = inputs(length_k=40, heads=1, kv_heads=1, batch=1)
    memory = torch.empty(40 << 26, dtype=torch.bfloat16, device="cuda")  # 5 GB
    far = memory.as_strided(k.shape, (0, 0, 1 << 26, 1))
    far.copy_(k)
    assert torch.equal(sage_attention(q, far, v), sage_attention(q, k, v))


def test_infinities_are_an_error_where_it_is_asked_for():
    q, k, v = inputs()
    sage_attention(q, k, v, check=True)
    k[1, 0, 500, 3] = torch.inf
    out = sage_attention(q, k, v)
    assert out[0].isfinite().all()
    assert out[1, 2:].isfinite().all()
    assert out[1, :2].isnan().any()
    with pytest.raises(FloatingPointError, match="NaN or infinities"):
        sage_attention(q, k, v, check=True)


def needs_memory(gib: float) -> None:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    if free < gib * 2**30:
        pytest.skip(f"{free / 2**30:.0f} GiB are free, {gib} are needed")


def test_more_than_two_to_the_31_elements_of_queries():
    """The last of 2^24 queries of 128 channels: as a call of their own."""
    needs_memory(16)
    length = (1 << 24) + 777
    (_, k, v), g = inputs(length_k=300, heads=1, kv_heads=1, batch=1), torch.Generator("cuda")
    q = torch.empty(1, 1, length, 128, dtype=torch.bfloat16, device="cuda")
    q.normal_(generator=g.manual_seed(0))
    assert q.numel() > 2**31
    out = sage_attention(q, k, v)
    for some in (slice(0, 960), slice(length - 960, length)):
        part = q[0, 0, some][None, None]  # a stride of 2^31 would be too much for PyTorch's own
        assert error(out[:, :, some], exact(part, k, v)) < MOST["int8_fp8"]


def test_more_than_two_to_the_31_elements_of_keys():
    """Nearly all weight lies on the last of 2^24 keys: what is read past 2^31 decides."""
    needs_memory(20)
    last = 300
    q, tail_k, tail_v = inputs(length_q=200, length_k=last, heads=1, kv_heads=1, batch=1)
    q, tail_k = 4 * q, 4 * tail_k
    k, v = (
        torch.zeros(1, 1, (1 << 24) + last, 128, dtype=q.dtype, device="cuda") for _ in range(2)
    )
    k[:, :, -last:], v[:, :, -last:] = tail_k, tail_v
    assert k[:, :, :-last].numel() == 2**31
    # The other keys have scores of 0 and values of 0: they count in the sum of weights alone.
    scores = q.double() @ tail_k.double().mT * 128**-0.5
    weights = torch.cat([scores, torch.full_like(scores[..., :1], math.log(1 << 24))], -1).softmax(
        -1
    )
    want = (weights[..., :-1] @ tail_v.double()).float()
    assert error(sage_attention(q, k, v), want) < 0.1


def test_a_precision_without_a_kernel_says_so():
    q, k, v = inputs()
    with pytest.warns(UserWarning, match="exact attention takes its place"):
        out = sage_attention(q, k, v, precision="int8+q_thread")
    assert error(out, exact(q, k, v)) < 0.005
    emulated = sage_attention(q, k, v, precision="int8+q_thread", impl="blocks")
    assert 0.005 < error(emulated, exact(q, k, v)) < MOST["int8"]

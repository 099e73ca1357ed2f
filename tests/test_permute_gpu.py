"""Tokens in their own order beside that of a plan: the kernel that moves them, and attention that is told of it."""

import pytest
import torch

from visionfuse.kernels.attention import block_sparse_attention
from visionfuse.kernels.order.permute import Orders, inverse, moved, take, through
from visionfuse.testing import poisoned_memory, random_plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
    reason="needs a Hopper GPU",
)


def shuffled(length, seed=0, device=DEVICE):
    g = torch.Generator().manual_seed(seed)
    return torch.randperm(length, generator=g).to(device)


def random(*shape, dtype=torch.float32, seed=1, device=DEVICE):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g).to(device, dtype)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "dtype"),
    [(3, 1, 64, torch.float32), (4, 2, 72, torch.float16), (8, 8, 128, torch.bfloat16)],
)
def test_several_tensors_move_in_one_launch(heads, kv_heads, dim, dtype):
    pytest.importorskip("triton")
    from visionfuse.kernels.order import move

    q = random(2, 93, 2 * heads, dim, dtype=dtype)[:, :, ::2]
    k, v = random(2, 2, 70, kv_heads, dim, dtype=dtype).unbind(0)
    q_order, k_order = shuffled(93), shuffled(70, 1)
    for orders in ((q_order, k_order), (None, k_order), (q_order, None)):
        with poisoned_memory():
            found = move.moved([q, k, v], [orders[0], orders[1], orders[1]])
            *again, squares = move.moved_with_squares(q, k, v, *orders)
        for x, order, a, b in zip(
            (q, k, v), (orders[0], *orders[1:] * 2), found, again, strict=True
        ):
            assert torch.equal(a, take(x, order))
            assert torch.equal(b, take(x, order))
        for x, most in zip((q, k), squares, strict=True):
            torch.testing.assert_close(most, x.float().square().sum(-1).amax(1).flatten())


def test_orders_undo_one_another_and_go_through_padding():
    x, order = random(1, 31, 2, 8), shuffled(31)
    assert torch.equal(take(take(x, order), inverse(order)), x)
    assert inverse(order) is inverse(order)
    positions = torch.tensor([4, -1, 30, 0], dtype=torch.int32, device=DEVICE)
    found = through(order, positions)
    assert found is not None
    assert found is through(order, positions)
    assert found.tolist() == [order[4], -1, order[30], order[0]]
    assert through(None, positions) is positions
    assert through(order, None) is order
    assert moved([x], [None])[0] is x


def in_orders(plan, impl, q, k, v, order, **options):
    """Attention of tokens in their order, and of moved tokens, moved back."""
    told = block_sparse_attention(q, k, v, plan, impl=impl, order=order, return_lse=True, **options)
    out, lse = block_sparse_attention(
        *map(take, (q, k, v), order.of_all), plan, impl=impl, return_lse=True, **options
    )
    back = order.back.queries
    return told, (take(out, back), take(lse, back, dim=2))


@pytest.mark.parametrize("which", ["both", "queries", "keys"])
@pytest.mark.parametrize("impl", ["reference", "blocks", "flex"])
@pytest.mark.skipif(DEVICE != "cpu", reason="the implementations of CPUs")
def test_every_implementation_and_its_gradients(impl, which):
    plan = random_plan(2, length_q=23, length_k=31, block_q=8, block_k=8)
    order = Orders(
        shuffled(23) if which != "keys" else None, shuffled(31) if which != "queries" else None
    )
    trains = impl != "flex"  # on a CPU
    leaves = [
        x.requires_grad_(trains)
        for x in (random(2, 23, 4, 16), random(2, 31, 2, 16), random(2, 31, 2, 16))
    ]
    told, expected = in_orders(plan, impl, *leaves, order)
    weight = random(2, 23, 4, 16, seed=5)
    for a, b in zip(told, expected, strict=True):
        torch.testing.assert_close(a, b)
    if not trains:
        return
    for a, b in zip(
        *(torch.autograd.grad((x[0] * weight).sum(), leaves) for x in (told, expected)), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_wrong_orders_are_refused():
    plan = random_plan(2, length_q=23, length_k=31, block_q=8, block_k=8, device=DEVICE)
    q, k = random(1, 23, 2, 16), random(1, 31, 2, 16)
    with pytest.raises(ValueError, match=r"\(23, 31\), got \[\(31,\), None\]"):
        block_sparse_attention(q, k, k, plan, order=Orders(shuffled(31), None))


PLANS = {
    "ragged": lambda: random_plan(1, length_q=700, length_k=901, block_q=192, block_k=128),
    "2-groups": lambda: random_plan(3, length_q=500, length_k=640, block_q=128, block_k=128, kind="bits"),
    "by-head": lambda: random_plan(4, length_q=700, length_k=900, block_q=192, block_k=128, variants=4),
}  # fmt: skip


@hopper
@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("precision", ["model", "fp8", "int8_fp8", "int8"])
def test_the_hopper_kernel_writes_rows_to_their_places(name, precision, monkeypatch):
    """To the bit, as the same products are summed in the same order; with bounds of scores both, which all that moves has."""
    from visionfuse.kernels.attention.gluon_sm90 import score_bound

    monkeypatch.setattr(score_bound, "pays", lambda plan: True)
    plan = PLANS[name]().to("cuda")
    q = random(2, plan.length_q, 4, 128, dtype=torch.bfloat16)
    k, v = random(2, 2, plan.length_k, 2, 128, dtype=torch.bfloat16).unbind(0)
    order = Orders(shuffled(plan.length_q), shuffled(plan.length_k, 1))
    options = {"precision": precision if precision == "model" else precision + "-smooth_k"}
    with poisoned_memory():
        told, expected = in_orders(plan, "gluon_sm90", q, k, v, order, **options)
    for a, b in zip(told, expected, strict=True):
        assert torch.equal(a, b)


@hopper
@pytest.mark.parametrize("precision", ["fp8", "int8_fp8+smooth_q", "fp8_tile", "fp8+smooth_v"])
@pytest.mark.parametrize("which", ["both", "queries", "keys"])
def test_all_that_smooths_and_shares_scales(precision, which):
    """The mean that smoothing takes is over other tokens, where these lie in another order."""
    plan = random_plan(1, length_q=700, length_k=900, block_q=192, block_k=128).to("cuda")
    q, k, v = (
        random(1, n, 2, 64, dtype=torch.bfloat16, seed=n + i) for i, n in enumerate((700, 900, 900))
    )
    order = Orders(
        shuffled(700) if which != "keys" else None, shuffled(900, 1) if which != "queries" else None
    )
    with poisoned_memory():
        told, expected = in_orders(plan, "gluon_sm90", q, k, v, order, precision=precision)
    assert (told[0] - expected[0]).abs().sum() < 0.05 * expected[0].abs().sum()
    seen = expected[1].isfinite()
    assert torch.equal(seen, told[1].isfinite())
    assert (told[1] - expected[1])[seen].abs().max() < 0.1


@hopper
def test_parts_and_bounds_of_scores(monkeypatch):
    from visionfuse.bench.block_lists import all_keys, block_list
    from visionfuse.kernels.attention.gluon_sm90 import score_bound, work

    monkeypatch.setattr(work, "_parts", lambda cost, *_: torch.full_like(cost, 3))
    monkeypatch.setattr(score_bound, "pays", lambda plan: True)
    plan = block_list(700, 1000, 192, all_keys).to("cuda")
    q = random(1, 700, 4, 128, dtype=torch.bfloat16)
    k, v = random(2, 1, 1000, 4, 128, dtype=torch.bfloat16).unbind(0)
    with poisoned_memory():
        told, expected = in_orders(
            plan, "gluon_sm90", q, k, v, Orders(shuffled(700), shuffled(1000))
        )
    for a, b in zip(told, expected, strict=True):
        assert torch.equal(a, b)


@hopper
def test_gradients_on_the_gpu():
    plan = random_plan(1, length_q=300, length_k=400, block_q=64, block_k=64, device="cuda")
    leaves = [
        random(1, n, 2, 64, dtype=torch.bfloat16, seed=i).requires_grad_()
        for i, n in enumerate((300, 400, 400))
    ]
    told, expected = in_orders(plan, "auto", *leaves, Orders(shuffled(300), shuffled(400)))
    weight = random(1, 300, 2, 64, dtype=torch.bfloat16, seed=9)
    for a, b in zip(
        *(torch.autograd.grad((x[0] * weight).sum(), leaves) for x in (told, expected)), strict=True
    ):
        torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)

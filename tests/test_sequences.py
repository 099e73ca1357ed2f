"""Plans of sequences against dense masks, and how fast they are built."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visionfuse.kernels.attention import block_sparse_attention
from visionfuse.kernels.attention.key_slots import key_slots
from visionfuse.kernels.plan import sequences
from visionfuse.testing import dense_attention, plan_mask

blocks = st.sampled_from([(8, 8), (16, 4), (3, 7), (128, 128)])
lengths = st.integers(1, 40)


def causal_mask(length_q, length_k):
    return torch.ones(length_q, length_k, dtype=torch.bool).tril(length_k - length_q)


def packed_mask(lengths_q, lengths_k, causal):
    parts = [
        causal_mask(a, b) if causal else torch.ones(a, b, dtype=torch.bool)
        for a, b in zip(lengths_q, lengths_k, strict=True)
    ]
    return torch.block_diag(*(p.int() for p in parts)).bool()


def cumulated(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def check(plan, masks):
    """masks: bool [variants, S_q, S_k]."""
    assert torch.equal(torch.stack([plan.dense_mask(v) for v in range(plan.variants)]), masks)
    assert plan.visible == int(masks.sum())
    for entries in (plan.full, plan.partial):
        assert not entries.count.numel() or int(entries.count.min()) > 0
        assert all(t.dtype == torch.int32 for t in (entries.offset, entries.start, entries.count))


@given(lengths, lengths, blocks)
@settings(max_examples=60, deadline=None)
def test_causal_is_right_aligned(length_q, length_k, block):
    plan = sequences.causal(length_q, length_k, block_q=block[0], block_k=block[1])
    check(plan, causal_mask(length_q, length_k)[None])


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=6),
       st.booleans(), blocks)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_packed_sequences_see_their_own_keys(pairs, causal, block):
    lengths_q, lengths_k = zip(*pairs, strict=True)
    cu = cumulated(lengths_q), cumulated(lengths_k)
    if not sum(lengths_q) or not sum(lengths_k):
        with pytest.raises(ValueError, match="needs queries and keys"):
            sequences.packed(*cu)
        return
    plan = sequences.packed(*cu, causal=causal, block_q=block[0], block_k=block[1])
    check(plan, packed_mask(lengths_q, lengths_k, causal)[None])


@given(st.lists(st.integers(0, 40), min_size=1, max_size=4), lengths, st.booleans(), blocks)
@settings(max_examples=100, deadline=None)
def test_padded_keys_are_seen_by_none(counts, length_q, causal, block):
    plan = sequences.padded(counts, length_q, 40, causal=causal, block_q=block[0], block_k=block[1])
    key = torch.arange(40)
    masks = torch.stack([(key < n).expand(length_q, 40) for n in counts])
    check(plan, masks & causal_mask(length_q, 40) if causal else masks)
    if not causal:
        assert plan.mask is None, "padding needs no mask"


def test_only_the_diagonal_is_masked():
    plan = sequences.causal(1024, 1024, block_q=128, block_k=128)
    assert plan.partial.start.numel() == 8
    assert plan.full.start.numel() == 8 * 7 // 2
    dense = sequences.padded([1000], 300, 1000)
    assert (dense.mask, dense.density, dense.visited_density) == (None, 1.0, 1.0)


def test_aligned_plans_leave_keys_in_place():
    """Kernels that round keys by blocks need no copy of them in another order."""
    for plan in (sequences.causal(700, 1000), sequences.padded([3, 700, 129], 50, 1000)):
        assert key_slots(plan, 128).order is None
    assert key_slots(sequences.packed([0, 5, 9], [0, 300, 400]), 128).order is not None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sequences.packed([0, 4], [0, 2, 4]), "same sequences, got 1 and 2"),
        (lambda: sequences.packed([1, 4], [0, 4]), "cu_seqlens_q must be"),
        (lambda: sequences.packed([0, 4], [0, 4, 2]), "cu_seqlens_k must be"),
        (lambda: sequences.padded([5], 3, 4), r"0 \.\. 4"),
        (lambda: sequences.padded([], 3, 4), r"0 \.\. 4"),
        (lambda: sequences.causal(0, 4), "needs queries and keys"),
    ],
)
def test_wrong_numbers_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_attention_over_packed_and_padded_sequences():
    g = torch.Generator().manual_seed(0)
    for plan in (
        sequences.packed([0, 7, 7, 50], [0, 20, 23, 60], causal=True, block_q=16, block_k=16),
        sequences.padded([60, 33, 0], 50, 60, block_q=16, block_k=16),
    ):
        batch = plan.variants
        q = torch.randn(batch, 50, 4, 16, generator=g)
        k, v = torch.randn(2, batch, 60, 2, 16, generator=g)
        mask = plan_mask(plan, batch, 4)
        want, want_lse = dense_attention(
            q.double(), k.double(), v.double(), mask, 0.25, accumulate=torch.float64
        )
        out, lse = block_sparse_attention(q, k, v, plan, scale=0.25, return_lse=True)
        torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=0)
        torch.testing.assert_close(lse.double(), want_lse, atol=1e-5, rtol=0)


def test_many_tokens_take_no_table_of_pairs():
    """A million packed tokens in a thousand sequences, and their plan in less than the time of a step."""
    cu = torch.arange(1001) * 1000
    start = time.perf_counter()
    plan = sequences.packed(cu, cu, causal=True)
    assert time.perf_counter() - start < 5
    assert plan.tiles == 8000
    assert plan.visible == 1000 * 1000 * 1001 // 2

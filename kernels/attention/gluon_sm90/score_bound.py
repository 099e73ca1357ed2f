"""A bound of all scores of a head, |q| |k| <= max |q| max |k| (Cauchy-Schwarz), for a softmax without a maximum.

softmax is the same whatever is subtracted from the scores, the running maximum only keeps exponentials in
range. A bound does that as well where it is not far above the scores: then no maximum has to be found and
nothing rescaled. With bf16 weights, which have the exponents of fp32, a bound of 50 bits is safe, and
models that normalise queries and keys stay under 30. Where it is larger the kernel takes the maximum.

Measured on an H200: 0.26 ms of 5.27 ms at 16,896 tokens, for one reading of q and k, 0.05 ms; at 4,608 still
0.404 ms instead of 0.415.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ...plan.block_plan import BlockPlan

# Keys that an average query must visit before the reading pays.
LEAST_KEYS = 4096
ROWS, CHUNKS = 64, 4  # tokens at once, and times of that in a program

_pays: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def pays(plan: BlockPlan) -> bool:
    """Whether the plan has enough work. The first call for a plan waits for the device, once."""
    if plan.full.offset not in _pays:
        entries = plan.full.start.numel() + plan.partial.start.numel()
        keys = entries * plan.block_k / (plan.tiles * plan.variants)
        _pays[plan.full.offset] = keys >= LEAST_KEYS
    return _pays[plan.full.offset]


def largest_squares(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """max over tokens of |q|^2 and |k|^2: fp32 [B, H] and [B, Hk] for q [B, Sq, H, D] and k [B, Sk, Hk, D].

    NaN where an input is.
    """
    batch, heads, kv_heads = q.shape[0], q.shape[2], k.shape[2]
    both = torch.zeros(batch * (heads + kv_heads), dtype=torch.float32, device=q.device)
    longest = max(q.shape[1], k.shape[1])
    grid = (triton.cdiv(longest, CHUNKS * ROWS), heads + kv_heads, batch)
    _largest_squares[grid](
        q, k, both, *q.stride(), *k.stride(), q.shape[1], k.shape[1], heads, kv_heads,
        D=q.shape[3], BD=triton.next_power_of_2(q.shape[3]), ROWS=ROWS, CHUNKS=CHUNKS, num_warps=4,
    )  # fmt: skip
    return both[: batch * heads], both[batch * heads :]


@triton.jit
def _largest_squares(p_q, p_k, p_out, q_b, q_s, q_h, q_d, k_b, k_s, k_h, k_d, length_q, length_k,
                     heads, kv_heads, D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr,
                     CHUNKS: tl.constexpr):  # fmt: skip
    head, batch = tl.program_id(1), tl.program_id(2)
    if head < heads:
        _largest_square(
            p_q + batch.to(tl.int64) * q_b + head.to(tl.int64) * q_h, q_s, q_d, length_q,
            p_out + batch * heads + head, D, BD, ROWS, CHUNKS,
        )  # fmt: skip
    else:
        head -= heads
        p_out += tl.num_programs(2) * heads
        _largest_square(
            p_k + batch.to(tl.int64) * k_b + head.to(tl.int64) * k_h, k_s, k_d, length_k,
            p_out + batch * kv_heads + head, D, BD, ROWS, CHUNKS,
        )  # fmt: skip


@triton.jit
def _largest_square(p_x, x_s, x_d, length, p_out, D: tl.constexpr, BD: tl.constexpr,
                    ROWS: tl.constexpr, CHUNKS: tl.constexpr):  # fmt: skip
    channel = tl.arange(0, BD)
    most = tl.zeros([ROWS], tl.float32)
    for i in tl.static_range(CHUNKS):
        token = (tl.program_id(0) * CHUNKS + i) * ROWS + tl.arange(0, ROWS)
        x = tl.load(
            p_x + token.to(tl.int64)[:, None] * x_s + channel[None, :] * x_d,
            mask=(token < length)[:, None] & (channel < D)[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        most = tl.maximum(most, tl.sum(x * x, axis=1), propagate_nan=tl.PropagateNan.ALL)
    # The order of non-negative floats is that of their bits, and NaN is above all: the same in any order.
    bits = tl.max(most.to(tl.int32, bitcast=True), axis=0)
    tl.atomic_max(p_out.to(tl.pointer_type(tl.int32)), bits)

"""Smoothing of queries by kernels: they lose the mean of their tile of the plan, and scores get its products with
the keys as a row of numbers a tile (SageAttention2, Zhang et al., arXiv 2411.10958, section 3.2, eq. 6).

`quantize.tile_means`, `without_tile_means` and `mean_rows` are the definition. Here a program takes one tile of one
head and reads it twice, the second time from a cache; the mean is rounded to the format of the queries before it
is taken away, so that rows are of what was taken. Rows are written once, for keys where their kernel reads them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..plan.block_plan import BlockPlan
from .prologue.kernel import INTERPRETED, _load_rows

ROWS = 32  # queries in registers
# Numbers whose products can be summed in fp32.
_MOST: tl.constexpr = tl.constexpr(2.0**50)


@triton.jit
def _means_kernel(
    p_q, p_out, p_mean, p_start, p_count, q_b, q_s, q_h, length, heads, TOP: tl.constexpr,
    D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    h, tile, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    start, count = tl.load(p_start + tile), tl.load(p_count + tile)
    o_m, o_d = tl.arange(0, BM), tl.arange(0, BD)
    token = (start + o_m).to(tl.int64)
    p_q += b * q_b + h * q_h + token[:, None] * q_s + o_d[None, :]
    p_out += ((b * length + token) * heads + h)[:, None] * D + o_d[None, :]
    part = 1.0 / tl.maximum(count, 1)  # before the sum: no sum passes the largest number
    total = tl.zeros((BM, BD), tl.float32)
    for index in range(0, count, BM):
        first = tl.zeros((), tl.int64) + index  # the interpreter counts in Python integers
        total += _load_rows(p_q + first * q_s, first + o_m < count, D, BD) * part
    mean = tl.sum(total, 0).to(p_mean.dtype.element_ty)
    p_mean += ((b * tl.num_programs(1) + tile) * heads + h) * D
    tl.store(p_mean + o_d, mean, mask=o_d < D)
    mean = mean.to(tl.float32)
    for index in range(0, count, BM):
        first = tl.zeros((), tl.int64) + index
        inside = first + o_m < count
        b_x = _load_rows(p_q + first * q_s, inside, D, BD) - mean[None, :]
        b_x = tl.clamp(
            b_x, -TOP, TOP, propagate_nan=tl.PropagateNan.ALL
        )  # finite numbers stay finite
        stored = inside[:, None] & (o_d < D)[None, :]
        tl.store(p_out + first * heads * D, b_x.to(p_out.dtype.element_ty), mask=stored)


@triton.jit
def _rows_kernel(
    p_mean, p_k, p_k_mean, p_order, p_out, k_b, k_s, k_h, length_k, length, stride, tiles, heads, group,
    scale, D: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Tiles o_t and positions o_n of a head: scale * mean (k - k_mean)."""
    bh = tl.program_id(2).to(tl.int64)
    b, h = bh // heads, bh % heads
    o_t = tl.program_id(1) * BT + tl.arange(0, BT)
    o_n, o_d = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BD)
    key = o_n.to(tl.int64)
    there = o_n < length
    if p_order is not None:
        key = tl.load(p_order + o_n, mask=there, other=-1).to(tl.int64)
        there = (key >= 0) & (key < length_k)
    p_mean += ((b * tiles + o_t)[:, None] * heads + h) * D + o_d[None, :]
    b_mean = _load_rows(p_mean, o_t < tiles, D, BD)
    hk = h // group
    b_k = _load_rows(p_k + b * k_b + hk * k_h + key[:, None] * k_s + o_d[None, :], there, D, BD)
    if p_k_mean is not None:
        p_k_mean += (b * (heads // group) + hk) * D
        b_k -= tl.load(p_k_mean + o_d, mask=o_d < D, other=0.0)[None, :]
    b_mean = tl.clamp(b_mean, -_MOST, _MOST, propagate_nan=tl.PropagateNan.ALL)
    b_k = tl.clamp(b_k, -_MOST, _MOST, propagate_nan=tl.PropagateNan.ALL)
    b_row = tl.dot(b_mean, tl.trans(b_k), input_precision=PRECISION) * scale
    p_out += (bh * tiles + o_t)[:, None] * stride + o_n[None, :]
    tl.store(p_out, b_row, mask=(o_t < tiles)[:, None] & (o_n < length)[None, :])


# Whether every query is in a tile, by the tensor that identifies a plan.
_covers: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def without_means(q: Tensor, plan: BlockPlan) -> tuple[Tensor, Tensor]:
    """q (B, S_q, H, D) -> q less the mean of each query's tile, and the means (B, tiles, H, D), in q's dtype.

    Queries in no tile stay as they are. The first call for a plan waits for the device, once.
    """
    batch, length, heads, dim = q.shape
    q = q if q.stride(-1) == 1 else q.contiguous()
    if plan.q_start not in _covers:
        _covers[plan.q_start] = int(plan.q_count.sum()) >= length
    out = q.new_empty(q.shape) if _covers[plan.q_start] else q.clone(memory_format=torch.contiguous_format)  # fmt: skip
    means = q.new_empty(batch, plan.tiles, heads, dim)
    options: dict[str, Any] = {} if INTERPRETED else {"num_warps": 4}
    options |= {"TOP": torch.finfo(q.dtype).max, "D": dim, "BM": ROWS, "BD": triton.next_power_of_2(dim)}  # fmt: skip
    with torch.cuda.device_of(q):
        _means_kernel[(heads, plan.tiles, batch)](
            q, out, means, plan.q_start, plan.q_count, q.stride(0), q.stride(1), q.stride(2), length, heads,
            **options,
        )  # fmt: skip
    return out, means


def rows(
    means: Tensor, k: Tensor, k_mean: Tensor | None, scale: float, order: Tensor | None
) -> Tensor:
    """scale * means (k - k_mean), fp32 (B, H, tiles, S'), of keys at their positions.

    means (B, tiles, H, D), k (B, S_k, H_kv, D), k_mean fp32 (B, H_kv, D) or None. order: int [S'], the key at a
    position, -1 for padding, which gets any number; None: S' is S_k. A row begins at a multiple of 16 bytes.
    """
    batch, tiles, heads, dim = means.shape
    k = k if k.stride(-1) == 1 else k.contiguous()
    length = k.shape[1] if order is None else order.numel()
    stride = -(-length // 4) * 4
    out = torch.empty(batch, heads, tiles, stride, dtype=torch.float32, device=k.device)
    BD = max(16, triton.next_power_of_2(dim))
    # Larger ones spill where operands of tensor cores are in registers.
    large = k.is_cuda and torch.cuda.get_device_capability(k.device)[0] >= 9 and BD <= 128
    sizes = {"BT": 64, "BN": 128} if large else {"BT": 32, "BN": 64}
    options: dict[str, Any] = {"PRECISION": "ieee"}
    if (
        not INTERPRETED
    ):  # a mean in bf16 is exact in the first of the three, a key within 2^-16 in two
        options = {"PRECISION": "ieee" if torch.version.hip else "bf16x3", "num_warps": 8}
    options |= sizes | {"BD": BD, "D": dim}
    grid = (-(-length // sizes["BN"]), -(-tiles // sizes["BT"]), batch * heads)
    with torch.cuda.device_of(k):
        _rows_kernel[grid](
            means, k, k_mean, order, out, k.stride(0), k.stride(1), k.stride(2), k.shape[1], length, stride,
            tiles, heads, heads // k.shape[2], scale, **options,
        )  # fmt: skip
    return out[..., :length]

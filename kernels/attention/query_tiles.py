"""Queries that share a scale by tile of the plan: a kernel of their own, since tiles begin anywhere.

The prologue counts tokens that share a scale from the start of the sequence. Here a program takes one tile of one
head and reads it twice, the second time from a cache: once for the largest magnitude, once for the codes.
(FPSAttention, arXiv 2506.04648: one scale for the queries of a 3-D tile.)
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..plan.block_plan import BlockPlan
from .prologue import FORMATS
from .prologue.kernel import INTERPRETED, _codes, _load_rows, _maximum, _packed, _split

ROWS = 32  # queries in registers


@triton.jit
def _tiles_kernel(
    p_q, p_codes, p_scale, p_start, p_count, q_b, q_s, q_h, length, heads,
    LIMIT: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    h, tile, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, count = tl.load(p_start + tile), tl.load(p_count + tile)
    PER: tl.constexpr = 2 if p_codes.dtype.element_ty == tl.uint8 else 1  # codes a byte
    o_m, o_d, o_c = tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BD // PER)
    token = (start + o_m).to(tl.int64)
    p_q += b.to(tl.int64) * q_b + h * q_h + token[:, None] * q_s + o_d[None, :]
    row = (b.to(tl.int64) * length + token) * heads + h
    p_codes += row[:, None] * (D // PER) + o_c[None, :]
    p_scale += (b.to(tl.int64) * heads + h) * length + token

    bits = tl.zeros((BM,), tl.int32)
    for index in range(0, count, BM):
        first = tl.zeros((), tl.int64) + index  # the interpreter counts in Python integers
        b_x = _load_rows(p_q + first * q_s, first + o_m < count, D, BD)
        bits = tl.maximum(bits, tl.max(tl.abs(b_x).to(tl.int32, bitcast=True), 1))
    top = _maximum(tl.max(bits, 0))
    for index in range(0, count, BM):
        first = tl.zeros((), tl.int64) + index
        inside = first + o_m < count
        b_x = _load_rows(p_q + first * q_s, inside, D, BD)
        b_x *= LIMIT / top
        stored = inside[:, None] & (o_c < D // PER)[None, :]
        if PER == 2:
            b_a, b_b = _split(b_x, BM, BD)
            codes = _packed(b_a, b_b)
        else:
            codes = _codes(b_x, p_codes.dtype.element_ty)
        tl.store(p_codes + first * heads * (D // PER), codes, mask=stored)
        tl.store(p_scale + first, tl.zeros((BM,), tl.float32) + top / LIMIT, mask=inside)


def round_tiles(q: Tensor, plan: BlockPlan, format: str) -> tuple[Tensor, Tensor]:
    """q (B, S_q, H, D) -> codes (B, S_q, H, D) in a format of the prologue ("int4x2": D / 2 bytes) and, for every
    query, the scale of its tile (B, H, S_q), fp32.

    Queries in no tile, which no kernel reads, get neither. Equal to `quantize.quantized_tiles` but for the
    rounding of a scale.
    """
    batch, length, heads, dim = q.shape
    q = q if q.stride(-1) == 1 else q.contiguous()
    dtype, limit = FORMATS[format]
    width = dim // 2 if dtype == torch.uint8 else dim
    codes = torch.empty(batch, length, heads, width, dtype=dtype, device=q.device)
    scale = torch.empty(batch, heads, length, dtype=torch.float32, device=q.device)
    options: dict[str, Any] = {} if INTERPRETED else {"num_warps": 4}
    options |= {"LIMIT": limit, "D": dim, "BM": ROWS, "BD": triton.next_power_of_2(dim)}
    with torch.cuda.device_of(q):
        _tiles_kernel[(heads, plan.tiles, batch)](
            q, codes, scale, plan.q_start, plan.q_count, q.stride(0), q.stride(1), q.stride(2),
            length, heads, **options,
        )  # fmt: skip
    return codes, scale

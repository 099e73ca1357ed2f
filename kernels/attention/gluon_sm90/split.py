"""Tiles that the Hopper kernel computed in parts, of some of their keys each, put together.

A launch of 576 equal tiles on 132 multiprocessors takes five rounds, the last of them with 48 tiles. In parts
these fill it, and a tile of text that sees everything does not hold a sparse launch up (FlashDecoding's split
of keys). Every part is normalised and comes with its log-sum-exp,
base 2; parts are added in their order, hence always to the same bits.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...plan.block_plan import BlockPlan
from .work import Work

ROWS = 32  # queries at once
_LN2 = tl.constexpr(math.log(2.0))


def buffers(work: Work, rows: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Empty results of all parts: out fp32 [slots, rows, D] and log-sum-exp fp32 [slots, rows]."""
    new = {"dtype": torch.float32, "device": work.item.device}
    return torch.empty(work.slots, rows, head_dim, **new), torch.empty(work.slots, rows, **new)


def combine(
    work: Work, plan: BlockPlan, parts: tuple[Tensor, Tensor], out: Tensor, lse: Tensor | None,
    order: Tensor | None = None,
) -> None:  # fmt: skip
    """Write the tiles of work.split to out [B, Sq, H, D] and lse [B, H, Sq]; order: the row of every query."""
    assert work.split is not None
    part_o, part_lse = parts
    rows, head_dim = part_o.shape[1:]
    grid = (work.split.shape[0], triton.cdiv(rows, ROWS))
    _combine[grid](
        part_o, part_lse, work.split, plan.q_start, plan.q_count, out, out if lse is None else lse,
        order, out.shape[1], out.shape[2], plan.tiles, plan.variants, rows,
        LSE=lse is not None, D=head_dim, BD=triton.next_power_of_2(head_dim),
        ROWS=ROWS, num_warps=4,
    )  # fmt: skip


@triton.jit
def _combine(p_part_o, p_part_lse, p_split, p_q_start, p_q_count, p_o, p_lse, p_order, length, heads,
             tiles, variants, rows, LSE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
             ROWS: tl.constexpr):  # fmt: skip
    p_split += tl.program_id(0) * 3
    item = tl.load(p_split)
    first = tl.load(p_split + 1).to(tl.int64) * rows
    parts = tl.load(p_split + 2)
    tile = item % tiles
    bh = item // (tiles * variants)
    start = tl.load(p_q_start + tile)
    count = tl.load(p_q_count + tile)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BD)
    inside = row < count
    top = tl.full([ROWS], float("-inf"), tl.float32)
    for i in range(parts):
        top = tl.maximum(
            top, tl.load(p_part_lse + first + i * rows + row, mask=inside, other=float("-inf"))
        )
    top = tl.where(top == float("-inf"), 0.0, top)  # rows without keys
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BD], tl.float32)
    for i in range(parts):
        o_row = first + i * rows + row
        weight = tl.exp2(tl.load(p_part_lse + o_row, mask=inside, other=float("-inf")) - top)
        part = tl.load(
            p_part_o + o_row[:, None] * D + channel[None, :],
            mask=inside[:, None] & (channel < D)[None, :], other=0.0,
        )  # fmt: skip
        total += weight
        acc += weight[:, None] * part
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    token = (start + row).to(tl.int64)
    if p_order is not None:
        token = tl.load(p_order + token, mask=inside, other=0).to(tl.int64)
    o_lse = bh.to(tl.int64) * length + token
    token += (bh // heads).to(tl.int64) * length
    tl.store(
        p_o + (token * heads + bh % heads)[:, None] * D + channel[None, :],
        acc.to(p_o.dtype.element_ty),
        mask=inside[:, None] & (channel < D)[None, :],
    )
    if LSE:
        value = tl.where(total == 0.0, float("-inf"), (top + tl.log2(total)) * _LN2)
        tl.store(p_lse + o_lse, value, mask=inside)

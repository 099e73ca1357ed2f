"""The gradient of a relative bias' table in Triton: ds of every visited pair, summed by table entry.

What a table entry gets comes from pairs all over the plan. Adding in memory would depend on the order of
programs, so it is done in two steps. `scores_kernel` writes ds, summed over the batch (which the bias does not
know), one block for every entry of the plan's lists; `sum_kernel` sums what belongs to a table entry through an
index that is sorted once per plan and bias.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ...plan.block_plan import BlockPlan
from ..bias import RelativeBias
from ..prepared import prepare
from .kernel import LN2, in_run, load_rows, positions
from .operands import INTERPRET, bias_policies, block_sizes, mask_policies, variant_strides

# Bytes of ds at once; more heads than that are done one after another.
CELL_BYTES = 256 << 20
AT_ONCE = 1024


class _Cells(NamedTuple):
    """Places in the blocks of ds that belong to column i of the table: order[offset[i] : offset[i + 1]]."""

    order: Tensor
    offset: Tensor


_cells: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def table_gradient(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, shift: Tensor, delta: Tensor,
    plan: BlockPlan, scale: float, bias: RelativeBias,
) -> Tensor:  # fmt: skip
    """(H or 1, n) in the table's dtype; shift and delta as `backward_kernel.prepare_kernel` makes them."""
    heads, columns = q.shape[2], bias.table.shape[1]
    cells = _sorted_cells(plan, bias)
    entries = plan.full.start.numel() + plan.partial.start.numel()
    size = entries * plan.block_q * plan.block_k
    total = torch.zeros(heads, columns, dtype=torch.float32, device=q.device)
    most = max(1, CELL_BYTES // (4 * max(size, 1)))
    for first in range(0, heads if entries else 0, most):
        some = min(most, heads - first)
        d_scores = torch.empty(some, size, dtype=torch.float32, device=q.device)
        for grid, arguments, options in launches(
            grad, q, k, v, shift, delta, plan, scale, bias, d_scores, first
        ):
            scores_kernel[grid](*arguments, **options)
        sum_kernel[(some * columns,)](
            d_scores, cells.order, cells.offset, total[first:], size, columns, AT_ONCE=AT_ONCE
        )
    if bias.table.shape[0] == 1:
        total = total.sum(0, keepdim=True)
    return total.to(bias.table.dtype)


def launches(
    grad,
    q,
    k,
    v,
    shift,
    delta,
    plan: BlockPlan,
    scale: float,
    bias: RelativeBias,
    d_scores,
    first_head,
) -> list[tuple]:
    """(grid, positional arguments, keyword arguments) of `scores_kernel` for full and for partial entries."""
    batch, length, heads, head_dim = q.shape
    block = block_sizes(plan, head_dim)
    ready = prepare(plan, width=block["BN"])
    rows, visible = mask_policies(ready)
    own, added, operands = bias_policies(bias)
    tuning = _tuning(q.dtype, **block)
    parts = block["BM"] // tuning["BM"], block["BN"] // tuning["BN"]
    made, before = [], 0
    for entries, policies in ((plan.full, (positions, in_run)), (plan.partial, (rows, visible))):
        count = entries.start.numel()
        if count:
            arguments = (
                q, k, v, grad, shift, delta, d_scores[:, before * plan.block_q * plan.block_k :],
                *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad.stride()[:3],
                entries.rows.int(), entries.start, entries.count, plan.q_start, plan.q_count,
                plan.variant, *variant_strides(plan), ready.mask, operands, d_scores.stride(0),
                batch, length, heads, heads // k.shape[2], plan.tiles, first_head, plan.block_q,
                plan.block_k, scale / math.log(2.0),
            )  # fmt: skip
            options = {"D": head_dim, "BD": block["BD"], "ROWS": policies[0], "VISIBLE": policies[1],
                       "OWN": own, "BIAS": added, "WORDS": ready.words, "ROW_PARTS": parts[0],
                       "PARTS": parts[1]}  # fmt: skip
            grid = (count * parts[0] * parts[1], d_scores.shape[0])
            made.append((grid, arguments, options | tuning))
        before += count
    return made


def _tuning(dtype: torch.dtype, BM: int, BN: int, BD: int) -> dict:
    """Blocks that fit every GPU: this is a small part of a backward."""
    side = 32 if INTERPRET or BD > 128 or dtype == torch.float32 else 64
    return {"BM": min(BM, side), "BN": min(BN, side), "num_warps": 4, "num_stages": 1}


def _sorted_cells(plan: BlockPlan, bias: RelativeBias) -> _Cells:
    """Kept while the bias' index lives. The first call waits for the device, once."""
    source = (plan.full.start, plan.partial.start, bias.q_index, bias.table.shape[1])
    known = _cells.get(bias.k_index)
    if known is None or any(a is not b for a, b in zip(known[0][:3], source[:3], strict=True)):
        known = None
    if known is None or known[0][3] != source[3]:
        _cells[bias.k_index] = known = source, _sort_cells(plan, bias)
    return known[1]


def _sort_cells(plan: BlockPlan, bias: RelativeBias) -> _Cells:
    device, columns = plan.device, bias.table.shape[1]
    m, n = (torch.arange(side, device=device) for side in (plan.block_q, plan.block_k))
    found, before = [], 0
    for entries in (plan.full, plan.partial):
        tile = entries.rows % plan.tiles
        query = plan.q_start[tile].long()[:, None] + m  # [E, BM]
        key = entries.start.long()[:, None] + n  # [E, BN]
        q_index = bias.q_index[query.clamp(max=plan.length_q - 1)]
        k_index = bias.k_index[key.clamp(max=plan.length_k - 1)]
        index = k_index[:, None] - q_index[:, :, None]  # [E, BM, BN]
        inside = (index >= 0) & (index < columns)
        inside &= (m < plan.q_count[tile, None])[:, :, None]
        inside &= (n < entries.count[:, None])[:, None]
        place = inside.flatten().nonzero()[:, 0]
        found.append((index.flatten()[place], place + before))
        before += index.numel()
    index, place = (torch.cat(x) for x in zip(*found, strict=True))
    offset = torch.zeros(columns + 1, dtype=torch.int64, device=device)
    offset[1:] = torch.bincount(index, minlength=columns).cumsum(0)
    return _Cells(place[index.argsort(stable=True)], offset)


@triton.jit(do_not_specialize=["length_q", "heads", "group", "tiles", "first_head", "batch"])
def scores_kernel(
    p_q, p_k, p_v, p_do, p_shift, p_delta, p_ds,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh, stride_gb, stride_gs, stride_gh,
    p_row, p_start, p_count, p_q_start, p_q_count, p_variant, stride_variant_b, stride_variant_h,
    mask, bias, stride_ds, batch, length_q, heads, group, tiles, first_head, block_q, block_k,
    scale_log2,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr,
    VISIBLE: tl.constexpr, OWN: tl.constexpr, BIAS: tl.constexpr, WORDS: tl.constexpr,
    ROW_PARTS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """ds of one entry and head, summed over the batch: [BM, BN] of the entry's block."""
    pid = tl.program_id(0)
    e, part = pid // (ROW_PARTS * PARTS), pid % (ROW_PARTS * PARTS)
    first_row, column = part // PARTS * BM, part % PARTS * BN
    h = (first_head + tl.program_id(1)).to(tl.int64)
    hk = h // group
    row = tl.load(p_row + e)
    tile = row % tiles
    q_start = tl.load(p_q_start + tile).to(tl.int64) + first_row
    q_count = tl.load(p_q_count + tile) - first_row
    start = tl.load(p_start + e) + column
    count = tl.load(p_count + e) - column
    o_m, o_n = tl.arange(0, BM), tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    if (q_count > 0) & (count > 0):
        o_row = tl.minimum(o_m, q_count - 1)
        rows = q_start + o_row
        seen = VISIBLE(
            mask, ROWS(mask, rows, first_row + o_m), e, column, start, count, WORDS, BM, BN
        )
        b_bias = BIAS(bias, OWN(bias, h, h, tile, rows), start, count, BN) / LN2
        for i in range(batch):
            b = tl.zeros((), tl.int64) + i
            chosen = row // tiles == 0
            if p_variant is not None:
                variant = tl.load(p_variant + b * stride_variant_b + h * stride_variant_h)
                chosen = row // tiles == variant
            if chosen:
                p_q_rows = p_q + b * stride_qb + h * stride_qh + q_start * stride_qs
                p_do_rows = p_do + b * stride_gb + h * stride_gh + q_start * stride_gs
                p_k_rows = p_k + b * stride_kb + hk * stride_kh + start.to(tl.int64) * stride_ks
                p_v_rows = p_v + b * stride_vb + hk * stride_vh + start.to(tl.int64) * stride_vs
                b_q = load_rows(p_q_rows, o_row, stride_qs, None, D, BD)
                b_k = load_rows(p_k_rows, o_n, stride_ks, count, D, BD)
                at = (b * heads + h) * length_q + rows
                b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale_log2 + b_bias
                b_p = tl.exp2(b_s - tl.load(p_shift + at)[:, None])
                b_do = load_rows(p_do_rows, o_row, stride_gs, None, D, BD)
                b_v = load_rows(p_v_rows, o_n, stride_vs, count, D, BD)
                b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
                acc += tl.where(seen, b_p * (b_dp - tl.load(p_delta + at)[:, None]), 0.0)
    p_ds += tl.program_id(1).to(tl.int64) * stride_ds + e.to(tl.int64) * block_q * block_k
    o_ds = (first_row + o_m)[:, None] * block_k + column + o_n[None, :]
    tl.store(p_ds + o_ds, acc, mask=(o_m < q_count)[:, None] & (o_n < count)[None, :])


@triton.jit(do_not_specialize=["columns"])
def sum_kernel(p_ds, p_order, p_offset, p_total, stride_ds, columns, AT_ONCE: tl.constexpr):
    """total[h, i] = the sum of the cells of column i, in a fixed order."""
    pid = tl.program_id(0)
    h, i = pid // columns, pid % columns
    p_ds += h.to(tl.int64) * stride_ds
    o = tl.arange(0, AT_ONCE)
    last = tl.load(p_offset + i + 1)
    acc = tl.zeros((AT_ONCE,), tl.float32)
    for at in range(tl.load(p_offset + i), last, AT_ONCE):
        inside = at + o < last
        place = tl.load(p_order + at + o, mask=inside, other=0)
        acc += tl.load(p_ds + place, mask=inside, other=0.0)
    tl.store(p_total + pid, tl.sum(acc, 0))

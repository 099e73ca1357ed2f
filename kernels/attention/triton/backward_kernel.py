"""The device code of `backward_host`: gradients of queries by tile, of keys and values by block of keys.

With p = exp2(s - lse) recomputed, dp = do v^T and delta = rowsum(do * o) - dlse:  ds = p (dp - delta),
dq = scale * ds k,  dk = scale * ds^T q,  dv = p^T do  (FlashAttention-2, Dao, arXiv 2307.08691, algorithm 2).
Queries and keys have a kernel each that sums in its registers: the two recompute p and dp, seven products
instead of five, and nothing is added in memory by several programs, so results do not depend on their order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kernel import LN2, in_run, load_rows, positions, settled


@triton.jit(do_not_specialize=["length", "heads"])
def prepare_kernel(
    p_o, p_do, p_lse, p_dlse, p_shift, p_delta,
    stride_ob, stride_os, stride_oh, stride_gb, stride_gs, stride_gh,
    length, heads, D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """lse in units of log2, +inf where it is -inf so that exp2(s - lse) is 0 there, and delta: fp32 [B, H, Sq]."""
    blocks = tl.cdiv(length, BM)
    pid = tl.program_id(0)
    first, bh = pid % blocks * BM, pid // blocks
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    o_m = tl.arange(0, BM)
    count = length - first
    start = first.to(tl.int64)
    p_o += b * stride_ob + h * stride_oh + start * stride_os
    p_do += b * stride_gb + h * stride_gh + start * stride_gs
    b_o = load_rows(p_o, o_m, stride_os, count, D, BD).to(tl.float32)
    b_do = load_rows(p_do, o_m, stride_gs, count, D, BD).to(tl.float32)
    delta = tl.sum(b_o * b_do, 1)
    at = bh.to(tl.int64) * length + first + o_m
    stored = o_m < count
    if p_dlse is not None:
        delta -= tl.load(p_dlse + at, mask=stored, other=0.0)
    lse = tl.load(p_lse + at, mask=stored, other=0.0)
    shift = tl.where(lse == float("-inf"), float("inf"), lse / LN2)
    tl.store(p_shift + at, shift, mask=stored)
    tl.store(p_delta + at, delta, mask=stored)


@triton.jit
def _place(pid, heavy, slots):
    """Programs: the heavy slots of all heads, then the light ones head by head -> (slot, head)."""
    n_heavy = heavy * (tl.num_programs(0) // slots)
    if pid < n_heavy:
        slot, bh = pid % heavy, pid // heavy
    else:
        slot, bh = heavy + (pid - n_heavy) % (slots - heavy), (pid - n_heavy) // (slots - heavy)
    return slot, bh


# Gradients of queries ------------------------------------------------------------------------------


@triton.jit
def _walk(
    acc, b_q, b_do, shift, delta, p_k, p_v, stride_ks, stride_vs, p_start, p_count, first, last,
    mask, rows, bias, own, scale_log2, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr, VISIBLE: tl.constexpr, BIAS: tl.constexpr, WORDS: tl.constexpr,
    PARTS: tl.constexpr, PRECISION: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """ds k over the entries first .. last of one list, as `kernel` walks them."""
    o_n = tl.arange(0, BN)
    for at in range(first * PARTS, last * PARTS):
        e, column = at // PARTS, at % PARTS * BN
        start = tl.load(p_start + e) + column
        count = None
        if VISIBLE is not None:
            count = tl.load(p_count + e) - column
        b_k = load_rows(p_k + start.to(tl.int64) * stride_ks, o_n, stride_ks, count, D, BD)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale_log2  # [BM, BN]
        if BIAS is not None:
            b_s += BIAS(bias, own, start, count, BN) / LN2
        b_p = tl.exp2(b_s - shift[:, None])
        b_v = load_rows(p_v + start.to(tl.int64) * stride_vs, o_n, stride_vs, count, D, BD)
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        b_ds = b_p * (b_dp - delta[:, None])
        if VISIBLE is not None:
            seen = VISIBLE(mask, rows, e, column, start, count, WORDS, BM, BN)
            b_ds = tl.where(seen, b_ds, 0.0)
        acc = settled(tl.dot(b_ds.to(b_k.dtype), b_k, acc, input_precision=PRECISION), WAIT)
    return acc


@triton.jit(do_not_specialize=["length_q", "heads", "group", "tiles", "heavy"])
def queries_kernel(
    p_q, p_k, p_v, p_do, p_shift, p_delta, p_dq,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh, stride_gb, stride_gs, stride_gh,
    p_q_start, p_q_count, p_order, p_variant, stride_variant_b, stride_variant_h,
    p_full, p_whole_end, p_full_start, p_full_count,
    p_partial, p_partial_start, p_partial_count, mask, bias,
    length_q, heads, group, tiles, heavy, scale_log2, scale,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, TILE_PARTS: tl.constexpr,
    ROWS: tl.constexpr, VISIBLE: tl.constexpr, OWN: tl.constexpr, BIAS: tl.constexpr,
    WORDS: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    slot, bh = _place(tl.program_id(0), heavy * TILE_PARTS, tiles * TILE_PARTS)
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    hk = h // group
    row = 0
    if p_variant is not None:
        row = tl.load(p_variant + b * stride_variant_b + h * stride_variant_h) * tiles
    tile = tl.load(p_order + row + slot // TILE_PARTS)
    row += tile
    part = slot % TILE_PARTS * BM
    q_count = tl.load(p_q_count + tile) - part
    if q_count <= 0:
        return
    q_start = tl.load(p_q_start + tile).to(tl.int64) + part

    o_m, o_d = tl.arange(0, BM), tl.arange(0, BD)
    o_row = tl.minimum(o_m, q_count - 1)  # rows past the tile repeat its last one
    b_q = load_rows(
        p_q + b * stride_qb + h * stride_qh + q_start * stride_qs, o_row, stride_qs, None, D, BD
    )
    b_do = load_rows(
        p_do + b * stride_gb + h * stride_gh + q_start * stride_gs, o_row, stride_gs, None, D, BD
    )
    rows = q_start + o_row
    at = bh.to(tl.int64) * length_q + rows
    shift, delta = tl.load(p_shift + at), tl.load(p_delta + at)
    p_k += b * stride_kb + hk * stride_kh
    p_v += b * stride_vb + hk * stride_vh
    own = rows
    if BIAS is not None:
        own = OWN(bias, b, h, tile, rows)

    acc = tl.zeros((BM, BD), tl.float32)
    first, last = tl.load(p_full + row), tl.load(p_full + row + 1)
    whole_end = last
    if p_whole_end is not None:
        whole_end = tl.load(p_whole_end + row)
    if VISIBLE is not None:
        acc = _walk(acc, b_q, b_do, shift, delta, p_k, p_v, stride_ks, stride_vs, p_partial_start,
                    p_partial_count, tl.load(p_partial + row), tl.load(p_partial + row + 1), mask,
                    ROWS(mask, rows, part + o_m), bias, own, scale_log2, D, BM, BN, BD, VISIBLE,
                    BIAS, WORDS, PARTS, PRECISION, WAIT)  # fmt: skip
    if p_whole_end is not None:
        acc = _walk(acc, b_q, b_do, shift, delta, p_k, p_v, stride_ks, stride_vs, p_full_start,
                    p_full_count, whole_end, last, mask, rows, bias, own, scale_log2, D, BM, BN, BD,
                    in_run, BIAS, WORDS, PARTS, PRECISION, WAIT)  # fmt: skip
    acc = _walk(acc, b_q, b_do, shift, delta, p_k, p_v, stride_ks, stride_vs, p_full_start,
                p_full_count, first, whole_end, mask, rows, bias, own, scale_log2, D, BM, BN, BD,
                None, BIAS, WORDS, PARTS, PRECISION, WAIT)  # fmt: skip

    p_dq += (b * length_q + q_start) * (heads * D) + h * D  # contiguous
    tl.store(p_dq + o_m[:, None] * (heads * D) + o_d[None, :], (acc * scale).to(p_dq.dtype.element_ty),
             mask=(o_m < q_count)[:, None] & (o_d < D)[None, :])  # fmt: skip


# Gradients of keys and values ----------------------------------------------------------------------


@triton.jit
def _gather(
    dk, dv, b_k, b_v, p_q, p_do, p_shift, p_delta, stride_qs, stride_gs, visits, row, k_start, k_count,
    mask, bias, b, h, scale_log2, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr, ROWS: tl.constexpr, VISIBLE: tl.constexpr, OWN: tl.constexpr,
    BIAS: tl.constexpr, WORDS: tl.constexpr, PRECISION: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """ds^T q and p^T do over the visits of a block of keys in one list; blocks are [keys, queries]."""
    o_m, o_n = tl.arange(0, BM), tl.arange(0, BN)
    for i in range(tl.load(visits.offset + row), tl.load(visits.offset + row + 1)):
        q_start = tl.load(visits.q_start + i)
        q_count = tl.load(visits.q_count + i)
        o_row = tl.minimum(o_m, q_count - 1)
        b_q = load_rows(p_q + q_start.to(tl.int64) * stride_qs, o_row, stride_qs, None, D, BD)
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * scale_log2  # [BN, BM]
        if BIAS is not None:
            own = OWN(bias, b, h, tl.load(visits.tile + i), q_start + o_row)
            b_s += tl.trans(BIAS(bias, own, k_start, k_count, BN)) / LN2
        # Rows past the tile, which repeat its last one, weigh nothing.
        shift = tl.load(p_shift + q_start + o_m, mask=o_m < q_count, other=float("inf"))
        b_p = tl.exp2(b_s - shift[None, :])
        if VISIBLE is not None:
            lo, hi = tl.load(visits.lo + i), tl.load(visits.hi + i)
            rows = ROWS(mask, q_start + o_row, tl.load(visits.first_row + i) + o_m)
            seen = VISIBLE(mask, rows, tl.load(visits.entry + i), tl.load(visits.column + i),
                           k_start, hi, WORDS, BM, BN)  # fmt: skip
            b_p = tl.where(tl.trans(seen) & (o_n >= lo)[:, None], b_p, 0.0)
        b_do = load_rows(p_do + q_start.to(tl.int64) * stride_gs, o_row, stride_gs, None, D, BD)
        dv = settled(tl.dot(b_p.to(b_do.dtype), b_do, dv, input_precision=PRECISION), WAIT)
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
        delta = tl.load(p_delta + q_start + o_row)
        b_ds = b_p * (b_dp - delta[None, :])
        dk = settled(tl.dot(b_ds.to(b_q.dtype), b_q, dk, input_precision=PRECISION), WAIT)
    return dk, dv


@triton.jit(do_not_specialize=["length_q", "length_k", "heads", "group", "blocks", "heavy"])
def keys_kernel(
    p_q, p_k, p_v, p_do, p_shift, p_delta, p_dk, p_dv,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh, stride_gb, stride_gs, stride_gh,
    p_k_start, p_k_count, p_order, p_variant, stride_variant_b, stride_variant_h,
    whole, cut, partial, mask, bias,
    length_q, length_k, heads, group, blocks, heavy, scale_log2, scale,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    ROWS: tl.constexpr, VISIBLE: tl.constexpr, OWN: tl.constexpr, BIAS: tl.constexpr,
    WORDS: tl.constexpr, PRECISION: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    slot, bh = _place(tl.program_id(0), heavy, blocks)
    kv_heads = heads // group
    b, hk = (bh // kv_heads).to(tl.int64), (bh % kv_heads).to(tl.int64)
    row = 0
    if p_variant is not None:  # of the first head of the group; lists of others may differ
        row = tl.load(p_variant + b * stride_variant_b + hk * group * stride_variant_h) * blocks
    block = tl.load(p_order + row + slot)
    k_start, k_count = tl.load(p_k_start + block), tl.load(p_k_count + block)
    o_n, o_d = tl.arange(0, BN), tl.arange(0, BD)
    o_row = tl.minimum(o_n, k_count - 1)
    b_k = load_rows(p_k + b * stride_kb + hk * stride_kh + k_start.to(tl.int64) * stride_ks,
                     o_row, stride_ks, None, D, BD)  # fmt: skip
    b_v = load_rows(p_v + b * stride_vb + hk * stride_vh + k_start.to(tl.int64) * stride_vs,
                     o_row, stride_vs, None, D, BD)  # fmt: skip
    dk = tl.zeros((BN, BD), tl.float32)
    dv = tl.zeros((BN, BD), tl.float32)
    for g in range(group):
        h = hk * group + g
        row = block
        if p_variant is not None:
            row += tl.load(p_variant + b * stride_variant_b + h * stride_variant_h) * blocks
        p_q_head = p_q + b * stride_qb + h * stride_qh
        p_do_head = p_do + b * stride_gb + h * stride_gh
        p_shift_head = p_shift + (b * heads + h) * length_q
        p_delta_head = p_delta + (b * heads + h) * length_q
        if VISIBLE is not None:
            dk, dv = _gather(dk, dv, b_k, b_v, p_q_head, p_do_head, p_shift_head, p_delta_head,
                             stride_qs, stride_gs, partial, row, k_start, k_count, mask, bias, b, h,
                             scale_log2, D, BM, BN, BD, ROWS, VISIBLE, OWN, BIAS, WORDS, PRECISION,
                             WAIT)  # fmt: skip
        if cut is not None:
            dk, dv = _gather(dk, dv, b_k, b_v, p_q_head, p_do_head, p_shift_head, p_delta_head,
                             stride_qs, stride_gs, cut, row, k_start, k_count, mask, bias, b, h,
                             scale_log2, D, BM, BN, BD, positions, in_run, OWN, BIAS, WORDS, PRECISION,
                             WAIT)  # fmt: skip
        dk, dv = _gather(dk, dv, b_k, b_v, p_q_head, p_do_head, p_shift_head, p_delta_head, stride_qs,
                         stride_gs, whole, row, k_start, k_count, mask, bias, b, h, scale_log2, D, BM,
                         BN, BD, positions, None, OWN, BIAS, WORDS, PRECISION, WAIT)  # fmt: skip

    at = (b * length_k + k_start) * (kv_heads * D) + hk * D  # contiguous
    o_out = at + o_n[:, None] * (kv_heads * D) + o_d[None, :]
    stored = (o_n < k_count)[:, None] & (o_d < D)[None, :]
    tl.store(p_dk + o_out, (dk * scale).to(p_dk.dtype.element_ty), mask=stored)
    tl.store(p_dv + o_out, dv.to(p_dv.dtype.element_ty), mask=stored)

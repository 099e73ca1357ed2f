"""What has to be known before rows are rounded: norms over all heads, sums of K and maxima of V, each a first read.

Partial results of chunks of tokens, which `kernel.rows_kernel` adds up in a fixed order, so that equal inputs give
equal bits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def norms_kernel(
    q, k, end_q, eps, D: tl.constexpr, R: tl.constexpr, BC: tl.constexpr, EARLY: tl.constexpr
):
    """1 / RMS of every token over all heads of Q and of K."""
    program = tl.program_id(0)
    if EARLY:
        gdc_launch_dependents()
    if q.x is not None and program < end_q:
        _norms(q, program, eps, D, R, BC)
    if k.x is not None and program >= end_q:
        _norms(k, program - end_q, eps, D, R, BC)


@triton.jit
def _norms(side, program, eps, D: tl.constexpr, R: tl.constexpr, BC: tl.constexpr):
    blocks = tl.cdiv(side.length, R)
    b = (program // blocks).to(tl.int64)
    o_row = program % blocks * R + tl.arange(0, R)
    read = o_row < side.length
    p_x = side.x + b * side.b + o_row.to(tl.int64)[:, None] * side.s
    square = tl.zeros((R, BC), tl.float32)
    for start in range(0, side.heads * D, BC):
        o_c = start + tl.arange(0, BC)
        p = p_x + ((o_c // D).to(tl.int64) * side.h + o_c % D)[None, :]
        inside = read[:, None] & (o_c < side.heads * D)[None, :]
        b_x = tl.load(p, mask=inside, other=0.0).to(tl.float32)
        square += b_x * b_x
    b_rms = tl.rsqrt(tl.sum(square, 1) / (side.heads * D) + eps)
    tl.store(side.rms + b * side.length + o_row, b_rms, mask=read)


@triton.jit
def first_kernel(
    k, v, rotary, end_k, chunk_k, chunk_v, eps, PAIRS: tl.constexpr, ACROSS: tl.constexpr, D: tl.constexpr,
    BD: tl.constexpr, G: tl.constexpr, RK: tl.constexpr, RV: tl.constexpr, TOPS: tl.constexpr, EARLY: tl.constexpr,
    FOLLOWS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if FOLLOWS:  # what comes next relies on this wait for the norms, too
        gdc_wait()
    if EARLY:
        gdc_launch_dependents()
    if k.part is not None and program < end_k:
        _sums(k, rotary, program, chunk_k, eps, PAIRS, ACROSS, D, BD, G, RK, TOPS)
    if v.part is not None and program >= end_k:
        _tops(v, program - end_k, chunk_v, D, BD, G, RV)


@triton.jit
def _piece(side, program, chunk, G: tl.constexpr):
    """(first head, chunk of tokens, batch entry, chunks) of a program."""
    groups, chunks = tl.cdiv(side.heads, G), tl.cdiv(side.length, chunk)
    rest = program // groups
    return (program % groups) * G, rest % chunks, (rest // chunks).to(tl.int64), chunks


@triton.jit
def _sums(
    side, rotary, program, chunk, eps, PAIRS: tl.constexpr, ACROSS: tl.constexpr, D: tl.constexpr,
    BD: tl.constexpr, G: tl.constexpr, R: tl.constexpr, TOPS: tl.constexpr,
):  # fmt: skip
    """Sums of normed and rotated rows over a chunk of tokens, for G heads side by side, which read the
    rotary table from the L1 cache: a thread keeps to its channels, so that rows never cross threads. TOPS: behind
    them the largest magnitude of every channel."""
    first, index, b, chunks = _piece(side, program, chunk, G)
    o_h, o_r = first + tl.arange(0, G)[:, None, None], tl.arange(0, R)[None, :, None]
    o_d, o_p = tl.arange(0, BD)[None, None, :], 2 * tl.arange(0, BD // 2)[None, None, :]
    inside = (o_h < side.heads) & (o_d < D)
    known = (o_h < side.heads) & (o_p < D)  # [G, 1, BD / 2]
    p_x = side.x + b * side.b + o_h.to(tl.int64) * side.h + o_r.to(tl.int64) * side.s + o_d
    if side.weight is not None:
        p_w = side.weight + (o_h if ACROSS else o_h * 0) * D + o_p
        w_a = tl.load(p_w, mask=known, other=0.0).to(tl.float32)
        w_b = tl.load(p_w + 1, mask=known, other=0.0).to(tl.float32)
    if rotary is not None:
        o_table = (o_d // 2 if PAIRS else o_d) + o_h * 0
        p_cos = rotary.cos + o_r.to(tl.int64) * rotary.cos_s + o_table
        p_sin = rotary.sin + o_r.to(tl.int64) * rotary.sin_s + o_table
    acc_a = tl.zeros((G, 1, BD // 2), tl.float32)
    acc_b = tl.zeros((G, 1, BD // 2), tl.float32)
    top_a = tl.zeros((G, 1, BD // 2), tl.int32)
    top_b = tl.zeros((G, 1, BD // 2), tl.int32)
    for start in range(0, chunk, R):
        row = tl.zeros((), tl.int64) + (index * chunk + start)
        read = (row + o_r < side.length) & inside
        b_x = tl.load(p_x + row * side.s, mask=read, other=0.0).to(tl.float32)
        b_a, b_b = tl.split(tl.reshape(b_x, (G, R, BD // 2, 2)))
        b_rms = tl.full((G, R, 1), 1.0, tl.float32)
        if side.weight is not None:
            if ACROSS:
                p_rms = side.rms + b * side.length + row + o_r + o_h * 0
                b_rms = tl.load(
                    p_rms, mask=(row + o_r < side.length) & (o_h < side.heads), other=0.0
                )
            else:
                square = tl.sum(b_a * b_a + b_b * b_b, 2, keep_dims=True)  # [G, R, 1]
                b_rms = tl.rsqrt(square / D + eps)
            b_a, b_b = b_a * w_a, b_b * w_b
        if rotary is not None:
            b_cos = tl.load(p_cos + row * rotary.cos_s, mask=read, other=0.0).to(tl.float32)
            b_sin = tl.load(p_sin + row * rotary.sin_s, mask=read, other=0.0).to(tl.float32)
            b_cos, _ = tl.split(tl.reshape(b_cos, (G, R, BD // 2, 2)))
            _, b_sin = tl.split(tl.reshape(b_sin, (G, R, BD // 2, 2)))
            b_a, b_b = b_a * b_cos - b_b * b_sin, b_b * b_cos + b_a * b_sin
        b_a, b_b = b_a * b_rms, b_b * b_rms
        acc_a += tl.sum(b_a, 1, keep_dims=True)
        acc_b += tl.sum(b_b, 1, keep_dims=True)
        if TOPS:
            bits_a = tl.abs(b_a).to(tl.int32, bitcast=True)
            bits_b = tl.abs(b_b).to(tl.int32, bitcast=True)
            top_a = tl.maximum(top_a, tl.max(bits_a, 1, keep_dims=True))
            top_b = tl.maximum(top_b, tl.max(bits_b, 1, keep_dims=True))
    WIDE: tl.constexpr = 2 if TOPS else 1
    p = side.part + ((b * side.heads + o_h) * chunks + index) * (WIDE * D) + o_p
    tl.store(p, acc_a, mask=known)
    tl.store(p + 1, acc_b, mask=known)
    if TOPS:
        tl.store(p + D, top_a.to(tl.float32, bitcast=True), mask=known)
        tl.store(p + D + 1, top_b.to(tl.float32, bitcast=True), mask=known)


@triton.jit
def _tops(
    side, program, chunk, D: tl.constexpr, BD: tl.constexpr, G: tl.constexpr, R: tl.constexpr
):
    """Largest magnitude of a chunk of tokens per channel, for G heads side by side."""
    first, index, b, chunks = _piece(side, program, chunk, G)
    o_h, o_r = first + tl.arange(0, G)[:, None, None], tl.arange(0, R)[None, :, None]
    o_d = tl.arange(0, BD)[None, None, :]
    inside = (o_h < side.heads) & (o_d < D)
    p_x = side.x + b * side.b + o_h.to(tl.int64) * side.h + o_r.to(tl.int64) * side.s + o_d
    acc = tl.zeros((G, 1, BD), tl.int32)
    for start in range(0, chunk, R):
        row = tl.zeros((), tl.int64) + (index * chunk + start)
        read = (row + o_r < side.length) & inside
        b_x = tl.load(p_x + row * side.s, mask=read, other=0.0)
        bits = tl.abs(b_x.to(tl.float32)).to(tl.int32, bitcast=True)
        acc = tl.maximum(acc, tl.max(bits, 1, keep_dims=True))
    p = side.part + ((b * side.heads + o_h) * chunks + index) * D + o_d
    tl.store(p, acc.to(tl.float32, bitcast=True), mask=inside)

"""How the kernels of the prologue are cut into programs and chained: the host side of `kernel` and `before`.

Not here: smoothing of Q (SageAttention2, section 3.1), a mean over every 128 queries. Q is cut into tiles of
16 tokens, which know no such mean; it would need the tile of K, which is slower.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import FORMATS, PrologueSpec, mean_step
from .before import first_kernel, norms_kernel
from .kernel import INTERPRETED, rows_kernel, value_kernel


class Inputs(NamedTuple):
    """What `prologue` is given, checked."""

    q: Tensor
    k: Tensor
    v: Tensor
    norm_q: Tensor | None = None
    norm_k: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None
    order: Tensor | None = None
    key_order: Tensor | None = None


class Outputs(NamedTuple):
    """The fields of `prologue.Operands`; v is None where it stays as it is."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    q_scale: Tensor | None
    k_scale: Tensor | None
    v_scale: Tensor | None
    k_mean: Tensor | None


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """All outputs come from here: tests fill them with what must not be left."""
    return torch.empty(shape, dtype=dtype, device=device)


class Side(NamedTuple):
    """One of q, k, v [B, S, H, D] and what is to be done with it. None: it is not done.

    order: [S_out], the input row of every output row. out: written with strides out_b, out_s, out_h, out_d.
    scale: fp32, contiguous; [B, H, ceil(S / N)] of Q and K (times the groups of K), [B, H, D] of V. weight: [D] of the norm,
    or [H * D] over all heads. mean: fp32 [B, H, D], is subtracted from K. part: fp32 [B, H, chunks, D].
    """

    x: Tensor | None = None
    order: Tensor | None = None
    out: Tensor | None = None
    scale: Tensor | None = None
    weight: Tensor | None = None
    mean: Tensor | None = None
    part: Tensor | None = None
    rms: Tensor | None = None
    b: int = 0
    s: int = 0
    h: int = 0
    out_b: int = 0
    out_s: int = 0
    out_h: int = 0
    out_d: int = 0
    length: int = 0  # tokens of x
    out_length: int = 0  # tokens of out, without padding
    heads: int = 0


NOTHING = Side()


class Rotary(NamedTuple):
    """cos, sin: [S, D / 2], or [S, D] with every angle twice."""

    cos: Tensor
    sin: Tensor
    cos_s: int
    sin_s: int


class Launch(NamedTuple):
    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple
    options: dict[str, Any]

    def run(self) -> Any:
        """Returns the compiled kernel."""
        return self.kernel[self.grid](*self.arguments, **self.options)


class Tile(NamedTuple):
    """How Q or K is cut: `rows` tokens a program; stages: heads in flight."""

    rows: int
    warps: int
    stages: int


class Totals(NamedTuple):
    """Sides with partial results, to be made and to be added up; NOTHING: none of this one.

    chunk: tokens of a partial result.
    """

    k: Side = NOTHING
    v: Side = NOTHING
    k_chunk: int = 1
    v_chunk: int = 1


def plan_launches(
    inputs: Inputs, spec: PrologueSpec, *, early: bool = False, allocate: Callable = _empty
) -> tuple[Outputs, list[Launch]]:
    """Empty outputs, and the launches that fill them, in their order."""
    q, k, v = inputs.q, inputs.k, inputs.v
    batch, _, kv_heads, head_dim = k.shape
    qk_code, qk_limit = FORMATS.get(spec.qk, (q.dtype, 0.0))
    v_code, v_limit = FORMATS.get(spec.v, (v.dtype, 0.0))
    order, key_order = (
        None if rows is None else rows.contiguous()
        for rows in (inputs.order, inputs.order if inputs.key_order is None else inputs.key_order)
    )
    tables = None
    if inputs.cos is not None and inputs.sin is not None:
        cos, sin = (_rows_in_memory(x) for x in (inputs.cos, inputs.sin))
        # [S, .] or [1, S, 1, .]
        tables = Rotary(cos, sin, *(x.stride(0 if x.dim() == 2 else 1) for x in (cos, sin)))

    def side(x: Tensor, order: Tensor | None, weight: Tensor | None) -> Side:
        x = _rows_in_memory(x)
        return Side(
            x=x, order=order, weight=None if weight is None else weight.contiguous(),
            b=x.stride(0), s=x.stride(1), h=x.stride(2), length=x.shape[1], heads=x.shape[2],
            out_length=x.shape[1] if order is None else order.numel(),
        )  # fmt: skip

    def empty(x: Side, dtype: torch.dtype, padded: int = 0) -> Side:
        """With an output [B, S, H, D], of two codes a byte [B, S, H, D / 2], or [B, H, D, padded]."""
        rows = (batch, x.out_length, x.heads, head_dim // (2 if dtype == torch.uint8 else 1))
        shape = (batch, x.heads, head_dim, padded) if padded else rows
        out = allocate(shape, dtype, q.device)
        b, s, h, d = (out.stride(i) for i in ((0, 3, 1, 2) if padded else (0, 1, 2, 3)))
        return x._replace(out=out, out_b=b, out_s=s, out_h=h, out_d=d)

    def float32(*shape: int) -> Tensor:
        return allocate(shape, torch.float32, q.device)

    k_mean = float32(batch, kv_heads, head_dim) if spec.smooth_k else None
    v_scale = float32(batch, kv_heads, head_dim) if spec.v != "same" else None
    value = side(v, key_order, None)._replace(scale=v_scale)
    query, key = side(q, order, inputs.norm_q), side(k, key_order, inputs.norm_k)
    query, key = (empty(x, qk_code) for x in (query, key))
    if spec.qk != "same":
        query = query._replace(
            scale=float32(batch, query.heads, -(-query.out_length // spec.q_rows))
        )
        key = key._replace(scale=float32(batch, kv_heads, *spec.key_scales(key.out_length)))
    key = key._replace(mean=k_mean)

    launches: list[Launch] = []
    query, key = (
        x._replace(rms=float32(batch, x.length)) if _across(x) else x for x in (query, key)
    )
    normed = [x if _across(x) else NOTHING for x in (query, key)]
    if any(x.x is not None for x in normed):
        launches.append(norms_launch(*normed, eps=spec.eps, early=early))
    totals = Totals()
    of_head = spec.k_rows == 0
    if k_mean is not None or v_scale is not None or of_head:
        # Norms over all heads are read by token: then the mean is over all of them, too.
        step = 1 if _across(key) or of_head else mean_step(key.length)
        totals = _totals(
            _every(step, key) if k_mean is not None or of_head else NOTHING,
            value if v_scale is not None else NOTHING,
            float32,
            of_head,
        )
        angles = tables and tables._replace(cos_s=tables.cos_s * step, sin_s=tables.sin_s * step)
        follows = early and bool(launches)
        launches.append(
            first_launch(
                totals, angles, eps=spec.eps, of_head=of_head, early=early, follows=follows
            )
        )

    tiles = [tile_of(rows, head_dim) for rows in (spec.q_rows, spec.k_rows)]
    together = tiles[0] == tiles[1] and _across(query) == _across(key) and totals.k.x is None
    for x, y in [(query, key)] if together else [(query, NOTHING), (NOTHING, key)]:
        launches.append(
            rows_launch(
                x, y, tables, eps=spec.eps, fold=spec.softmax_scale, limit=qk_limit,
                rows=(spec.q_rows, spec.k_rows), groups=spec.k_groups, tile=tiles[0] if x.x is not None else tiles[1],
                totals=totals if x.x is not None else Totals(),
                wait=_wait(launches, alone=y.x is None, first=totals != Totals()) if early else "",
            )
        )  # fmt: skip

    if spec.v != "same" or spec.v_layout != "tokens" or key_order is not None:
        padded = 0
        if spec.v_layout != "tokens":
            padded = -(-value.out_length // spec.v_padding) * spec.v_padding
        value = empty(value, v_code, padded)
        wait = "first" if together and v_scale is not None else "last"
        launches.append(
            value_launch(
                value, padded=padded or value.out_length, layout=spec.v_layout, limit=v_limit,
                wait=wait if early else "",
            )
        )  # fmt: skip
    outputs = Outputs(query.out, key.out, value.out, query.scale, key.scale, v_scale, k_mean)
    return outputs, launches


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_2(n: int) -> int:
    """The least one from n up."""
    return 1 << max(n - 1, 0).bit_length()


def _rows_in_memory(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def tile_of(rows: int, head_dim: int) -> Tile:
    """For scales of `rows` tokens: 16 numbers a thread, or 64 where a scale needs a large block."""
    BD = _power_of_2(head_dim)
    small = 2048 // BD
    if rows <= small:
        return Tile(small, 4, 3)
    return Tile(rows, max(4, min(16, rows * BD // 2048)), 3)


def _wait(launches: list[Launch], *, alone: bool, first: bool) -> str:
    """Of a launch of Q (`alone`), K, or both. Q needs nothing of partial results."""
    if not launches:
        return ""
    return "totals" if alone and first else "all"


def _heads_of(x: Side, tile: Tile) -> int:
    """Heads of a program, which share its load of the rotary table."""
    if x.x is None:
        return 1
    if tile.warps == 4 and tile.rows <= 32:
        return _cdiv(x.heads, _cdiv(x.heads, 8))
    # A large tile has an SM for itself: as few waves as possible, the table for 2 heads' worth of time.
    blocks = x.x.shape[0] * _cdiv(x.out_length, tile.rows)
    slots = _multiprocessors(x.x) * max(1, 8 // tile.warps)

    def cost(groups: int) -> int:
        return _cdiv(blocks * groups, slots) * (_cdiv(x.heads, groups) + 2)

    return _cdiv(x.heads, min(range(1, x.heads + 1), key=cost))


def _multiprocessors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 132


def rows_launch(
    q: Side, k: Side, rotary: Rotary | None, *, eps: float, fold: float, limit: float,
    rows: tuple[int, int], groups: int, tile: Tile, totals: Totals, wait: str,
) -> Launch:  # fmt: skip
    """Q, K or both; the other is `NOTHING`.

    fold: is multiplied into the scales of Q; limit: the largest code, 0 in 16 bits; rows: tokens of a
    scale of Q and of K; groups: of those of K; totals: what is to be added up besides; wait: who waits for the launch in front.
    """
    side = k if q.x is None else q
    assert side.x is not None
    batch, head_dim = side.x.shape[0], side.x.shape[-1]
    programs = [batch * x.heads for x in (totals.k, totals.v)]
    per = [_heads_of(x, tile) for x in (q, k)]
    for x, heads in zip((q, k), per, strict=True):
        programs.append(batch * _cdiv(x.heads, heads) * _cdiv(x.out_length, tile.rows))
    ends = [sum(programs[: i + 1]) for i in range(4)]
    chunks = (
        _cdiv(totals.k.length, totals.k_chunk), _cdiv(totals.v.length, totals.v_chunk)
    )  # fmt: skip
    return Launch(
        rows_kernel,
        (ends[-1],),
        (totals.k, totals.v, q, k, rotary, *ends[:3], *chunks, *per, eps, fold),
        {"NQ": rows[0], "NK": rows[1], "GK": groups, "LIMIT": limit, "PAIRS": _pairs(rotary, head_dim),
         "ACROSS": _across(side), "D": head_dim, "BM": tile.rows,
         "BD": _power_of_2(head_dim), "STAGES": tile.stages, "WAIT": wait}
        | _options(tile.warps, early=bool(wait)),
    )  # fmt: skip


def value_launch(v: Side, *, padded: int, layout: str, limit: float, wait: str) -> Launch:
    """V in layout "tokens", "channels" or "channels16"; `padded`: tokens of out with padding; wait: for
    the launch in front of it "first", "last" (its results are not needed), or "" (no early launch)."""
    head_dim = v.x.shape[-1]
    BD = _power_of_2(head_dim)
    transposed = layout != "tokens"
    # Rows that four warps load at once, 16 bytes a thread. Transposed, a thread takes 16 tokens of its
    # channels, which are 16 bytes of 8-bit codes, and 128 tokens of head dim 128 a whole cache line.
    rows = max(1, 128 * 16 // v.x.element_size() // BD)
    BM = (16 if transposed else 4) * rows
    return Launch(
        value_kernel,
        (v.heads * _cdiv(padded, BM), v.x.shape[0]),
        (v, padded),
        {"LIMIT": limit, "D": head_dim, "BM": BM, "BD": BD, "ROWS": rows if transposed else BM,
         "TRANSPOSED": transposed, "SWAPPED": layout == "channels16", "WAIT": wait} | _options(4, early=bool(wait)),
    )  # fmt: skip


def _totals(k: Side, v: Side, float32: Callable, of_head: bool) -> Totals:
    """With room for partial results; of_head: K has maxima behind its sums."""
    chunks = (_chunk(k), _chunk(v))
    k, v = (
        x if x.x is None else x._replace(
            part=float32(x.x.shape[0], x.heads, _cdiv(x.length, chunk), wide * x.x.shape[-1])
        ) for x, chunk, wide in zip((k, v), chunks, (1 + of_head, 1), strict=True)
    )  # fmt: skip
    return Totals(k, v, *chunks)


def _every(step: int, x: Side) -> Side:
    """Every so many tokens of a side."""
    return x._replace(s=x.s * step, length=_cdiv(x.length, step))


def _chunk(x: Side) -> int:
    """Tokens of a partial result: enough programs to fill the GPU, and few enough to add up."""
    if x.x is None:
        return 1
    tokens = x.x.shape[0] * _cdiv(x.heads, _group(x)) * x.length // 1024
    wide = max(1, 128 // _power_of_2(x.x.shape[-1]))
    return max(16, min(256, _power_of_2(tokens))) * wide


def _group(x: Side) -> int:
    """Heads side by side: 1024 columns are 16 bytes for each of 128 threads."""
    return min(_power_of_2(x.heads), max(1, 1024 // _power_of_2(x.x.shape[-1])))


def norms_launch(q: Side, k: Side, *, eps: float, early: bool) -> Launch:
    """Into q.rms and k.rms; 4 tokens a program."""
    side = k if q.x is None else q
    assert side.x is not None
    programs = [side.x.shape[0] * _cdiv(x.length, 4) for x in (q, k)]
    return Launch(
        norms_kernel,
        (sum(programs),),
        (q, k, programs[0], eps),
        {"D": side.x.shape[-1], "R": 4, "BC": 1024, "EARLY": early} | _options(4),
    )


def first_launch(
    totals: Totals, rotary: Rotary | None, *, eps: float, of_head: bool, early: bool, follows: bool
) -> Launch:
    """Sums of K over tokens, with of_head maxima too, into k.part and maxima of V per channel into v.part.

    early: the next launch may begin early; follows: this one may, and waits for norms over all heads.
    """
    k, v = totals.k, totals.v
    side = v if k.x is None else k
    assert side.x is not None
    batch, head_dim = side.x.shape[0], side.x.shape[-1]
    G, BD = _group(side), _power_of_2(head_dim)
    programs = [
        batch * _cdiv(x.heads, G) * _cdiv(x.length, chunk)
        for x, chunk in ((k, totals.k_chunk), (v, totals.v_chunk))
    ]
    rows = max(1, min(8, 4096 // (G * BD)))
    return Launch(
        first_kernel,
        (sum(programs),),
        (k, v, rotary, programs[0], totals.k_chunk, totals.v_chunk, eps),
        {"PAIRS": _pairs(rotary, head_dim), "ACROSS": _across(k), "D": head_dim, "BD": BD, "G": G,
         "RK": rows, "RV": 2 * rows, "TOPS": of_head, "EARLY": early, "FOLLOWS": follows}
        | _options(4, early=follows),
    )  # fmt: skip


def _across(x: Side) -> bool:
    return x.x is not None and x.weight is not None and x.weight.numel() > x.x.shape[-1]


def _pairs(rotary: Rotary | None, head_dim: int) -> bool:
    return rotary is not None and rotary.cos.shape[-1] < head_dim


def _options(warps: int, *, early: bool = False) -> dict[str, Any]:
    """early: the launch may begin before the one in front of it ends, and waits where it needs that one."""
    if INTERPRETED:
        return {}
    return {"num_warps": warps} | ({"launch_pdl": True} if early else {})

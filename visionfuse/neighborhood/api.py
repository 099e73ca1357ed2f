"""Neighborhood attention on grids of tokens: NATTEN's rules, and what NATTEN leaves out.

    out = visionfuse.neighborhood_attention(q, k, v, window=7)                  # (B, H, W, heads, D)
    out = visionfuse.neighborhood_attention(q, k, v, window=(None, 24, 24), stride=(1, 8, 8), extra_kv=text)

Hassani et al., "Neighborhood Attention Transformer" (CVPR 2023), "Dilated NAT" (arXiv 2209.15001) and
"Generalized Neighborhood Attention" (arXiv 2504.16922).
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from math import prod
from operator import index
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.attention import Precision, RelativeBias, block_sparse_attention
from ..kernels.attention.dispatch import fastest
from ..kernels.attention.quantized import KEY_STEP
from ..kernels.order.permute import Orders
from ..kernels.plan import BlockPlan, Neighborhood, Segment, TokenLayout, compress
from ..kernels.plan.halo import plan_neighborhood
from ..kernels.plan.tiles import block_shapes
from .natten import natten_attention

# A difference of indices with it lies outside every table: tokens without a position have no bias.
NOWHERE = 1 << 29

Pair = tuple[Tensor, Tensor]


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | tuple[int | None, ...] | list | None,
    stride: int | tuple[int, ...] | list = 1,
    dilation: int | tuple[int, ...] | list = 1,
    causal: bool | tuple[bool, ...] | list = False,
    *,
    extra_kv: Pair | None = None,
    extra_q: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    precision: str | Precision = "model",
    impl: str = "auto",
) -> Any:
    """Attention of every token to a window of its grid, in one pass, forward and backward.

    q: (B, *grid, H, D); k, v: (B, *grid, H_kv, D), H_kv dividing H; grids of 1 to 3 axes, any strides.
    window, stride, dilation, causal: as in `Neighborhood`, one value or a tuple with one per axis; a list has
        one of these for every head of q. None is the whole axis. A window that reaches beyond its axis is
        clamped, with a warning (once per grid).
    extra_kv: keys and values (B, E, H_kv, D) that every query sees: text, class tokens, registers.
    extra_q: (B, E, H, D), the queries of these tokens; they see everything.
    bias: (H, 2 w_0 - 1, ..): for every head and relative position, key minus query, a number that is added
        to the scaled score; may require a gradient. Extra tokens have none.
    scale: of the scores, 1 / sqrt(D) by default.
    return_lse: also return the natural log of the sum of exponentials, float32.
    precision: as in `block_sparse_attention`.
    impl: "auto", an implementation by name, or "natten": NATTEN's CUDA kernels, where they are installed.

    Returns out (B, *grid, H, D), and with return_lse (out, lse), lse (B, *grid, H). With extra_q both are
    pairs, (grid, extra): (B, E, H, D) and (B, E, H) for the extra tokens.

    Raises ValueError for shapes and parameters that do not fit, UnsupportedError where a named implementation
    cannot run. Plans and permutations are cached by grid, parameters, device, implementation and head dim.
    """
    grid = _check(q, k, v, extra_kv, extra_q)
    if q.is_meta:
        return _shapes_alone(q, extra_q, return_lse)
    if impl == "natten":
        return natten_attention(
            q, k, v, window, stride, dilation, causal, extra_kv=extra_kv, scale=scale,
            return_lse=return_lse, refused=_beyond_natten(extra_q, bias, precision),
        )  # fmt: skip
    rules = tuple(_hashable(x) for x in (window, stride, dilation, causal))
    extra = 0 if extra_kv is None else index(extra_kv[0].shape[1])
    heads, head_dim = index(q.shape[-2]), index(q.shape[-1])
    name = _implementation(impl, q.device, q.dtype, head_dim, str(precision), bias is not None)
    call = _Call(
        grid, extra, extra_q is not None, heads, rules, name, head_dim, str(precision), q.device
    )
    plan = _plan(call)
    blocks = BlockPlan.from_tensors(plan.tensors, plan.numbers)
    rank = len(grid)
    more_k, more_v = extra_kv or (None, None)
    q, k, v = (
        x.flatten(1, rank) if extra is None else torch.cat([x.flatten(1, rank), extra], dim=1)
        for x, extra in zip((q, k, v), (extra_q, more_k, more_v), strict=True)
    )
    relative = None
    if bias is not None:
        sizes = tuple([index(n) for n in bias.shape])
        relative = RelativeBias(bias.flatten(1), *_bias_indices(call, sizes))
    order = Orders(plan.q_order, plan.k_order)
    options: Any = {
        "scale": scale, "impl": impl, "precision": precision, "bias": relative, "order": order
    }  # fmt: skip
    if not return_lse:
        return _on_grid(block_sparse_attention(q, k, v, blocks, **options), grid, extra_q)
    out, lse = block_sparse_attention(q, k, v, blocks, return_lse=True, **options)
    return _on_grid(out, grid, extra_q), _on_grid(lse.transpose(1, 2), grid, extra_q)


def _shapes_alone(q: Tensor, extra_q: Tensor | None, return_lse: bool) -> Any:
    """What a call returns on the meta device, where there are no numbers to plan with."""
    outs = [torch.empty_like(x) for x in (q, extra_q) if x is not None]
    lses = [x.new_empty(x.shape[:-1], dtype=torch.float32) for x in outs]
    found = [tuple(x) if extra_q is not None else x[0] for x in (outs, lses)]
    return tuple(found) if return_lse else found[0]


class _Call(NamedTuple):
    """What plans are cached by. extra: number of extra tokens; rules: window, stride, dilation, causal."""

    grid: tuple[int, ...]
    extra: int
    extra_attends: bool
    heads: int
    rules: tuple
    impl: str
    head_dim: int
    precision: str
    device: torch.device


class ByHead(NamedTuple):
    """One value for every head."""

    values: tuple


class GridPlan(NamedTuple):
    """A plan and the `Orders` of its queries and keys.

    tensors, numbers: of the BlockPlan. torch.compile keeps tensors as constants, not dataclasses.
    """

    tensors: list[Tensor]
    numbers: list[int]
    q_order: Tensor | None
    k_order: Tensor | None


def _on_grid(x: Tensor, grid: tuple[int, ...], extra_q: Tensor | None) -> Any:
    """(B, S, H, ...) -> (B, *grid, H, ...), and what extra queries found beside it."""
    tokens = prod(grid)
    out = x[:, :tokens].unflatten(1, grid)
    return out if extra_q is None else (out, x[:, tokens:])


# -- what is cached, and constant in a compiled graph ---------------------------------------------------


def _constant(function):
    """Cached; torch.compile calls it while it traces and keeps the result in the graph."""
    cached = lru_cache(maxsize=256)(function)

    # A function and not the cache itself, through which it would trace.
    @torch._dynamo.assume_constant_result
    def call(*args):
        return cached(*args)

    return call


@_constant
def _implementation(impl, device, dtype, head_dim, precision, has_bias: bool) -> str:
    """The implementation that "auto" will take, whose blocks the plan gets."""
    if impl != "auto":
        return impl
    q = torch.empty(1, 1, 1, head_dim, device=device, dtype=dtype)
    plan = compress(torch.ones(1, 1, dtype=torch.bool, device=device))
    nowhere = torch.zeros(1, dtype=torch.int32, device=device)
    bias = RelativeBias(torch.zeros(1, 1, device=device), nowhere, nowhere) if has_bias else None
    return fastest(q, q, q, plan, Precision.parse(precision), bias)[0]


@_constant
def _plan(call: _Call) -> GridPlan:
    kept = Segment("text", (max(call.extra, 1),), keys_only=not call.extra_attends)
    layout = TokenLayout((Segment("grid", call.grid), *(kept,) * bool(call.extra)))
    shapes = block_shapes(call.impl, call.head_dim, precision=call.precision, device=call.device)
    precision, spec = Precision.parse(call.precision), _neighborhoods(call)
    step = 1 if precision.is_model else KEY_STEP if precision.k_scale == "tensor" else 0
    # Kept for calls to come: made in inference mode, it could never meet autograd.
    with torch.inference_mode(False), torch.no_grad():
        found = plan_neighborhood(layout, spec, shapes, call.device, step)
        q_order = None if found.queries is None else found.queries[: layout.queries].contiguous()
        return GridPlan(found.blocks.to_tensors(), found.blocks.scalars(), q_order, found.keys)


@_constant
def _bias_indices(call: _Call, table: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """q_index and k_index of `RelativeBias` for a table of these sizes, in the plan's order."""
    grid, plan, spec = call.grid, _plan(call), _neighborhoods(call)
    resolved = [each.resolve(grid) for each in (spec if isinstance(spec, tuple) else (spec,))]
    least = tuple(max(2 * each.window[a] - 1 for each in resolved) for a in range(len(grid)))
    if len(table) != 1 + len(grid) or any(
        n < m or n % 2 == 0 for n, m in zip(table[1:], least, strict=True)
    ):
        raise ValueError(
            f"bias has shape {table}. It needs (heads, 2 w - 1, ..), an odd size for every axis, for these "
            f"windows at least {(call.heads, *least)}."
        )
    if table[0] != call.heads:
        raise ValueError(f"bias has {table[0]} heads, q has {call.heads}.")
    dilation = resolved[0].dilation
    if any(each.dilation != dilation for each in resolved):
        raise ValueError("bias needs one dilation for all heads: relative positions are its steps.")
    with torch.inference_mode(False), torch.no_grad():
        axes = [
            torch.arange(n, device=call.device) // d for n, d in zip(grid, dilation, strict=True)
        ]
        coords = torch.stack([x.flatten() for x in torch.meshgrid(*axes, indexing="ij")])
        empty = torch.zeros(1, *table[1:], device=call.device)
        made = RelativeBias.from_coordinates(empty, coords, coords)
        nowhere = torch.full((call.extra,), NOWHERE, dtype=torch.int32, device=call.device)
        q_index, k_index = (
            x if order is None else x[order[: prod(grid)]]
            for x, order in ((made.q_index, plan.q_order), (made.k_index, plan.k_order))
        )
        if call.extra_attends:
            q_index = torch.cat([q_index, -nowhere])
        return q_index, torch.cat([k_index, nowhere])


def _neighborhoods(call: _Call) -> Neighborhood | tuple[Neighborhood, ...]:
    """One rule, or a tuple with one for every head."""
    grid, heads, rules = call.grid, call.heads, call.rules
    if not any(isinstance(value, ByHead) for value in rules):
        return _neighborhood(grid, *rules)
    for name, value in zip(("window", "stride", "dilation", "causal"), rules, strict=True):
        if isinstance(value, ByHead) and len(value.values) != heads:
            raise ValueError(
                f"{name} is a list of {len(value.values)} values for {heads} heads. A list has one for every "
                "head; values for the axes of the grid stand in a tuple."
            )
    by_head = (v.values if isinstance(v, ByHead) else (v,) * heads for v in rules)
    return tuple(_neighborhood(grid, *each) for each in zip(*by_head, strict=True))


def _neighborhood(grid, window, stride, dilation, causal) -> Neighborhood:
    """The rule on this grid, with windows that fit it."""
    rank = len(grid)
    window, stride, dilation, causal = (
        x if isinstance(x, tuple) else (x,) * rank for x in (window, stride, dilation, causal)
    )
    for name, values in (
        ("window", window),
        ("stride", stride),
        ("dilation", dilation),
        ("causal", causal),
    ):
        if len(values) != rank:
            raise ValueError(
                f"{name}={values} has {len(values)} values, but the grid {grid} has {rank} axes."
            )
    for name, values in (("window", window), ("stride", stride), ("dilation", dilation)):
        if any(n is not None and n < 1 for n in values):
            raise ValueError(f"{name} must be at least 1 on every axis, got {values}.")
    if any(w is not None and s > w for w, s in zip(window, stride, strict=True)):
        raise ValueError(
            f"stride={stride} is larger than window={window}: some keys would never be seen."
        )
    dilation = tuple(map(min, dilation, grid))
    most = tuple(n // d for n, d in zip(grid, dilation, strict=True))
    fits = tuple(m if w is None else min(w, m) for w, m in zip(window, most, strict=True))
    cut = [w is not None and w > f and n > 1 for w, f, n in zip(window, fits, grid, strict=True)]
    if any(cut):
        warnings.warn(
            f"window={window} with dilation={dilation} reaches beyond the grid {grid}: taken as {fits}.",
            stacklevel=2,
        )
    stride = tuple(map(min, stride, fits))
    return Neighborhood(window=fits, stride=stride, dilation=dilation, causal=causal)


def _hashable(value: Any) -> Any:
    if isinstance(value, list):
        return ByHead(tuple(tuple(x) if isinstance(x, list) else x for x in value))
    return value


# -- checks -------------------------------------------------------------------------------------------


def _check(q: Tensor, k: Tensor, v: Tensor, extra_kv, extra_q) -> tuple[int, ...]:
    """The grid."""
    if not 4 <= q.dim() <= 6 or k.dim() != q.dim() or k.shape != v.shape:
        raise ValueError(
            "Expected q (B, *grid, H, D) and k, v (B, *grid, H_kv, D) with grids of 1 to 3 axes, got "
            f"{tuple(q.shape)=}, {tuple(k.shape)=}, {tuple(v.shape)=}."
        )
    if q.shape[:-2] != k.shape[:-2] or q.shape[-1] != k.shape[-1] or q.shape[-2] % k.shape[-2]:
        raise ValueError(
            "q and k must share batch, grid and head dim, and the heads of k must divide those of q, got "
            f"{tuple(q.shape)=}, {tuple(k.shape)=}."
        )
    if extra_q is not None and extra_kv is None:
        raise ValueError("extra_q are the queries of the tokens in extra_kv, which is None.")
    if extra_kv is not None:
        more_k, more_v = extra_kv
        expected = (k.shape[0], more_k.shape[1], *k.shape[-2:])
        if tuple(more_k.shape) != expected or tuple(more_v.shape) != expected:
            raise ValueError(
                f"extra_kv must be two tensors (B, E, H_kv, D) = {expected}, got {tuple(more_k.shape)} and "
                f"{tuple(more_v.shape)}."
            )
        if extra_q is not None and tuple(extra_q.shape) != (*expected[:2], *q.shape[-2:]):
            raise ValueError(
                f"extra_q must be (B, E, H, D) = {(*expected[:2], *q.shape[-2:])}, got {tuple(extra_q.shape)}."
            )
    return tuple([index(n) for n in q.shape[1:-2]])


def _beyond_natten(extra_q, bias, precision) -> list[str]:
    reasons = []
    if extra_q is not None:
        reasons.append("it has no queries for extra tokens (extra_q)")
    if bias is not None:
        reasons.append("it has no relative position bias")
    if str(precision) != "model":
        reasons.append(f"it has no precision={str(precision)!r}")
    return reasons

"""Errors of an attention result against float64, on sampled queries and from the rule itself, not from the plan."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SAMPLED_QUERIES = 128


def sampled_errors(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Callable[[Tensor], Tensor] | None = None,
    *,
    queries: int = SAMPLED_QUERIES,
) -> tuple[float, float]:
    """Relative L1 error and cosine of out (B, S, H, D), in the last batch entry and the outer heads.

    visible: positions [n] -> the keys that these queries see, bool [n, S_k]; None: all keys.
    """
    length, heads = q.shape[1:3]
    generator = torch.Generator().manual_seed(1)
    rows = torch.randperm(length, generator=generator)[:queries]
    rows[-1] = length - 1  # in the last tile, which is often a short one
    rows = rows.to(q.device)
    outer = torch.tensor(sorted({0, heads - 1}), device=q.device)
    every = slice(None)
    qd, kd, vd = (
        x[-1, index][:, outer].double().transpose(0, 1)
        for x, index in ((q, rows), (k, every), (v, every))
    )  # [H, S, D]
    scores = (qd @ kd.mT) * q.shape[-1] ** -0.5
    if visible is not None:
        scores.masked_fill_(~visible(rows), -torch.inf)
    exact = scores.softmax(-1) @ vd
    got = out[-1, rows][:, outer].double().transpose(0, 1)
    rel_l1 = (got - exact).abs().sum() / exact.abs().sum()
    cosine = (got * exact).sum() / (got.norm() * exact.norm())
    return float(rel_l1), float(cosine)

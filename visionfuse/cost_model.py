"""Fit the costs that the planner counts with (`BlockShape`) to times of real plans, by least squares."""

from __future__ import annotations

from dataclasses import replace

import torch

from .kernels.plan.block_plan import BlockPlan
from .kernels.plan.tiles import BlockShape

# What is fitted besides the pairs themselves. A padded implementation costs whole blocks, so that copies
# and entries are in their price; the other one pays for what a run holds.
PADDED = ("partial", "ragged", "tile")
UNPADDED = ("partial", "gather", "entry", "tile")


def features(plan: BlockPlan, shape: BlockShape) -> dict[str, float]:
    """How much of everything that costs time a plan has, in the units of `BlockShape`."""
    full, partial = plan.full, plan.partial
    if shape.padded:
        block = plan.block_q * plan.block_k
        short = int((full.count < plan.block_k).sum())
        return {
            "pairs": block * (full.start.numel() + partial.start.numel()),
            "partial": block * partial.start.numel(),
            "ragged": block * short,
            "tile": plan.tiles,
        }
    masked = plan.q_count[partial.rows % plan.tiles].long() * partial.count.long()
    return {
        "pairs": plan.visited_density * plan.variants * plan.length_q * plan.length_k,
        "partial": int(masked.sum()),
        "gather": int(full.count.sum()) + int(partial.count.sum()),
        "entry": full.start.numel() + partial.start.numel(),
        "tile": plan.tiles,
    }


PRIOR_WEIGHT = 0.1  # of a sample: an older value stands where the plans do not decide


def fit(
    samples: list[tuple[dict[str, float], float]], shape: BlockShape, prior: BlockShape
) -> tuple[BlockShape, float, float]:
    """`shape` with fitted costs, its pairs a millisecond, and the worst relative error of the fit.

    samples: (features, ms) of plans. Relative errors count, and a cost that would be negative is 0. prior:
    what was believed before; costs that these plans cannot tell apart stay near it.
    """
    known = PADDED if shape.padded else UNPADDED
    names = ["pairs", *(n for n in known if any(f[n] for f, _ in samples))]
    ms = torch.tensor([t for _, t in samples], dtype=torch.float64)
    while True:
        table = torch.tensor([[f[n] for n in names] for f, _ in samples], dtype=torch.float64)
        table /= ms[:, None]  # [plans, costs], whose product with the costs should be 1
        scale = table.mean(0)
        believed = torch.diag(scale)[
            1:
        ]  # cost - prior * cost of a pair = 0, in the unit of the samples
        believed[:, 0] = -scale[1:] * torch.tensor([getattr(prior, n) for n in names[1:]])
        rows = torch.cat([table, PRIOR_WEIGHT * believed]) / scale
        wanted = torch.cat([torch.ones_like(ms), torch.zeros(len(names) - 1)])
        costs = torch.linalg.lstsq(rows, wanted[:, None], driver="gelsd").solution[:, 0] / scale
        if bool((costs[1:] >= 0).all()):
            break
        del names[1 + int((costs * scale)[1:].argmin())]
    found = dict(zip(names, costs.tolist(), strict=True))
    if (
        not found["pairs"] > 0
    ):  # times that do not grow with the work: noise, so that only the speed is new
        believed_ms = [
            f["pairs"] + sum(getattr(prior, n) * f[n] for n in known) for f, _ in samples
        ]
        pair = float((ms / torch.tensor(believed_ms, dtype=torch.float64)).median())
        found = {"pairs": pair} | {n: pair * getattr(prior, n) for n in known}
    expected = [sum(cost * f[n] for n, cost in found.items()) for f, _ in samples]
    error = max(abs(x / t - 1) for x, (_, t) in zip(expected, samples, strict=True))
    costs_of_pair = {n: _rounded(found.get(n, 0.0) / found["pairs"]) for n in known}
    return replace(shape, **costs_of_pair), 1 / found["pairs"], error


def _rounded(value: float) -> float:
    """Two digits: more would be noise, and a table is read by people."""
    return float(f"{value:.2g}")

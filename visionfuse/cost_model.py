"""What a plan costs, in the units that the planner counts with (`BlockShape`), and the fit of these costs
to times of real plans, by least squares."""

from __future__ import annotations

import heapq
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
    return {name: float(amount.sum()) for name, amount in tile_features(plan, shape).items()}


def tile_features(plan: BlockPlan, shape: BlockShape) -> dict[str, torch.Tensor]:
    """`features` of every row of the lists, float64 [variants * tiles]."""
    full, partial = plan.full, plan.partial
    n_full, n_partial = full.offset.diff().double(), partial.offset.diff().double()

    def total(rows: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(n_full).index_add_(0, rows, values.double())

    once = torch.ones_like(n_full)
    if shape.padded:
        block = plan.block_q * plan.block_k
        return {
            "pairs": block * (n_full + n_partial),
            "partial": block * n_partial,
            "ragged": block * total(full.rows, full.count < plan.block_k),
            "tile": once,
        }
    keys, masked = total(full.rows, full.count), total(partial.rows, partial.count)
    queries = plan.q_count.double().repeat(plan.variants)
    return {
        "pairs": queries * (keys + masked),
        "partial": queries * masked,
        "gather": keys + masked,
        "entry": n_full + n_partial,
        "tile": once,
    }


def row_costs(plan: BlockPlan, shape: BlockShape) -> torch.Tensor:
    """What every row of the lists costs, in pairs: float64 [variants * tiles]."""
    amounts = tile_features(plan, shape)
    return sum(
        (getattr(shape, n) * x for n, x in amounts.items() if n != "pairs"), amounts["pairs"]
    )


def busiest(costs: torch.Tensor, workers: int) -> float:
    """The load of the busiest of `workers`, when each item goes to the least loaded one, those above twice
    the mean first: as the Hopper kernel deals its tiles. costs: [n]."""
    heavy = torch.where(costs > 2 * costs.mean(), costs, 0)
    items = costs[heavy.argsort(descending=True, stable=True)].tolist()
    loads = [0.0] * min(workers, len(items))
    for cost in items:
        heapq.heapreplace(loads, loads[0] + cost)
    return max(loads, default=0.0)


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
    seen = {n for f, _ in samples for n in f if f[n]}
    costs_of_pair = {
        n: _rounded(found.get(n, 0.0) / found["pairs"]) if n in seen else getattr(prior, n)
        for n in known
    }
    return replace(shape, **costs_of_pair), 1 / found["pairs"], error


def _rounded(value: float) -> float:
    """Two digits: more would be noise, and a table is read by people."""
    return float(f"{value:.2g}")

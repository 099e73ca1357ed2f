"""Measured rows of assets/bench against the cost model: what it was fitted to, and how far off it is.

A row says in its note which blocks and which tile it ran, and at which clock of the SMs; the plan is built
again from these. Kernels alone: rows with the prologue in them ("all in") are left out.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from ..bench.block_lists import band_of, block_list
from ..bench.cases import BASELINE, Case, gpu_shapes
from ..bench.engine_cases import LISTS, WORKS, Work
from ..cost_model import busiest, features, fit, row_costs
from ..kernels.order import Order
from ..kernels.plan import BlockPlan, Dense, TokenLayout, plan_attention
from ..kernels.plan.tiles import BlockShape
from .gpus import CUDNN, Gpu

_BLOCKS = re.compile(r"blocks (?P<q>\d+)x(?P<k>\d+)")
_TILE = re.compile(r"tile (?P<tile>\d+(?:x\d+)*)(?: in (?P<sub>\d+(?:x\d+)*))?")
_CLOCK = re.compile(r"SM (?P<mhz>\d+) MHz")
_FORMATS = {"bf16": "model", "dense": "model", "gna": "model", "": "model"}  # by a row's recipe


Group = tuple[str, str, str, int]  # commit, implementation, precision, head dim


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """One row. plan: None for cuDNN, which has pairs alone. mhz: 0 where the row does not say."""

    case: str
    impl: str
    precision: str
    head_dim: int
    calls: int
    ms: float
    mhz: float
    commit: str
    pairs: float
    plan: BlockPlan | None = None

    @property
    def group(self) -> Group:
        return self.commit, self.impl, self.precision, self.head_dim

    def clocks(self, gpu: Gpu) -> float:
        return self.ms * 1e3 * (self.mhz or gpu.mhz)

    def shape_of(self, shapes: Iterable[BlockShape]) -> BlockShape | None:
        """The one of `shapes` that this row ran, if any."""
        assert self.plan is not None
        sides = (self.plan.block_q, self.plan.block_k)
        return next((s for s in shapes if (s.block_q, s.block_k) == sides), None)

    def load(self, shape: BlockShape, gpu: Gpu) -> float:
        """Of the busiest SM, in pairs."""
        if self.plan is None:
            return self.pairs / gpu.sms
        return busiest(row_costs(self.plan, shape).repeat(self.calls), gpu.sms)


def read(path: Path, impls: Iterable[str] = ("gluon_sm90", "triton", BASELINE)) -> list[Measured]:
    """The timed rows of a CSV of the attention or the engine suite whose plan is known, in their order."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["ms"]]
    found = []
    for row in rows:
        kind = _known().get(row["case"])
        if kind is None or "all in" in row["recipe"]:
            continue
        if row["impl"] not in (*impls, LISTS) or row["case"].startswith("ViT"):
            continue
        clock = _CLOCK.search(row["note"])
        shared = {
            "case": row["case"], "ms": float(row["ms"]), "commit": row["commit"],
            "mhz": float(clock["mhz"]) if clock else 0.0, "head_dim": kind.head_dim,
            "calls": kind.batch * kind.heads, "precision": _FORMATS.get(row["recipe"], row["recipe"]),
        }  # fmt: skip
        tokens = kind.layout.length if isinstance(kind, Case) else kind.tokens
        pairs = float(kind.batch * kind.heads * tokens**2)
        if row["impl"] == BASELINE:
            found.append(Measured(impl=CUDNN, pairs=pairs, **shared))
            continue
        plan = _plan(row["case"], row["impl"], row["note"], row["density"])
        impl = "gluon_sm90" if row["impl"] == LISTS else row["impl"]
        found.append(Measured(impl=impl, pairs=pairs * plan.density, plan=plan, **shared))
    return found


@lru_cache(maxsize=1)
def _known() -> dict[str, Case | Work]:
    cases = [case for shape in gpu_shapes().values() for case in shape]
    return {case.name: case for case in cases} | {work.name: work for work in WORKS}


@lru_cache(maxsize=64)
def _plan(name: str, impl: str, note: str, density: str) -> BlockPlan:
    kind, blocks, tile = _known()[name], _BLOCKS.search(note), _TILE.search(note)
    if blocks is None:
        raise ValueError(f"The row {name!r} of {impl} does not say its blocks: {note!r}.")
    block_q, block_k = int(blocks["q"]), int(blocks["k"])
    if isinstance(kind, Work) and (impl == LISTS or not kind.rule):
        keys = band_of(float(density)) if impl == LISTS else kind.keys
        return block_list(kind.tokens, kind.tokens, block_q, keys)
    if isinstance(kind, Work):
        layout, spec = TokenLayout.joint(grids=[kind.grid]), kind.rule
    else:
        layout, spec = kind.layout, kind.spec
    assert spec is not None
    order = None
    if tile is not None:
        order = Order(kind="tiled", tile=_sizes(tile["tile"]), subtile=_sizes(tile["sub"]))
    shape = BlockShape(block_q=block_q, block_k=block_k, padded=True)
    order = Order(kind="row") if isinstance(spec, Dense) else order
    return plan_attention(layout, spec, order=order, shape=shape).blocks


def _sizes(text: str | None) -> tuple[int, ...] | None:
    return tuple(map(int, text.split("x"))) if text else None


_CUDNN = BlockShape(block_q=1, block_k=1, padded=True)


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Fitted to rows of one implementation, precision and head dim: shapes, their speeds relative to the fastest,
    and its rate in pairs per clock and SM."""

    shapes: tuple[BlockShape, ...]
    rate: float

    def ms(self, row: Measured, gpu: Gpu) -> float | None:
        """None where no row of that block shape was fitted."""
        shape = row.shape_of(self.shapes) if row.plan else _CUDNN
        if shape is None:
            return None
        return row.load(shape, gpu) / (shape.speed * self.rate * (row.mhz or gpu.mhz) * 1e3)


def fit_rows(rows: list[Measured], gpu: Gpu, prior: tuple[BlockShape, ...]) -> Fit:
    """Costs and rate from rows of one implementation. prior: what stands where the rows do not decide."""
    fitted = []
    for shape in prior:
        own = [row for row in rows if row.shape_of(prior) == shape]
        if not own:
            continue
        samples = [(_busy(row, shape, gpu), row.clocks(gpu)) for row in own]
        found, speed, _ = fit(samples, shape, shape)
        fitted.append((found, speed))
    best = max(speed for _, speed in fitted)
    return Fit(shapes=tuple(replace(s, speed=v / best) for s, v in fitted), rate=best)


@lru_cache(maxsize=256)
def _busy(row: Measured, shape: BlockShape, gpu: Gpu) -> dict[str, float]:
    """The features of an SM whose load is that of the busiest; which that is hardly depends on the costs."""
    assert row.plan is not None
    share = row.load(shape, gpu) / float(row_costs(row.plan, shape).sum())
    return {name: share * x for name, x in features(row.plan, shape).items()}


def left_out(rows: list[Measured], gpu: Gpu, prior: tuple[BlockShape, ...]) -> list[float | None]:
    """The time that a fit to all other rows predicts for each; None for the only row of its block shape."""
    found: list[float | None] = []
    for i, row in enumerate(rows):
        others = rows[:i] + rows[i + 1 :]
        found.append(fit_rows(others, gpu, prior).ms(row, gpu) if others else None)
    return found


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """ms: by the constants in use. left_out: by a fit to the other rows of that kernel; None for cuDNN and where
    a row is the only one of its block shape."""

    row: Measured
    ms: float
    left_out: float | None

    @property
    def error(self) -> float:
        return self.ms / self.row.ms - 1

    @property
    def error_left_out(self) -> float | None:
        return None if self.left_out is None else self.left_out / self.row.ms - 1

    def to_dict(self) -> dict[str, str | float | None]:
        row = self.row
        return {
            "case": row.case, "impl": row.impl, "precision": row.precision, "head_dim": row.head_dim,
            "blocks": f"{row.plan.block_q}x{row.plan.block_k}" if row.plan else "", "mhz": row.mhz,
            "commit": row.commit, "ms": row.ms, "predicted_ms": self.ms, "left_out_ms": self.left_out,
        }  # fmt: skip


def predictions(rows: list[Measured], gpu: Gpu) -> list[Prediction]:
    """Of every row whose kernel, precision, head dim and block shape the GPU's constants know, in their order."""
    found: dict[int, Prediction] = {}
    for (_, impl, precision, head_dim), own in _groups(rows, gpu).items():
        shapes = gpu.shapes(impl, precision, head_dim)
        stored = Fit(shapes=shapes, rate=gpu.rate(impl, precision, head_dim))
        out = left_out(own, gpu, shapes) if own[0].plan else [None] * len(own)
        for row, other in zip(own, out, strict=True):
            ms = stored.ms(row, gpu)
            assert ms is not None
            found[id(row)] = Prediction(row=row, ms=ms, left_out=other)
    return [found[id(row)] for row in rows if id(row) in found]


def fits(rows: list[Measured], gpu: Gpu) -> dict[Group, Fit]:
    """What the rows of every kernel say of its costs; the constants in use stand where they do not decide."""
    groups = {g: own for g, own in _groups(rows, gpu).items() if own[0].plan is not None}
    return {g: fit_rows(own, gpu, gpu.shapes(*g[1:])) for g, own in groups.items()}


def _groups(rows: list[Measured], gpu: Gpu) -> dict[Group, list[Measured]]:
    """Rows of one commit and kernel, of the block shapes that the GPU's constants know."""
    groups: dict[Group, list[Measured]] = {}
    for row in rows:
        if row.plan is None or row.shape_of(gpu.shapes(*row.group[1:])):
            groups.setdefault(row.group, []).append(row)
    return groups

"""What a neighborhood costs on a GPU before it runs: tiles, the bounds that they set, and the time.

The GNA paper (arXiv 2504.16922, appendix B.1) bounds a speed-up by tiles: every query tile runs at the speed of
the one that visits most. `box_tiles` counts as it does, for tiles of any size; `simulate` takes the tiles of the
planner and adds what blocks under a mask, short blocks and the ends of tiles cost (`cost_model`), and how evenly
the tiles can be dealt to the multiprocessors.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache
from math import prod
from typing import Any

import torch

from ..cost_model import busiest, row_costs
from ..kernels.order import Order
from ..kernels.plan import (
    AttentionPlan,
    BlockPlan,
    Dense,
    Neighborhood,
    TokenLayout,
    plan_attention,
)
from ..kernels.plan.neighborhood import NeighborhoodOnGrid
from ..kernels.plan.planner import choose_order
from ..kernels.plan.tile_counts import axis_counts, axis_rules
from ..kernels.plan.tiles import BlockShape
from .gpus import CUDNN, H200, Gpu


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One attention call: a grid with text before it, and where and how it runs.

    mhz: the clock of the SMs; None takes what long kernels hold on that GPU.
    """

    grid: tuple[int, ...]
    text: int = 0
    heads: int = 24
    head_dim: int = 128
    batch: int = 1
    impl: str = "gluon_sm90"
    precision: str = "model"
    gpu: Gpu = H200
    mhz: float | None = None

    @property
    def layout(self) -> TokenLayout:
        return TokenLayout.joint(text=self.text, grids=[self.grid])

    @property
    def calls(self) -> int:
        return self.batch * self.heads

    @property
    def shapes(self) -> tuple[BlockShape, ...]:
        return self.gpu.shapes(self.impl, self.precision, self.head_dim)

    def ms(self, load: float, shape: BlockShape) -> float:
        """The time of the busiest SM. load: its work in pairs."""
        rate = self.gpu.rate(self.impl, self.precision, self.head_dim)
        return load / (shape.speed * rate * (self.mhz or self.gpu.mhz) * 1e3)


@dataclass(frozen=True, kw_only=True)
class TileCount:
    """Tiles of one head. keys: key tiles in all; visited, full: summed over the query tiles; most: of the
    query tile that visits most. bound: keys / most, the speed-up over dense attention that tiles allow;
    balanced: the same for the busiest SM, when tiles are dealt evenly."""

    q_tile: tuple[int, ...]
    kv_tile: tuple[int, ...]
    tiles: int
    keys: int
    visited: int
    full: int
    most: int
    balanced: float

    @property
    def partial(self) -> int:
        return self.visited - self.full

    @property
    def bound(self) -> float:
        return self.keys / self.most


def box_tiles(
    spec: NeighborhoodOnGrid, q_tile: tuple[int, ...], kv_tile: tuple[int, ...], *,
    calls: int = 1, sms: int = 1,
) -> TileCount:  # fmt: skip
    """Exact counts for independent boxes of queries and of keys, both from the corner of the grid, without text.

    Raises ValueError where a tile has other axes than the grid.
    """
    for name, tile in (("q-tile", q_tile), ("kv-tile", kv_tile)):
        if len(tile) != len(spec.grid):
            raise ValueError(f"The {name} {tile} has other axes than the grid {spec.grid}.")
    axes = [axis_counts(*each) for each in zip(axis_rules(spec), q_tile, kv_tile, strict=True)]
    visited = _outer([a.visited for a in axes])
    classes = prod(spec.dilation)
    keys = prod(-(-n // (d * t)) for n, d, t in zip(spec.grid, spec.dilation, kv_tile, strict=True))
    return TileCount(
        q_tile=q_tile, kv_tile=kv_tile, tiles=classes * len(visited), keys=classes * keys,
        visited=classes * int(visited.sum()), full=classes * int(_outer([a.full for a in axes]).sum()),
        most=int(visited.max()), balanced=_balanced(visited.repeat(classes * calls), classes * keys, sms),
    )  # fmt: skip


def plan_tiles(made: AttentionPlan, text: int, *, calls: int, sms: int) -> TileCount:
    """The same for a plan as it runs: tiles as long as they are, query tiles of text left out of the bound."""
    blocks = made.blocks
    full, entries = (
        blocks.full.offset.diff(),
        blocks.full.offset.diff() + blocks.partial.offset.diff(),
    )
    keys = int(torch.cat([blocks.full.start, blocks.partial.start]).unique().numel())
    of_grid = entries[blocks.q_start >= text]
    return TileCount(
        q_tile=_tile_of(made, blocks.block_q), kv_tile=_tile_of(made, blocks.block_k, keys=True),
        tiles=blocks.tiles, keys=keys, visited=int(entries.sum()), full=int(full.sum()),
        most=int(of_grid.max()), balanced=_balanced(entries.double().repeat(calls), keys, sms),
    )  # fmt: skip


def _tile_of(made: AttentionPlan, block: int, *, keys: bool = False) -> tuple[int, ...]:
    """The box that a block of queries or keys is: a column is cut into pieces of `block` tokens."""
    order = made.order
    if order.tile is None:
        return (min(block, made.blocks.length_k),)
    if order.subtile is not None:
        return order.subtile if keys else order.tile
    return (min(-(-block // prod(order.tile[1:])), order.tile[0]), *order.tile[1:])


def _outer(axes: list[tuple[int, ...]]) -> torch.Tensor:
    """The products of one number per axis, of all combinations: float64 [product of the lengths]."""
    found = torch.ones(1, dtype=torch.float64)
    for axis in axes:
        found = (found[:, None] * torch.tensor(axis, dtype=torch.float64)).flatten()
    return found


def _balanced(entries: torch.Tensor, keys: int, sms: int) -> float:
    dense = -(-len(entries) // sms) * keys
    return dense / busiest(entries.double(), sms)


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """What a neighborhood does in a setting. ms: predicted time of the kernel; dense_ms, cudnn_ms: of dense
    attention by the same implementation and by cuDNN (in the model's 16 bits; None where it was not measured)."""

    window: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    tokens: int
    density: float
    visited_density: float
    order: Order
    tile_count: TileCount
    ms: float
    dense_ms: float
    cudnn_ms: float | None

    @property
    def flop_bound(self) -> float:
        return 1 / self.density

    def to_dict(self) -> dict[str, Any]:
        tiles = asdict(self.tile_count)
        del tiles["balanced"]
        return {
            "window": self.window, "stride": self.stride, "dilation": self.dilation,
            "tokens": self.tokens, "density": self.density, "visited_density": self.visited_density,
            **tiles, "partial": self.tile_count.partial, "flop_bound": self.flop_bound,
            "tile_bound": self.tile_count.bound, "balanced_bound": self.tile_count.balanced,
            "ms": self.ms, "dense_ms": self.dense_ms, "cudnn_ms": self.cudnn_ms,
            "speedup": self.dense_ms / self.ms,
            "speedup_cudnn": None if self.cudnn_ms is None else self.cudnn_ms / self.ms,
        }  # fmt: skip


def simulate(spec: Neighborhood, setting: Setting) -> Simulation:
    """Raises ValueError where the neighborhood does not fit the grid or no speed is known."""
    rule = spec.resolve(setting.grid)
    made, shape = planned(spec, setting)
    blocks, sms = made.blocks, setting.gpu.sms
    return Simulation(
        window=rule.window, stride=rule.stride, dilation=rule.dilation, tokens=blocks.length_k,
        density=blocks.density, visited_density=blocks.visited_density, order=made.order,
        tile_count=plan_tiles(made, setting.text, calls=setting.calls, sms=sms),
        ms=predicted_ms(blocks, shape, setting), dense_ms=dense_ms(setting), cudnn_ms=cudnn_ms(setting),
    )  # fmt: skip


def planned(spec: Neighborhood | Dense, setting: Setting) -> tuple[AttentionPlan, BlockShape]:
    """The plan as the planner makes it for that GPU, and the shape of its blocks."""
    order, shape = choose_order(setting.layout, spec, Order(), setting.shapes)
    return plan_attention(setting.layout, spec, order=order, shape=shape), shape


def predicted_ms(blocks: BlockPlan, shape: BlockShape, setting: Setting) -> float:
    costs = row_costs(blocks, shape).repeat(setting.calls)
    return setting.ms(busiest(costs, setting.gpu.sms), shape)


@lru_cache(maxsize=64)
def _dense_load(length: int, shape: BlockShape, calls: int, sms: int) -> float:
    entries, tiles = -(-length // shape.block_k), -(-length // shape.block_q)
    if not shape.padded:
        raise ValueError("The simulator knows implementations that multiply whole blocks.")
    return -(-tiles * calls // sms) * (entries * shape.block_q * shape.block_k + shape.tile)


def dense_ms(setting: Setting) -> float:
    """Of dense attention by the same implementation, in its first shape, as the planner takes it."""
    shape = setting.shapes[0]
    length = setting.layout.length
    return setting.ms(_dense_load(length, shape, setting.calls, setting.gpu.sms), shape)


def cudnn_ms(setting: Setting) -> float | None:
    try:
        rate = setting.gpu.rate(CUDNN, "model", setting.head_dim)
    except ValueError:
        return None
    pairs = setting.calls * setting.layout.length**2
    return pairs / (setting.gpu.sms * rate * (setting.mhz or setting.gpu.mhz) * 1e3)

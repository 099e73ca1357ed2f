"""What the explorer shows of a plan: the keys of a token, its blocks, all blocks, and the predicted time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, reduce
from math import ceil, sqrt

import numpy as np
import torch
from PIL import Image, ImageDraw

from visionfuse.kernels.order import Order
from visionfuse.kernels.plan import AttentionPlan, Neighborhood, TokenLayout, plan_attention
from visionfuse.kernels.plan.neighborhood import NeighborhoodOnGrid
from visionfuse.kernels.plan.planner import choose_order
from visionfuse.kernels.plan.tiles import BlockShape
from visionfuse.simulate import GPUS, H200, Gpu, Setting
from visionfuse.simulate.gpus import CUDNN, MEASURED
from visionfuse.simulate.model import cudnn_ms, dense_ms, predicted_ms

# Told apart by lightness too, for those who see colours differently.
UNSEEN, VISITED, VISIBLE = (232, 235, 240), (170, 200, 238), (31, 92, 168)
OWN, OWN_SEEN, TOKEN = (250, 200, 110), (205, 120, 15), (190, 20, 20)
NONE, PARTIAL, FULL = UNSEEN, (245, 160, 60), VISIBLE
GAP = (255, 255, 255)
SIDE = 512  # pixels of a picture, about
HEAD_DIM = 128


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A neighborhood on a grid, behind text tokens, in an order."""

    grid: tuple[int, ...]
    spec: Neighborhood
    order: Order = Order()  # noqa: RUF009  frozen
    text: int = 0

    @property
    def rule(self) -> NeighborhoodOnGrid:
        return self.spec.resolve(self.grid)


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Predicted, in milliseconds. cudnn: PyTorch's dense attention in 16 bits, where its speed is known."""

    gpu: Gpu
    impl: str
    precision: str
    ms: float
    dense: float
    cudnn: float | None


def plan(asked: Asked) -> AttentionPlan:
    """As the fastest kernel of the first GPU runs it."""
    return _planned(asked, H200.shapes(H200.impl, "model", HEAD_DIM))[0]


@lru_cache(maxsize=32)
def _planned(
    asked: Asked, shapes: tuple[BlockShape, ...]
) -> tuple[AttentionPlan, BlockShape]:  # fmt: skip
    layout = TokenLayout.joint(text=asked.text, grids=[asked.grid])
    order, shape = choose_order(layout, asked.spec, asked.order, shapes)
    return plan_attention(layout, asked.spec, order=order, shape=shape), shape


def speeds(asked: Asked) -> list[Speed]:
    """On every GPU whose speed is known, for 24 heads of 128 channels (those of FLUX.1)."""
    found = []
    for gpu in GPUS:
        for impl, precision in _kinds(gpu):
            setting = Setting(
                grid=asked.grid, text=asked.text, impl=impl, precision=precision, gpu=gpu
            )
            made, shape = _planned(asked, setting.shapes)
            found.append(
                Speed(gpu=gpu, impl=impl, precision=precision, ms=predicted_ms(made.blocks, shape, setting),
                      dense=dense_ms(setting), cudnn=cudnn_ms(setting))
            )  # fmt: skip
    return found


def _kinds(gpu: Gpu) -> list[tuple[str, str]]:
    """(implementation, precision) of what is known; of what is derived the fastest implementation alone."""
    return [
        (impl, precision)
        for impl, precision, head_dim in gpu.rates
        if head_dim == HEAD_DIM and impl != CUDNN and (gpu.basis == MEASURED or impl == gpu.impl)
    ]


# -- the tokens of the grid ---------------------------------------------------------------------------


def visible(rule: NeighborhoodOnGrid, token: tuple[int, ...]) -> np.ndarray:
    """The keys of the grid that a query sees: bool [*grid]."""
    axes = []
    for axis, (n, c, d) in enumerate(zip(rule.grid, token, rule.dilation, strict=True)):
        start, end = (int(bound[c]) for bound in rule.axis_bounds(axis))
        j = np.arange(n)
        axes.append((j % d == c % d) & (start <= j // d) & (j // d < end))
    return reduce(np.logical_and.outer, axes)


def tile_of(made: AttentionPlan, index: int) -> int:
    """The tile of queries in which a token of the sequence lies."""
    position = index if made.inverse is None else int(made.inverse[index])
    blocks = made.blocks
    inside = (blocks.q_start <= position) & (position < blocks.q_start + blocks.q_count)
    return int(inside.nonzero()[0])


def of_tile(made: AttentionPlan, tile: int) -> tuple[np.ndarray, np.ndarray]:
    """Which tokens of the sequence a tile consists of, and which it visits: bool [tokens] each."""
    blocks = made.blocks
    own = np.zeros(blocks.length_q, bool)
    own[_tokens(made, int(blocks.q_start[tile]), int(blocks.q_count[tile]))] = True
    visited = np.zeros(blocks.length_k, bool)
    for entries in (blocks.full, blocks.partial):
        first, last = entries.offset[tile : tile + 2].tolist()
        for start, count in zip(
            entries.start[first:last].tolist(), entries.count[first:last].tolist(), strict=True
        ):
            visited[_tokens(made, start, count)] = True
    return own, visited


def _tokens(made: AttentionPlan, start: int, count: int) -> np.ndarray:
    line = torch.arange(start, start + count)
    return (line if made.permutation is None else made.permutation[line]).numpy()


def picture_of_token(asked: Asked, token: tuple[int, ...]) -> Image.Image:
    """The grid (frames side by side): what the token sees, what its tile visits, its tile, and the token."""
    made = plan(asked)
    flat = int(np.ravel_multi_index(token, asked.grid))
    own, visited = (
        part[asked.text :].reshape(asked.grid) for part in of_tile(made, tile_of(made, asked.text + flat))
    )  # fmt: skip
    colors = np.empty((*asked.grid, 3), np.uint8)
    colors[:] = UNSEEN
    colors[visited] = VISITED
    seen = visible(asked.rule, token)
    colors[seen] = VISIBLE
    colors[own] = OWN
    colors[own & seen] = OWN_SEEN
    colors[token] = TOKEN
    sheet = Sheet(asked.grid)
    image = sheet.draw(colors)
    left, top = (sheet.cell * c for c in sheet.place(token))
    more = max(3, sheet.cell)
    box = (left - more, top - more, left + sheet.cell - 1 + more, top + sheet.cell - 1 + more)
    ImageDraw.Draw(image).ellipse(box, outline=TOKEN, width=2)
    return image


class Sheet:
    """Frames of a grid in rows and columns. cell: pixels of a token."""

    def __init__(self, grid: tuple[int, ...]) -> None:
        self.frames, self.rows, self.columns = (1,) * (3 - len(grid)) + tuple(grid)
        self.across = min(self.frames, max(1, round(sqrt(self.frames * self.rows / self.columns))))
        self.down = ceil(self.frames / self.across)
        self.gap = 1 if self.frames > 1 else 0
        width = self.across * (self.columns + self.gap)
        self.cell = max(1, round(SIDE / max(width, self.down * (self.rows + self.gap))))

    def place(self, token: tuple[int, ...]) -> tuple[int, int]:
        """Column and row of a token on the sheet, in cells."""
        frame, row, column = (0,) * (3 - len(token)) + tuple(token)
        down, across = divmod(frame, self.across)
        return across * (self.columns + self.gap) + column, down * (self.rows + self.gap) + row

    def token(self, x: int, y: int) -> tuple[int, ...] | None:
        """The token at a pixel, as (frame, row, column); None between frames."""
        across, column = divmod(x // self.cell, self.columns + self.gap)
        down, row = divmod(y // self.cell, self.rows + self.gap)
        frame = down * self.across + across
        inside = column < self.columns and row < self.rows and frame < self.frames
        return (frame, row, column) if inside else None

    def draw(self, colors: np.ndarray) -> Image.Image:
        """colors: uint8 [*grid, 3]."""
        frames = colors.reshape(self.frames, self.rows, self.columns, 3)
        size = (self.down * (self.rows + self.gap), self.across * (self.columns + self.gap), 3)
        sheet = np.full(size, GAP, np.uint8)
        for number, frame in enumerate(frames):
            x, y = self.place((number, 0, 0))
            sheet[y : y + self.rows, x : x + self.columns] = frame
        return _enlarged(sheet, self.cell)


# -- the blocks ---------------------------------------------------------------------------------------


def picture_of_blocks(made: AttentionPlan) -> Image.Image:
    """A row for every tile of queries, a column for every run of keys: visited without a mask, with one, or not."""
    blocks = made.blocks
    keys = torch.cat([blocks.full.start, blocks.partial.start]).unique()
    colors = np.empty((blocks.tiles, keys.numel(), 3), np.uint8)
    colors[:] = NONE
    for entries, color in ((blocks.partial, PARTIAL), (blocks.full, FULL)):
        colors[
            (entries.rows % blocks.tiles).numpy(), torch.searchsorted(keys, entries.start).numpy()
        ] = color
    return _enlarged(colors, max(1, round(SIDE / max(colors.shape[:2]))))


def _enlarged(colors: np.ndarray, cell: int) -> Image.Image:
    return Image.fromarray(colors.repeat(cell, 0).repeat(cell, 1))

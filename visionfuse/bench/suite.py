"""What a suite of measurements is made of: works, the candidates that are compared on each, and what is measured otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from ..kernels.plan.neighborhood import Neighborhood
from .block_lists import all_keys
from .cases import BASELINE
from .table import Row


@dataclass(frozen=True, kw_only=True)
class Work:
    """One attention call and how it is computed. key: for --only. length: tokens, of no grid.

    keys: a rule on block numbers. rule: a window on a grid, instead. share: what a speed-up of a window is
    a ratio of, per second: "visible" pairs, or pairs of visited "tiles", each counted as a whole block.
    recipes: "bf16", "fp8", "int8_fp8" are kernels alone; with ", all in" the time goes from bf16 q, k, v to
    bf16 out. portable: recipes of the Triton kernel.
    """

    key: str
    name: str
    heads: int
    head_dim: int
    recipes: tuple[str, ...]
    length: int = 0
    batch: int = 1
    keys: Callable = all_keys
    rule: Neighborhood | None = None
    grid: tuple[int, ...] = ()
    share: str = "visible"
    portable: tuple[str, ...] = ()
    impl: str = "gluon_sm90"

    @property
    def tokens(self) -> int:
        return prod(self.grid) if self.rule else self.length

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.tokens, self.heads, self.head_dim


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """call() -> (B, S, H, D); `inverse` brings its tokens back into the model's order.

    visible: the keys that queries see, None: all. visited: share of all pairs in visited blocks.
    baseline: the name of the candidate that it is compared with; work: what is done, in the unit of the
    comparison, so that its speed-up is work / time over that of the baseline.
    """

    impl: str
    recipe: str
    call: Callable[[], Tensor]
    reasons: list[str]
    note: str
    visible: Callable[[Tensor], Tensor] | None = None
    density: float = 1.0
    visited: float = 1.0
    baseline: str = BASELINE
    work: float = 1.0
    inverse: Tensor | None = None

    @property
    def name(self) -> str:
        return f"{self.impl}, {self.recipe}" if self.recipe else self.impl


@dataclass(frozen=True, kw_only=True)
class Suite:
    """make: a work, q, k, v (B, S, H, D) -> the baseline first, then what is compared with it. tiny: a second of
    works where there is no GPU. more: by key, rows that are measured in another way, in about so many seconds a
    candidate; on a GPU only.
    """

    name: str
    works: tuple[Work, ...]
    tiny: tuple[Work, ...]
    make: Callable[[Work, Tensor, Tensor, Tensor], Iterator[Candidate]]
    more: dict[str, Callable[[torch.device, float], list[Row]]] = field(default_factory=dict)

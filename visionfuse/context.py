"""What routed attention cannot see from q, k and v, and the lock that keeps it consistent.

`ACTIVE` is one plain object of the module, because compiled graphs guard on it and read its tensors
as inputs: a plan of another resolution or another step reaches a graph without a new graph. What a
variant of a recipe runs stands at the same place during a whole run, so that a layer is compiled
once for every variant it meets, and once for the model's own attention.

One process runs one accelerated pipeline call at a time: the wrapper of `__call__` holds `LOCK`, so
calls from several threads queue up. A pipeline that is not accelerated is not slowed down by that,
but must not share its transformer (`from_pipe`) with an accelerated call in another thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from .kernels.plan import BlockPlan


class Routed(NamedTuple):
    """What one variant of a recipe runs in this forward.

    plans: one for each token layout that attends in the forward (a UNet has several resolutions), in the
        order in which the tokens lie; of them the first that fits a call.
    impl: the attention implementation the plans were made for.
    precision: the canonical name of the formats it runs in.
    dense: whether every query sees every key.
    """

    plans: tuple[BlockPlan, ...]
    impl: str = "auto"
    precision: str = "model"
    dense: bool = False


class Active:
    """The forward that runs now.

    variants: what the variants of the recipe run, in its order; None: the model's own attention. Empty
        where nothing is routed.
    masked: the plans hide what an attention mask of the call would hide.
    permutation: int64 [S], position -> model index, if the sequence was permuted.
    rope: rotary tables in the order of the tokens, for models that would compute their own.
    streams: tokens of the parts of the sequence that several GPUs split each by itself; empty on one GPU.
    ring: how many GPUs have a part of the queries each, with keys of all.
    keys: called with (k, v) of every routed call that follows a plan, (B, S, H, D) each; returns what it attends to.
        The guidance of Scale-DiT keeps its own there and adds them; eager only.
    probe: called with (q, k, v, out, scale, masked) of every routed call, (B, S, H, D) each, after the
        model's own attention; for calibration, eager only.
    notes: reasons why a routed call went to the model's own attention after all.
    """

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        self.variants: tuple[Routed | None, ...] = ()
        self.masked: bool = False
        self.permutation: Tensor | None = None
        self.rope: tuple[Tensor, ...] | None = None
        self.streams: tuple[int, ...] = ()
        self.ring: int = 1
        self.keys: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
        self.probe: Callable[..., None] | None = None
        self.notes: dict[str, int] = {}


ACTIVE = Active()
LOCK = threading.RLock()

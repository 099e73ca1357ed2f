"""What the attention backend cannot see from q, k and v, and the lock that keeps it consistent.

`ACTIVE` is one plain object of the module, because compiled graphs guard on it and read its tensors
as inputs: a plan of another resolution or another step reaches a graph without a new graph, and the
only recompilation is between "no plan" and "a plan".

One process runs one accelerated pipeline call at a time: the wrapper of `__call__` holds `LOCK`, so
calls from several threads queue up. A pipeline that is not accelerated is not slowed down by that,
but must not share its transformer (`from_pipe`) with an accelerated call in another thread.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from .kernels.plan import BlockPlan


class Active:
    """The forward that runs now.

    plan: of the routed layers, in the order in which the tokens lie; None: nothing is routed.
    impl: the attention implementation that `plan` was made for.
    precision: the canonical name of the formats it runs in.
    permutation: int64 [S], position -> model index, if the sequence was permuted.
    rope: rotary tables in the order of the tokens, for models that would compute their own.
    own_backend: the diffusers backend that the model's own attention would use.
    notes: reasons why a routed call went to the model's own attention after all.
    """

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        self.plan: BlockPlan | None = None
        self.impl: str = "auto"
        self.precision: str = "model"
        self.permutation: Tensor | None = None
        self.rope: tuple[Tensor, ...] | None = None
        self.own_backend: Any = None
        self.notes: dict[str, int] = {}


ACTIVE = Active()
LOCK = threading.RLock()

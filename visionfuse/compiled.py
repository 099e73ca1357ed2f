"""Regional torch.compile of a denoiser that falls back to eager blocks, and is undone exactly.

The blocks that diffusers names as repeated are compiled, each class once. A class needs a graph for the model's
own attention and one for every variant of the recipe, and each once more when a second size comes: at most 4 for
a schedule of two phases.

A block that cannot be compiled, or fails in its graph, runs once more without it, and if it must with its own
weights: nothing of the run is lost. Inductor keeps what it compiled on disk (TORCHINDUCTOR_CACHE_DIR), so that
the next process starts faster.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .linears import Rounded
from .sites import Denoiser

# Dynamo counts graphs by the code of `nn.Module._call_impl`, which all classes of blocks share; 8 are too few for
# two classes, two phases, two sizes and anything else.
MOST_GRAPHS = 64
# For products of INT8, whose sums have 32 bits: scaled before they are written. torchao would set it for everybody.
INT8_OPTIONS = {"force_fuse_int_mm_with_mul": True}
LONGEST_REASON = 200  # characters of a failure's message; dynamo writes pages


def room_for_graphs() -> AbstractContextManager[Any]:
    """Dynamo's limit of graphs is `MOST_GRAPHS` inside."""
    from torch._dynamo import config

    return config.patch(recompile_limit=MOST_GRAPHS)


class Compiled:
    """The compiled blocks of one denoiser. rounded: its 8-bit layers, if any. notes: why blocks run eagerly after
    all, if so."""

    def __init__(self, rounded: Rounded | None = None):
        self.blocks: list[nn.Module] = []
        self.rounded = rounded
        self.notes: Counter[str] = Counter()

    def undo(self) -> None:
        for block in self.blocks:
            vars(block).pop("_compiled_call_impl", None)  # the class has None
        self.blocks = []

    def lines(self) -> list[str]:
        """For the report."""
        out = []
        if self.blocks:
            kinds = Counter(type(block).__name__ for block in self.blocks)
            blocks = ", ".join(f"{count} {name}" for name, count in kinds.items())
            out.append(f"{blocks}, each class once")
        return out + [f"{reason} ({count}x)" for reason, count in self.notes.items()]


def compile_blocks(
    denoiser: Denoiser, options: dict[str, Any], rounded: Rounded | None = None
) -> Compiled:
    """Compile the repeated blocks with `options` of torch.compile. A model that its owner compiled, and one whose
    blocks diffusers does not name, stay as they are, with a note."""
    model, outer = denoiser.model, denoiser.outer
    made = Compiled(rounded)
    if outer is not model or any(
        getattr(module, "_compiled_call_impl", None) is not None for module in model.modules()
    ):
        made.notes["the model, or a part of it, is compiled already"] += 1
        return made
    if not getattr(model, "_repeated_blocks", None):
        made.notes[f"diffusers names no repeated blocks of {type(model).__name__}"] += 1
        return made
    if rounded is not None and rounded.linears.format == "int8" and not options:
        options = {"options": INT8_OPTIONS}
    model.compile_repeated_blocks(**options)
    made.blocks = [m for m in model.modules() if m._compiled_call_impl is not None]
    for block in made.blocks:
        compiled = block._compiled_call_impl
        assert compiled is not None
        block._compiled_call_impl = _with_fallback(made, block, compiled)
    return made


def _with_fallback(made: Compiled, block: nn.Module, compiled: Callable[..., Any]) -> Callable:
    """The compiled call of a block, or its own where that fails, or its own with its own weights."""

    def call(*args, **kwargs):
        try:
            args, kwargs = tree_map(_plain, (args, kwargs))
            return compiled(*args, **kwargs)
        except RuntimeError as failure:  # dynamo's and inductor's are of this kind, too
            out_of_memory = isinstance(failure, torch.OutOfMemoryError)
            reason = f"{type(failure).__name__}: {' '.join(str(failure).split())[:LONGEST_REASON]}"
        # Outside of the handler, whose traceback would keep the tensors of the failed run alive.
        if out_of_memory:
            torch.cuda.empty_cache()
        else:  # it would fail again in every block of this class
            for same in made.blocks:
                if type(same) is type(block):
                    vars(same).pop("_compiled_call_impl", None)
        if reason not in made.notes:
            warnings.warn(
                f"A compiled {type(block).__name__} failed and runs eagerly: {reason}", stacklevel=2
            )
        made.notes[reason] += 1
        try:
            return block._call_impl(*args, **kwargs)
        except RuntimeError:
            if made.rounded is None or not made.rounded.undo_inside(block):
                raise
        return block._call_impl(*args, **kwargs)

    return call


def _plain(value: Any) -> Any:
    """A tensor with the strides of its shape and without a memory of what it was cut out of.

    Graphs are guarded by both, also where neither means anything: FLUX hands a view of a longer sequence to its
    blocks, and a batch of one has any stride there.
    """
    if not isinstance(value, Tensor) or value.requires_grad or not value.is_contiguous():
        return value
    return value.view(-1).view(value.shape).detach()

"""Regional torch.compile of a denoiser that falls back to eager blocks, and is undone exactly.

The blocks that diffusers names as repeated are compiled, each class once. A class needs a graph for the model's
own attention and one for every variant of the recipe, and each once more when a second size comes: at most 4 for
a schedule of two phases.

A block that cannot be compiled, or fails in its graph, runs once more without it, and if it must with its own
weights: nothing of the run is lost. Inductor keeps what it compiled on disk (TORCHINDUCTOR_CACHE_DIR), so that
the next process starts faster.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.proxy import GraphAppendingTracer
from torch.utils._pytree import tree_map

from .captured import Captured
from .linears import Rounded
from .sites import Denoiser

# Dynamo counts graphs by the code of `nn.Module._call_impl`, which all classes of blocks share; 8 are too few for
# two classes, two phases, two sizes and anything else.
MOST_GRAPHS = 64
# For products of INT8, whose sums have 32 bits: scaled before they are written. torchao would set it for everybody.
INT8_OPTIONS = {"force_fuse_int_mm_with_mul": True}
GELU = 2 * (2 / math.pi) ** 0.5, 0.044715  # its tanh form is x sigmoid(a (x + b x^3))
LONGEST_REASON = 200  # characters of a failure's message; dynamo writes pages
# Modes of torch.compile that make no CUDA graphs themselves.
WITHOUT_GRAPHS = (None, "default", "max-autotune-no-cudagraphs")


def room_for_graphs() -> AbstractContextManager[Any]:
    """Dynamo's limit of graphs is `MOST_GRAPHS` inside."""
    from torch._dynamo import config

    return config.patch(recompile_limit=MOST_GRAPHS)


class Compiled:
    """The compiled blocks of one denoiser. rounded: its 8-bit layers, if any. captured: its CUDA graphs, if they may
    be. notes: why blocks run eagerly after all, if so."""

    def __init__(self, rounded: Rounded | None = None):
        self.blocks: list[nn.Module] = []
        self.rounded = rounded
        self.captured: Captured | None = None
        self.notes: Counter[str] = Counter()

    def during_call(self) -> AbstractContextManager[None]:
        """Around a call of the pipeline."""
        return nullcontext() if self.captured is None else self.captured.during_call()

    def undo(self) -> None:
        if self.captured is not None:
            self.captured.undo()
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
        if self.captured is not None:
            out += self.captured.lines()
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
    model.compile_repeated_blocks(**(options or _inductor_options(rounded)))
    made.blocks = [m for m in model.modules() if m._compiled_call_impl is not None]
    for block in made.blocks:
        compiled = block._compiled_call_impl
        assert compiled is not None
        block._compiled_call_impl = _with_fallback(made, block, compiled)
    if options.get("mode") in WITHOUT_GRAPHS and next(model.parameters()).is_cuda:
        made.captured = Captured(denoiser)
    return made


def _inductor_options(rounded: Rounded | None) -> dict[str, Any]:
    int8 = rounded is not None and rounded.linears.format == "int8"
    return {"options": {"pre_grad_custom_pass": short_gelu, **(INT8_OPTIONS if int8 else {})}}


def short_gelu(graph: torch.fx.Graph) -> None:
    """Write GELU's tanh form by a sigmoid, x / (1 + exp(-y)). It is the same function, of one exponential; CUDA's tanh
    is so long that it, and not memory, decides how long the activation takes, and where its output is rounded to
    8 bits it is computed twice."""
    tracer = GraphAppendingTracer(graph)
    for node in graph.find_nodes(op="call_function", target=F.gelu):
        if node.kwargs.get("approximate") == "tanh":
            with graph.inserting_before(node):
                shorter: Any = _gelu(torch.fx.Proxy(node.args[0], tracer))  # pyright: ignore[reportArgumentType]
            node.replace_all_uses_with(shorter.node)
            graph.erase_node(node)


def _gelu(x: Any) -> Any:
    """Of the place of a tensor in a graph. Inductor makes one kernel of it, float32 inside, and keeps compiled code
    on disk only for operations of PyTorch."""
    a, b = GELU
    c = a / math.log(2)
    # 11 instructions an element instead of 19 by torch.sigmoid: exp2 and rsqrt are one each, a division eight.
    root = torch.rsqrt(1 + torch.exp2(x * (-c - c * b * (x * x))))
    return x * (root * root)


def _with_fallback(made: Compiled, block: nn.Module, compiled: Callable[..., Any]) -> Callable:
    """The compiled call of a block, or its own where that fails, or its own with its own weights."""

    def call(*args, **kwargs):
        try:
            args, kwargs = tree_map(_plain, (args, kwargs))
            return compiled(*args, **kwargs)
        except RuntimeError as failure:  # dynamo's and inductor's are of this kind, too
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                raise  # nothing can run inside of a failed capture
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

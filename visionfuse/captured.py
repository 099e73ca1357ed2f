"""A forward of a compiled denoiser as one CUDA graph, where Python is slower than the GPU.

Compiled blocks still launch one kernel at a time: in 8 bits, a GPU can be done with a step of FLUX.1 at 1024x1024
before Python has issued the next. A forward that comes a second time with the same shapes, plans and scalars is
timed; where issuing it takes most of its time it is captured, and the graph stays if it is the faster one.

Tensors that a forward is called with are copied into those of the graph, its outputs are copied out. Graphs belong
to the addresses of the weights, and are dropped when these move.
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only, tree_unflatten

from .context import ACTIVE
from .sites import Denoiser

ISSUING = 0.5  # share of a forward's time from which it is worth trying
FASTER = 0.97  # a replay takes at most this share of the forward's time, or the graph goes again
MOST = 8  # graphs of a denoiser, which share their memory; the oldest goes
MOST_SEEN = 16  # kinds of forwards that are told apart


class Captured:
    """The graphs of one denoiser. notes: why there are none, if so."""

    def __init__(self, denoiser: Denoiser):
        self.model = denoiser.model
        self.layers = denoiser.site.layers(self.model)
        self.notes: Counter[str] = Counter()
        self.timed: list[str] = []
        self.undo()

    def undo(self) -> None:
        """Forget everything; the memory of the graphs is free again."""
        self.graphs: dict[Any, _Graph] = {}
        self.seen: Counter[Any] = Counter()
        self.left: set[Any] = set()  # forwards that stay as they are
        self.addresses: tuple[int, ...] = ()

    @contextmanager
    def during_call(self) -> Iterator[None]:
        """Around a call of the pipeline: the model's forward is ours."""
        if why := refusal(self.model, self.layers):
            self.notes[why] += 1
            yield
            return
        addresses = tuple(_addresses(self.model))
        if addresses != self.addresses:
            self.undo()
            self.addresses = addresses
        own = self.model.forward
        ours = functools.wraps(own)(functools.partial(self.run, own))
        self.model.forward = ours
        try:
            yield
        finally:
            if vars(self.model).get("forward") is ours:
                del self.model.forward

    def run(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The forward `own`, or its graph."""
        leaves, spec = tree_flatten((args, kwargs, ACTIVE.rope))
        key = self.key(leaves, spec)
        if key is None or key in self.left:
            return own(*args, **kwargs)
        if key in self.graphs:
            return self.graphs[key](leaves)
        self.seen[key] += 1
        if self.seen[key] != 2:  # the first time compiles and warms up
            if len(self.seen) > MOST_SEEN:
                self.seen.clear()
                self.left.clear()
            return own(*args, **kwargs)
        out, issued, whole = timed(lambda: own(*args, **kwargs))
        if issued < ISSUING * whole:
            self.left.add(key)
        else:
            self.capture(key, own, leaves, spec, whole)
        return out

    def capture(self, key: Any, own: Callable, leaves: list, spec: TreeSpec, whole: float) -> None:
        """Make the graph of a forward that takes `whole` seconds, and keep it if it is faster."""
        pool = next((graph.pool for graph in self.graphs.values()), None)
        if len(self.graphs) >= MOST:
            del self.graphs[next(iter(self.graphs))]  # the oldest
        self.left.add(key)
        try:
            graph = _Graph(own, leaves, spec, pool)
            graph(leaves)
            replayed = timed(lambda: graph(leaves))[2]
        except RuntimeError as failure:  # also out of memory
            self.notes[f"no CUDA graph: {' '.join(str(failure).split())[:200]}"] += 1
            return
        self.timed.append(
            f"a forward of {whole * 1e3:.4g} ms takes {replayed * 1e3:.4g} ms as a CUDA graph"
        )
        if replayed <= FASTER * whole:
            self.left.discard(key)
            self.graphs[key] = graph

    def key(self, leaves: list[Any], spec: TreeSpec) -> Any:
        """All that a graph depends on besides the values of its tensors; None where it depends on more."""
        if torch.is_grad_enabled() or ACTIVE.keys is not None or ACTIVE.probe is not None:
            return None
        shapes = []
        for leaf in leaves:
            if not isinstance(leaf, Tensor):
                shapes.append(leaf)
            elif not leaf.is_cuda:
                return None
            else:
                shapes.append((leaf.shape, leaf.stride(), leaf.dtype, leaf.device))
        # Plans and classes stay alive in the key, hence their ids are their own.
        plans = tuple(
            routed and (*map(_Same, routed.plans), routed.impl, routed.precision)
            for routed in ACTIVE.variants
        )
        classes = tuple(type(layer.processor) for layer in self.layers)
        mode = torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cuda")
        key = (spec, tuple(shapes), plans, _Same(ACTIVE.permutation), ACTIVE.masked, classes, mode)
        try:
            hash(key)
        except TypeError:
            return None
        return key

    def lines(self) -> list[str]:
        """For the report."""
        return self.timed + [f"{reason} ({count}x)" for reason, count in self.notes.items()]


class _Same:
    """An object that is equal to itself alone."""

    def __init__(self, value: object):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


class _Graph:
    """One captured forward, with inputs and outputs of its own."""

    def __init__(self, own: Callable[..., Any], leaves: list[Any], spec: TreeSpec, pool: Any):
        self.inputs = [x.clone() if isinstance(x, Tensor) else x for x in leaves]
        self.graph = torch.cuda.CUDAGraph()
        args, kwargs, rope = tree_unflatten(self.inputs, spec)
        given, ACTIVE.rope = ACTIVE.rope, rope
        try:
            with (
                torch.cuda.stream(torch.cuda.current_stream()),  # also after a capture that fails
                torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"),
            ):
                self.outputs = own(*args, **kwargs)
        finally:
            ACTIVE.rope = given

    @property
    def pool(self) -> Any:
        return self.graph.pool()

    def __call__(self, leaves: list[Any]) -> Any:
        for mine, given in zip(self.inputs, leaves, strict=True):
            if isinstance(mine, Tensor):
                mine.copy_(given)
        self.graph.replay()
        return tree_map_only(Tensor, Tensor.clone, self.outputs)


def timed(call: Callable[[], Any]) -> tuple[Any, float, float]:
    """The result, the seconds until Python had issued it, and until it was there."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    out = call()
    issued = time.perf_counter() - started
    torch.cuda.synchronize()
    return out, issued, time.perf_counter() - started


def refusal(model: nn.Module, layers: list[Any]) -> str:
    """Why no graph of a model with these layers of attention can be kept; empty if one can."""
    inside = list(model.modules())[1:]
    if "forward" in vars(model) or any("forward" in vars(module) for module in inside):
        return "no CUDA graph: offloading, caches or parallelism decide in every step anew"
    if any(module._forward_hooks or module._forward_pre_hooks for module in inside):
        return "no CUDA graph: hooks inside the model want to run in every step"
    if any(hasattr(kind, "active_adapters") for kind in {type(module) for module in inside}) or any(
        isinstance(layer.processor, nn.Module) for layer in layers
    ):
        return "no CUDA graph: the scale of an adapter may change; fuse_lora makes LoRA a part of the weights"
    if not all(
        p.is_cuda and p.device.index == torch.cuda.current_device() for p in model.parameters()
    ):
        return "no CUDA graph: weights are elsewhere than on the current GPU"
    return ""


def _addresses(model: nn.Module) -> Iterator[int]:
    """Where the weights are."""
    for tensor in (*model.parameters(), *model.buffers()):
        inner: Any = tensor
        if is_traceable_wrapper_subclass(inner):
            yield from (getattr(inner, name).data_ptr() for name in inner.__tensor_flatten__()[0])
        else:
            yield inner.data_ptr()

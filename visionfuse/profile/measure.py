"""One step, taken apart by torch.profiler: attention, linear layers, what stands between them, the rest."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, record_function

from ..bench.timing import time_in_turns
from .models import Subject, blocks

ATTENTION, LINEARS, BETWEEN, REST = PARTS = (
    "attention",
    "linears",
    "norm, RoPE, modulation",
    "rest",
)
# Operations that are a part by themselves, with everything that they call.
OPERATIONS = (
    (re.compile(r"scaled_dot_product|cudnn_attention|flash_attention|^visionfuse::"), ATTENTION),
    (re.compile(r"^aten::(linear|addmm|mm|bmm|matmul|baddbmm|_scaled_mm|_int_mm|\w*convolution)$"), LINEARS),
    (re.compile(r"^triton_"), BETWEEN),  # what inductor fused
)  # fmt: skip
SCOPE, BLOCK = "visionfuse part: ", "visionfuse block: "


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Milliseconds of one forward of the whole architecture. parts: by name, which add up to ms; kernels: launches on
    the device (operations, where there is no GPU). measured_ms: of the model that ran, with fewer layers
    where so asked."""

    name: str
    size: tuple[int, ...]
    ms: float
    measured_ms: float
    parts: dict[str, float]
    kernels: dict[str, int]
    peak_gib: float | None


def profile(subject: Subject, *, seconds: float = 1.0) -> Profile:
    """Measure a step without the profiler, then take it apart with it. Layers that were left out count by those of
    their class that ran."""
    device = subject.device
    subject.step()  # whatever happens once
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    timed = time_in_turns({"step": subject.step}, device=device, seconds=seconds, least=2, most=10)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with (
        _scopes(subject.model),
        torch.profiler.profile(activities=activities, acc_events=True) as run,
    ):
        subject.step()
    own = Counter(type(block).__name__ for block in blocks(subject.model))
    factors = {name: subject.depth[name] / count for name, count in own.items()}
    ms: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    kernels: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    seen = whole = 0.0
    for part, block, milliseconds, count in _events(run, device):
        factor = factors.get(block, 1.0)
        seen += milliseconds
        whole += milliseconds * factor
        ms[part] += milliseconds * factor
        kernels[part] += count * factor
    # Time in which the device waited for Python, or less than was profiled, for profiling slows a CPU down.
    measured = timed["step"].ms
    if device.type == "cuda" and measured > seen:
        growth = whole / seen
        ms[REST] += (measured - seen) * growth
        total = whole + (measured - seen) * growth
    else:
        ms = {part: value * measured / seen for part, value in ms.items()}
        total = whole * measured / seen
    return Profile(
        name=subject.name, size=subject.size, ms=total, measured_ms=measured, parts=ms,
        kernels={part: round(count) for part, count in kernels.items()}, peak_gib=peak,
    )  # fmt: skip


def _events(
    run: torch.profiler.profile, device: torch.device
) -> Iterator[tuple[str, str, float, int]]:
    """(part, class of the block, ms on the device, kernels) of every operation that took time itself."""
    for event in run.events() or ():
        if event.device_type != DeviceType.CPU:
            continue  # the device's side of events that are counted here
        gpu = device.type == "cuda"
        microseconds = event.self_device_time_total if gpu else event.self_cpu_time_total
        if microseconds <= 0 or event.name.startswith("ProfilerStep"):
            continue
        part, block = _place(event)
        yield part, block, microseconds / 1e3, len(event.kernels) if gpu else 1


def _place(event: Any) -> tuple[str, str]:
    """The part and the block that an operation belongs to. An operation that is a part by itself decides wherever it
    stands, the outermost first; else the innermost module that is one."""
    part = block = scope = ""
    while event is not None:
        if event.name.startswith(BLOCK):
            block = event.name.removeprefix(BLOCK)
        elif event.name.startswith(SCOPE):
            scope = scope or event.name.removeprefix(SCOPE)
        else:
            part = next((p for name, p in OPERATIONS if name.search(event.name)), part)
        event = event.cpu_parent
    # Inside a block, what no module holds is done to queries and keys, or gates and shifts the tokens.
    return part or scope or (BETWEEN if block else REST), block


def _part(module: nn.Module) -> str:
    """What the own operations of a module are; empty where its surroundings say."""
    name = type(module).__name__
    if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
        return LINEARS
    if re.search(r"norm|rope|rotary|posembed", name, re.IGNORECASE):
        return BETWEEN
    if re.search(r"feedforward|mlp|gelu|silu|activation|act$", name, re.IGNORECASE):
        return REST
    return ""


@contextmanager
def _scopes(model: Any) -> Iterator[None]:
    """Every module that is a part, and every block, names itself to the profiler while it runs."""
    with ExitStack() as undo:
        names = defaultdict(list)
        for module in model.modules():
            if part := _part(module):
                names[module].append(SCOPE + part)
        for block in blocks(model):
            names[block].append(BLOCK + type(block).__name__)
        for module, labels in names.items():
            for label in labels:
                _scope(module, label, undo)
        yield


def _scope(module: nn.Module, label: str, undo: ExitStack) -> None:
    open_scopes: list[record_function] = []

    def enter(*_: Any) -> None:
        open_scopes.append(record_function(label).__enter__())

    def leave(*_: Any) -> None:
        open_scopes.pop().__exit__(None, None, None)

    undo.callback(module.register_forward_pre_hook(enter).remove)
    undo.callback(module.register_forward_hook(leave).remove)

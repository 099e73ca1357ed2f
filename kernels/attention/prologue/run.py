"""From inputs to launches with little Python.

What was done for inputs of one kind is kept as a template (`Prepared`): another call with such inputs allocates
the outputs, fills in their addresses and launches. Four launches take 100 us of Python so, and 240 us
through Triton's own launcher (Triton 3.6), four times the work of the GPU on 4,608 tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import PrologueSpec, launch
from .kernel import INTERPRETED
from .launch import Inputs, Launch, Outputs, plan_launches


class Prepared(NamedTuple):
    """A call without its tensors.

    Getters take the outputs from [*inputs, *fresh, None], and the arguments of a launch from the addresses of
    these, followed by `constants`. Triton asks the driver about a tensor, and takes an address as it is.
    """

    fresh: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    constants: tuple
    outputs: Callable
    launches: tuple[tuple[Callable, tuple[Callable, ...], tuple], ...]


_prepared: dict[tuple, Prepared] = {}
MOST_PREPARED = 256


def run(inputs: Inputs, spec: PrologueSpec, check: Callable[[], None]) -> tuple[Tensor | None, ...]:
    """The fields of `prologue.Operands`. `check` is called for inputs of a kind not seen before."""
    device = inputs.q.device
    key = (spec, device, *map(_kind, inputs))
    prepared = _prepared.get(key)
    if prepared is None:
        check()
        return _first_run(inputs, spec, key)
    tensors = [
        *inputs,
        *(launch._empty(shape, dtype, device) for shape, dtype in prepared.fresh),
        None,
    ]
    values = [x if x is None else x.data_ptr() for x in tensors]
    values += prepared.constants
    if device.index == torch.cuda.current_device():
        _launch(prepared, values, device.index)
    else:
        with torch.cuda.device(device):
            _launch(prepared, values, device.index)
    return prepared.outputs(tensors)


def _kind(x: Tensor | None) -> tuple | None:
    """All that a launch depends on but the address."""
    return x if x is None else (x.shape, x.stride(), x.dtype, x.get_device(), x.data_ptr() & 15)


def _launch(prepared: Prepared, values: list, index: int) -> None:
    stream = triton.runtime.driver.active.get_current_stream(index)
    for start, getters, constants in prepared.launches:
        start(*(getter(values) for getter in getters), *constants, stream=stream)


def _first_run(inputs: Inputs, spec: PrologueSpec, key: tuple) -> tuple[Tensor | None, ...]:
    """Through Triton's own launcher, which compiles what is missing."""
    fresh: list[Tensor] = []

    def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        fresh.append(launch._empty(shape, dtype, device))
        return fresh[-1]

    outputs, launches = plan_launches(inputs, spec, early=_early(inputs.q), allocate=allocate)
    with torch.cuda.device_of(inputs.q):
        compiled = [launch.run() for launch in launches]
    if not INTERPRETED:
        prepared = _template(inputs, fresh, outputs, launches, compiled)
        if prepared is not None:
            if len(_prepared) >= MOST_PREPARED:
                _prepared.clear()
            _prepared[key] = prepared
    return outputs if outputs.v is not None else outputs._replace(v=inputs.v)


def _template(
    inputs: Inputs, fresh: list[Tensor], outputs: Outputs, launches: list[Launch], compiled: list
) -> Prepared | None:
    """None where a launch reads a copy of an input."""
    tensors = [*inputs, *fresh, None]
    place = {id(x): i for i, x in enumerate(tensors) if x is not None}
    constants: list = []

    def index(value: Any) -> int:
        if isinstance(value, Tensor):
            return place[id(value)]
        constants.append(value)
        return len(tensors) + len(constants) - 1

    def getter(argument: Any) -> Callable:
        """itemgetter gives a tuple for several places and a value for one."""
        return itemgetter(
            *map(index, argument) if isinstance(argument, tuple) else (index(argument),)
        )

    try:
        prepared = [
            (
                kernel[(*launch.grid, 1, 1)[:3]],
                tuple(getter(argument) for argument in launch.arguments),
                tuple(launch.options[n] for n in launch.kernel.arg_names if n in launch.options),
            )
            for launch, kernel in zip(launches, compiled, strict=True)
        ]
    except KeyError:
        return None
    outputs = outputs if outputs.v is not None else outputs._replace(v=inputs.v)
    result = itemgetter(*(len(tensors) - 1 if x is None else place[id(x)] for x in outputs))
    shapes = tuple((tuple(x.shape), x.dtype) for x in fresh)
    return Prepared(shapes, tuple(constants), result, tuple(prepared))


_EARLY: dict[int, bool] = {}


def _early(x: Tensor) -> bool:
    """Whether launches may begin before the one in front of them ends (Hopper and newer)."""
    if not x.is_cuda or torch.version.hip:
        return False
    index = x.get_device()
    if index not in _EARLY:
        _EARLY[index] = torch.cuda.get_device_capability(index) >= (9, 0)
    return _EARLY[index]

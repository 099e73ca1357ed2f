"""Large linear layers in 8 bits, by torchao's own configurations, and back again, exactly.

Weights are rounded once, with a scale for every output channel, and activations in every call, with a scale for
every token. Only layers inside the blocks that attend take part: embeddings, modulations and the last layer
cost little and decide much. Every layer is tried when it is rounded; one that fails, or is further off than
`tolerance`, keeps its weights.

The parameters themselves wait in CPU memory, so that a GPU holds either 16 or 8 bits of a layer and never both;
`Rounded.undo` puts the very same objects back.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from .sites import Denoiser

MULTIPLE = 16  # of both sizes of a weight: 8-bit tensor cores take nothing else
# As many as an image has: with 32, cuBLAS refused a part of the layers of FLUX.1 (H200).
TRIED_TOKENS = 4096
# See text alone: too few tokens to gain anything (a 25th of the work of FLUX.1 at 1024x1024).
TEXT_ONLY = (
    "*.ff_context.*", "*.add_?_proj", "*.to_add_out", "*.attn2.to_k", "*.attn2.to_v",
    "*.attn2.add_?_proj", "*.txt_m*",
)  # fmt: skip
# Scales, shifts and gates of a block: one token long, and everything is multiplied by them.
MODULATION = re.compile(r"norm|mod|ada", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Linears:
    """Which linear layers run in which format.

    format: "fp8" (e4m3; NVIDIA from sm_89 on) or "int8".
    only, skip: patterns of names as in fnmatch, e.g. "*.ff.*"; of the layers that pay, those that match one of
        `only` and none of `skip`, by default what sees text alone.
    least_width: of input and of output. Rounding a token reads and writes 3 bytes a channel, which 8-bit
        products of 540 channels save on an H200 (baselines: 693 and 1281 TFLOP/s, 4.3 TB/s).
    tolerance: largest relative L1 error of a layer's output on random tokens. fp8 makes 0.04, int8 0.01.
    """

    format: str = "fp8"
    only: tuple[str, ...] = ("*",)
    skip: tuple[str, ...] = TEXT_ONLY
    least_width: int = 1024
    tolerance: float = 0.1

    def __post_init__(self):
        if self.format not in ("fp8", "int8"):
            raise ValueError(f"linear must be 'fp8', 'int8' or None, got {self.format!r}.")
        for name in ("only", "skip"):
            patterns = getattr(self, name)
            if isinstance(patterns, str) or not all(isinstance(p, str) for p in patterns):
                raise TypeError(f"{name} takes a tuple of patterns, got {patterns!r}.")
            object.__setattr__(self, name, tuple(patterns))
        if not isinstance(self.least_width, int) or self.least_width < 1:
            raise ValueError(f"least_width counts channels, got {self.least_width!r}.")
        if not isinstance(self.tolerance, (int, float)) or not 0 < self.tolerance < 1:
            raise ValueError(
                f"tolerance is a relative error between 0 and 1, got {self.tolerance!r}."
            )

    @classmethod
    def of(cls, linear: str | Linears | None) -> Linears | None:
        """What `enable_visionfuse(linear=...)` takes."""
        if linear is None or isinstance(linear, Linears):
            return linear
        return cls(format=linear)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def within(self, errors: dict[str, float], budget: float) -> Linears:
        """The same without the layers whose measured error (see `errors_on`) is above `budget`."""
        worse = tuple(name for name, error in errors.items() if not error <= budget)
        return replace(self, skip=(*self.skip, *worse))


def candidates(denoiser: Denoiser, linears: Linears) -> dict[str, nn.Linear]:
    """The layers that pay and match, by their names in the model."""
    names = {id(module): name for name, module in denoiser.model.named_modules()}
    attention = [names[id(layer)] for layer in denoiser.site.layers(denoiser.model)]
    blocks = dict.fromkeys(name.rpartition(".")[0] for name in attention)
    weights = Counter(
        id(module.weight) for module in denoiser.model.modules() if isinstance(module, nn.Linear)
    )
    found = {}
    for block in blocks:
        for name, module in denoiser.model.get_submodule(block).named_modules():
            whole = f"{block}.{name}"
            if (
                isinstance(module, nn.Linear)
                and min(module.in_features, module.out_features) >= linears.least_width
                and not MODULATION.search(name)
                and weights[id(module.weight)] == 1
                and any(fnmatch(whole, pattern) for pattern in linears.only)
                and not any(fnmatch(whole, pattern) for pattern in linears.skip)
            ):
                found[whole] = module
    return found


@dataclass(frozen=True, slots=True, eq=False)
class _Layer:
    """A rounded layer and its own parameter, whose data wait on the CPU."""

    module: nn.Linear
    weight: nn.Parameter

    def undo(self) -> None:
        self.weight.data = self.weight.data.to(self.module.weight.device)
        self.module.weight = self.weight


class Rounded:
    """The rounded layers of one denoiser. errors: of each, on random tokens. notes: why others were left alone."""

    def __init__(self, linears: Linears):
        self.linears = linears
        self.layers: dict[str, _Layer] = {}
        self.errors: dict[str, float] = {}
        self.notes: Counter[str] = Counter()

    def undo(self) -> None:
        """Every layer has its own parameter again, on the device on which the layer is now."""
        while self.layers:
            _, layer = self.layers.popitem()
            layer.undo()

    def undo_inside(self, block: nn.Module) -> bool:
        """The layers of a block, which failed in a run, have their own weights again. False if it has none."""
        modules = set(block.modules())
        names = [name for name, layer in self.layers.items() if layer.module in modules]
        for name in names:
            self.layers.pop(name).undo()
            self.notes["it failed in a run, and has its own weights again"] += 1
        return bool(names)

    def lines(self) -> list[str]:
        """For the report."""
        out = []
        if self.layers:
            worst = max(self.errors[name] for name in self.layers)
            out.append(
                f"{len(self.layers)} layers in {self.linears.format}, rounded by torchao, "
                f"relative error at most {worst:.3f} each"
            )
        return out + [f"{reason} ({count}x)" for reason, count in self.notes.items()]


def round_linears(denoiser: Denoiser, linears: Linears) -> Rounded:
    """Round what `candidates` names. What cannot be rounded stays as it is, with a note of the reason."""
    made = Rounded(linears)
    if reason := _refusal(denoiser.model, linears.format):
        made.notes[reason] += 1
        return made
    found = candidates(denoiser, linears)
    if not found:
        made.notes[f"no linear layer is {linears.least_width} or wider on both sides"] += 1
    device = _runs_on(denoiser.model)
    for name, module in found.items():
        try:
            reason = _round(made, name, module, device)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            made.notes["out of memory; the layers from there on stay as they are"] += 1
            break
        if reason:
            made.notes[reason] += 1
    return made


def _refusal(model: Any, format: str) -> str:
    """Why no layer of this model can be rounded; empty if some may."""
    try:
        import torchao  # noqa: F401
    except ImportError:
        return "linear layers in 8 bits need torchao: pip install torchao"
    if getattr(model, "quantization_config", None) is not None or getattr(
        model, "hf_quantizer", None
    ):
        return "the model is quantised already"
    if any(p.is_meta for p in model.parameters()):
        return "weights are not in memory (sequential offload); use enable_model_cpu_offload"
    from diffusers.hooks.group_offloading import _is_group_offload_enabled

    if _is_group_offload_enabled(model):
        return "group offloading moves weights in ways that 8-bit ones do not follow"
    device = _runs_on(model)
    if format == "fp8" and not (
        device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
    ):
        return f"fp8 products need an NVIDIA GPU from sm_89 on, this is {device}"
    return ""


def _runs_on(model: Any) -> torch.device:
    """Where the model computes, which model offload knows."""
    hook = getattr(model, "_hf_hook", None)
    return torch.device(getattr(hook, "execution_device", None) or next(model.parameters()).device)


def _round(made: Rounded, name: str, module: nn.Linear, device: torch.device) -> str:
    """Round one layer and try it on `device`; the reason if it keeps its weight."""
    weight, linears, stays_on = module.weight, made.linears, module.weight.device
    if linears.format == "fp8" and weight.dtype != torch.bfloat16:
        return f"fp8 with a scale for every row takes bfloat16 weights, these are {weight.dtype}"
    if weight.shape[0] % MULTIPLE or weight.shape[1] % MULTIPLE:
        return f"a size is no multiple of {MULTIPLE}: {tuple(weight.shape)}"
    assert isinstance(weight, nn.Parameter)
    layer, own, attributes = _Layer(module, weight), weight.data, set(vars(module))
    generator = torch.Generator(device).manual_seed(0)
    shape = (TRIED_TOKENS, module.in_features)
    tokens = torch.randn(shape, generator=generator, device=device, dtype=weight.dtype)
    reason, error = "", 0.0
    with torch.no_grad():
        try:
            from torchao.quantization import quantize_

            module.to(device)
            expected = F.linear(tokens, module.weight, module.bias)
            quantize_(module, _config(linears.format), lambda m, _: m is module)
            error = _error(F.linear(tokens, module.weight, module.bias), expected)
        except torch.OutOfMemoryError:
            layer.undo()
            raise
        except Exception as failure:  # a layer that torchao cannot take keeps its own weight
            reason = f"torchao stopped with {type(failure).__name__}: {failure}"
        finally:
            module.to(stays_on)
            for added in (
                set(vars(module)) - attributes
            ):  # an extra_repr of torchao, which cannot be pickled
                delattr(module, added)
    if not reason and not error <= linears.tolerance:
        reason = f"its error on random tokens is above the tolerance {linears.tolerance}"
    if reason:
        layer.undo()
        return reason
    weight.data = own.to("cpu")
    made.layers[name], made.errors[name] = layer, error
    return ""


def _error(got: Tensor, expected: Tensor) -> float:
    """Relative L1."""
    got, expected = got.float(), expected.float()
    return float((got - expected).abs().sum() / expected.abs().sum())


def _config(format: str) -> Any:
    """torchao's configuration of a format: a scale for every token and for every output channel."""
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int8DynamicActivationInt8WeightConfig,
        PerRow,
    )

    made = {
        "fp8": Float8DynamicActivationFloat8WeightConfig,
        "int8": Int8DynamicActivationInt8WeightConfig,
    }[format]
    return made(granularity=PerRow(), set_inductor_config=False)


def errors_on(rounded: Rounded, run: Callable[[], object]) -> dict[str, float]:
    """The largest relative L1 error of every rounded layer on the tokens that `run()` sends through it.

    Each layer is computed a second time with its own weight, which comes from the CPU for it: this takes its
    time and is meant for choosing, once, with `Linears.within(errors, budget)`.
    """
    errors: dict[str, float] = dict.fromkeys(rounded.layers, 0.0)

    def compare(name: str, layer: _Layer, module: nn.Linear, args: tuple, output: Tensor) -> None:
        own = layer.weight.data.to(output.device)
        with torch.no_grad():
            error = _error(output, F.linear(args[0], own, module.bias))
        errors[name] = max(errors[name], error)

    handles = [
        layer.module.register_forward_hook(partial(compare, name, layer))
        for name, layer in rounded.layers.items()
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return errors

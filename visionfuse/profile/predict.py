"""What recipes would save of a profiled step: predicted from the simulator's constants, or measured."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..bench.timing import time_in_turns
from ..kernels.plan import Dense, Neighborhood
from ..recipe import Recipe
from ..recipes import build
from ..simulate import H200, Gpu, Setting, cudnn_ms, dense_ms, find_gpu, predicted_ms
from ..simulate.model import planned
from ..sites import SITES
from .measure import ATTENTION, BETWEEN, LINEARS, REST, Profile
from .models import Subject

# Measured on one H200. What torch.compile leaves of the time between attention and linear layers: 0.30 (Wan2.1-14B 720p),
# 0.32 (1.3B), 0.36 (FLUX.1-dev 4096x4096), 0.45 (1024x1024, whose launches take as long as its kernels).
FUSED = 0.35
# What is left of norms, RoPE and modulation, uncompiled, where the pass that rounds norms and rotates (FLUX.1 1024x1024).
DEFERRED = 0.4
FP8_LINEARS = 693 / 1281  # bf16 over FP8 products, TFLOP/s
IMPL = "gluon_sm90"
LEAST_TOKENS = (
    4096  # the simulator's constants were fitted from 4,608 on; shorter calls are mostly launches
)


@dataclass(frozen=True, kw_only=True)
class Way:
    """Arguments of `enable_visionfuse`. steps: this is a step of the phase that the recipe accelerates."""

    name: str
    recipe: str = "auto"
    options: dict[str, Any]
    compile: bool = False
    linear: str | None = None

    def enable(self, pipe: Any) -> None:
        pipe.enable_visionfuse(
            self.recipe, compile=self.compile, linear=self.linear, **self.options
        )


@dataclass(frozen=True, kw_only=True)
class Saving:
    """predicted_ms, measured_ms: of a step that follows the recipe; measured_ms None where it was not asked for or did
    not run, for the `reason`."""

    way: Way
    parts: dict[str, float]
    measured_ms: float | None = None
    reason: str = ""

    @property
    def predicted_ms(self) -> float:
        return sum(self.parts.values())


SPARSE = {"density": 0.3, "dense_start": 0.0, "min_steps": 0}
WAYS = (
    Way(name="compile", options={}, compile=True),
    Way(name="fp8 linears + compile", options={}, compile=True, linear="fp8"),
    Way(name="auto", options={}),
    Way(name="sage", recipe="sage", options={}),
    Way(name="gna, density 0.3", recipe="gna", options=SPARSE),
    Way(name="gna, density 0.3, fp8", recipe="gna", options={**SPARSE, "precision": "fp8"}),
    Way(name="sage + compile + fp8 linears", recipe="sage", options={}, compile=True, linear="fp8"),
    Way(
        name="gna fp8 + compile + fp8 linears", recipe="gna",
        options={**SPARSE, "precision": "fp8"}, compile=True, linear="fp8",
    ),
)  # fmt: skip


def gpu_of(device: torch.device) -> Gpu:
    """Whose speed is predicted: this one's where it is known, else the H200's."""
    if device.type == "cuda":
        try:
            return find_gpu(torch.cuda.get_device_name(device))
        except ValueError:
            pass
    return H200


def savings(
    subject: Subject, profile: Profile, *, ways: tuple[Way, ...] = WAYS, measure: bool = False
) -> list[Saving]:
    """What every way leaves of the profiled step. measure: also run it, on the layers that the subject has; its
    time is scaled by what those are of the whole model."""
    if subject.layout is None:
        return []
    made = []
    for way in ways:
        measured, reason = None, ""
        if measure:
            ms, reason = _measured(subject, way)
            measured = None if ms is None else ms * profile.ms / profile.measured_ms
        made.append(
            Saving(
                way=way,
                parts=_predicted(subject, profile, way),
                measured_ms=measured,
                reason=reason,
            )
        )
    return made


def _predicted(subject: Subject, profile: Profile, way: Way) -> dict[str, float]:
    recipe, site = build(way.recipe, **way.options), SITES.get(type(subject.model).__name__)
    parts = dict(profile.parts)
    parts[ATTENTION] *= attention_ratio(subject, recipe)
    if way.linear is not None:
        parts[LINEARS] *= FP8_LINEARS
    if way.compile:
        parts[BETWEEN] *= FUSED
        parts[REST] *= FUSED
    elif getattr(site, "deferrals", None) and not recipe.precision.is_model:
        parts[BETWEEN] *= DEFERRED
    return parts


def attention_ratio(subject: Subject, recipe: Recipe) -> float:
    """The predicted time of self-attention by a recipe over that of cuDNN, on one GPU; 1 where no speed is known."""
    assert subject.layout is not None
    if subject.layout.length < LEAST_TOKENS:
        return 1.0
    grids = [s.shape for s in subject.layout.segments if s.kind == "grid"]
    text = subject.layout.length - sum(
        s.length for s in subject.layout.segments if s.kind == "grid"
    )
    exact = recipe.precision.is_model and isinstance(recipe.plan, Dense)
    setting = Setting(
        grid=grids[0], text=text, heads=subject.heads, head_dim=subject.head_dim, impl=IMPL,
        precision=recipe.precision.name, gpu=gpu_of(subject.device),
    )  # fmt: skip
    try:
        own = cudnn_ms(setting)
        if own is None:
            return 1.0
        if isinstance(recipe.plan, Neighborhood):
            made, shape = planned(recipe.plan, setting)
            return predicted_ms(made.blocks, shape, setting) / own
        ratio = dense_ms(setting) / own
    except ValueError:  # no speed is known for this head dim or precision
        return 1.0
    return min(ratio, 1.0) if exact else ratio  # "auto" takes the faster one


class Alone:
    """A denoiser that is run like a pipeline, one step at a time."""

    def __init__(self, subject: Subject):
        self.transformer, self._step = subject.model, subject.step

    @property
    def components(self) -> dict[str, Any]:
        return {"transformer": self.transformer}

    def __call__(self) -> Any:
        return self._step()

    def enable_visionfuse(self, recipe: str | Recipe = "auto", **options: Any) -> None:
        from ..patching import enable_visionfuse

        enable_visionfuse(self, recipe, **options)

    def disable_visionfuse(self) -> None:
        from ..patching import disable_visionfuse

        disable_visionfuse(self)


def _measured(subject: Subject, way: Way) -> tuple[float | None, str]:
    pipe = Alone(subject)
    try:
        way.enable(pipe)
        call: Callable[[], object] = pipe
        times = time_in_turns({"step": call}, device=subject.device, seconds=1.0, least=2, most=10)
        return times["step"].ms, "; ".join(_left_alone(pipe))
    except (ValueError, RuntimeError, ImportError) as failure:
        warnings.warn(f"{way.name} did not run: {failure}", stacklevel=2)
        return None, f"{type(failure).__name__}: {str(failure).partition(chr(10))[0]}"
    finally:
        pipe.disable_visionfuse()


def _left_alone(pipe: Alone) -> list[str]:
    """Why parts of a way ran as in the stock model."""
    from ..patching import get

    enabled = get(pipe)
    assert enabled is not None
    changes = (*enabled.compiled.values(), *enabled.rounded.values(), *enabled.ran.values())
    return list(dict.fromkeys(note for change in changes for note in change.notes))

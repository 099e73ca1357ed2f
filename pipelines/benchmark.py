"""A pipeline stock and accelerated, variant by variant, in one run: `pipelines/flux.py --benchmark` and its kin.

    rows = benchmark(build, VARIANTS, steps=28, case=Case(suite="flux", name="FLUX.1-dev 1024x1024"), csv=path)

Every variant starts from the same pipeline and is undone before the next. Its first call is the cold start (kernels,
plans, compilation); a second one is timed, step by step through `callback_on_step_end`. Errors are of the result
against that of the first variant, for the same seed.
"""

from __future__ import annotations

import csv as csv_module
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from visionfuse.bench.table import Row, update_csv
from visionfuse.profile import named, subject
from visionfuse.sites import denoisers

# call(pipe, steps, **more) -> latents or frames, for one seed; `more` goes to the pipeline.
Call = Callable[..., Tensor]
# Arguments of `enable_visionfuse`, or what changes the pipeline and returns the undoing, or None: as it is.
Options = dict[str, Any] | Callable[[Any], Callable[[], None]] | None


def compile_alone(pipe: Any) -> Callable[[], None]:
    """diffusers' own compilation of repeated blocks, without visionfuse."""
    models = [denoiser.model for denoiser in denoisers(pipe)]
    for model in models:
        model.compile_repeated_blocks()

    def undo() -> None:
        for module in (module for model in models for module in model.modules()):
            vars(module).pop("_compiled_call_impl", None)

    return undo


def variants_of(name: str, **recipe: Any) -> dict[str, Options]:
    """Of a recipe, given as arguments of `enable_visionfuse`: alone, with compiled blocks, with 8-bit layers as well,
    and with queries and keys normed by the model."""
    compiled = {**recipe, "compile": True}
    whole, apart = {**compiled, "linear": "fp8"}, {"fuse": False}
    return {
        name: recipe,
        f"{name}, norms apart": recipe | apart,
        f"{name} + compile": compiled,
        f"{name} + compile + fp8 linears": whole,
        f"{name} + compile + fp8 linears, norms apart": whole | apart,
    }


# The first is the baseline.
VARIANTS: dict[str, Options] = {
    "stock": None,
    "stock + compile": compile_alone,
    "compile": {"compile": True},
    "fp8 linears": {"linear": "fp8"},
    "compile + fp8 linears": {"compile": True, "linear": "fp8"},
    **variants_of("sage", recipe="sage"),
}


TABLE_WIDTH = 110  # logs count as 80 columns wide


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is measured, for the rows: their suite and case."""

    suite: str
    name: str


@dataclass(kw_only=True)
class Result:
    """Of one variant. Times in seconds. steps: of every step; cold: of the first call, compilation included.
    rel_l1, cosine: of the result against the first variant's. failure: why it did not run, if so."""

    name: str
    recipe: str = ""
    steps: list[float] = field(default_factory=list)
    call: float = float("nan")
    cold: float = float("nan")
    peak_gib: float | None = None
    rel_l1: float | None = None
    cosine: float | None = None
    notes: list[str] = field(default_factory=list)
    failure: str = ""

    @property
    def step(self) -> float:
        """The median; of recipes with phases see `fastest`."""
        return median(self.steps) if self.steps else float("nan")

    @property
    def fastest(self) -> float:
        """The median of the last third of the run, where a schedule's accelerated phase is."""
        return median(self.steps[-max(1, len(self.steps) // 3) :]) if self.steps else float("nan")


def benchmark(
    build: Callable[[], tuple[Any, Call]],
    variants: dict[str, Options] = VARIANTS,
    *,
    steps: int,
    case: Case,
    cold_steps: int | None = None,
    csv: Path | None = None,
    commit: str = "",
) -> list[Row]:
    """Measure every variant on the pipeline that `build()` returns with its call; print a table; write `csv`.

    steps, cold_steps: of the timed call, and of the one before it, which is as long if nothing is said: a shorter one
        meets other phases of a schedule.

    A variant that cannot run has a row that says why, and the others go on. Rows are written as they come.
    """
    pipe, call = build()
    results: list[Result] = []
    stock: Tensor | None = None
    for name, options in variants.items():
        torch._dynamo.reset()  # a cold start is cold, and no variant is compiled for the sizes of another
        with ExitStack() as undo:
            result, out = _measure(pipe, call, name, options, steps, cold_steps or steps, undo)
        if out is not None and stock is None:
            stock = out
        elif out is not None and stock is not None:
            result.rel_l1, result.cosine = errors(out, stock)
        results.append(result)
        if csv is not None:
            update_csv(rows(results, case, steps), csv, commit=commit)
    show(results, case)
    return rows(results, case, steps)


def _measure(
    pipe: Any,
    call: Call,
    name: str,
    options: Options,
    steps: int,
    cold_steps: int,
    undo: ExitStack,
) -> tuple[Result, Tensor | None]:
    result = Result(name=name)
    try:
        started = time.perf_counter()
        if isinstance(options, dict):
            recipe = options.get("recipe", "")
            result.recipe = getattr(recipe, "name", recipe)
            undo.callback(pipe.disable_visionfuse)
            pipe.enable_visionfuse(**options)
        elif options is not None:
            undo.callback(options(pipe))
        call(pipe, cold_steps)
        synchronize()
        result.cold = time.perf_counter() - started
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        clock = _Clock()
        out = call(pipe, steps, callback_on_step_end=clock)
        synchronize()
        result.call = time.perf_counter() - clock.started
        result.steps = clock.steps
        if torch.cuda.is_available():
            result.peak_gib = torch.cuda.max_memory_allocated() / 2**30
        result.notes = _notes(pipe)
        return result, out.detach().float().cpu()
    except (RuntimeError, ValueError, ImportError) as failure:
        result.failure = f"{type(failure).__name__}: {str(failure).partition(chr(10))[0]}"
        return result, None


class _Clock:
    """A `callback_on_step_end` that notes how long each step took. It waits for the device, as an honest clock must."""

    def __init__(self):
        synchronize()
        self.started = self.last = time.perf_counter()
        self.steps: list[float] = []

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict) -> dict:
        synchronize()
        now = time.perf_counter()
        self.steps.append(now - self.last)
        self.last = now
        return tensors


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _notes(pipe: Any) -> list[str]:
    """What of the variant ran as in the stock model, and why."""
    from visionfuse.patching import get

    enabled = get(pipe)
    if enabled is None:
        return []
    changes = (*enabled.compiled.values(), *enabled.rounded.values(), *enabled.ran.values())
    return list(dict.fromkeys(note for change in changes for note in change.notes))


def errors(out: Tensor, exact: Tensor) -> tuple[float, float]:
    """Relative L1 error and cosine of two results of one shape."""
    out, exact = out.double().flatten(), exact.double().flatten()
    rel_l1 = (out - exact).abs().sum() / exact.abs().sum()
    return float(rel_l1), float(torch.nn.functional.cosine_similarity(out, exact, dim=0))


# Pipelines of random weights --------------------------------------------------------------------------


def random_weights(
    name: str,
    size: tuple[int, ...] | None = None,
    *,
    layers: int | None = None,
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Any, Call]:
    """A FLUX or Wan pipeline of its denoiser alone, and its call: no checkpoint, no text encoder, no VAE.

    name, size, layers: as in `visionfuse.profile.subject`. One forward a step (Wan without guidance by a second).
    Raises ValueError for other models.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, WanPipeline

    architecture = named(name)
    if architecture.cls not in ("FluxTransformer2DModel", "WanTransformer3DModel"):
        raise ValueError(f"Random weights are for pipelines of FLUX and Wan, not for {name}.")
    made = subject(architecture, size, layers=layers, device=device, dtype=dtype)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    given = {"prompt_embeds": made.inputs["encoder_hidden_states"], "output_type": "latent"}
    given |= {"height": made.size[0], "width": made.size[1]}
    if architecture.cls == "FluxTransformer2DModel":
        empty = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
        pipe = FluxPipeline(transformer=made.model, scheduler=scheduler, **empty)
        given["pooled_prompt_embeds"] = made.inputs["pooled_projections"]
    else:
        empty = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
        pipe = WanPipeline(transformer=made.model, scheduler=scheduler, **empty)
        given |= {"num_frames": made.size[2], "guidance_scale": 1.0}
    pipe.set_progress_bar_config(disable=True)

    def call(pipe: Any, steps: int, **more: Any) -> Tensor:
        generator = torch.Generator("cpu").manual_seed(0)
        options = {**given, **more}
        out = pipe(num_inference_steps=steps, generator=generator, return_dict=False, **options)
        return out[0]

    return pipe, call


# Rows and tables --------------------------------------------------------------------------------------


def rows(results: list[Result], case: Case, steps: int) -> list[Row]:
    """Four rows a variant: a whole call, a step (median), one of the last third, and the cold start; in the schema of
    assets/bench. Speed-ups are relative to the first variant."""
    made = []
    base = results[0]
    for result in results:
        note = "; ".join(filter(None, [result.failure, *result.notes]))
        for what, seconds, stock in (
            (f"a call of {steps} steps", result.call, base.call),
            ("a step, median", result.step, base.step),
            ("a step, last third", result.fastest, base.fastest),
            ("cold start", result.cold, None),
        ):
            if result.failure and what != "a step, median":
                continue
            row = Row(
                suite=case.suite, case=f"{case.name}, {what}", impl=result.name, recipe=result.recipe,
                ms=None if result.failure else seconds * 1e3, peak_gib=result.peak_gib,
                rel_l1=result.rel_l1, cosine=result.cosine, note=note,
            )  # fmt: skip
            if stock and result is not base and not result.failure and not base.failure:
                row.baseline, row.speedup = base.name, stock / seconds
            made.append(row)
    return made


def show(results: list[Result], case: Case) -> None:
    """A table, below it what failed or ran as in the stock model."""
    table = Table(title=case.name, box=SIMPLE_HEAD)
    table.add_column("variant", no_wrap=True)
    for name in ("ms/step", "last third", "x", "s/call", "x", "cold s", "rel. L1"):
        table.add_column(name, justify="right", no_wrap=True)
    base = results[0]
    for r in results:
        cells = [f"{r.step * 1e3:.4g}", f"{r.fastest * 1e3:.4g}", f"{base.fastest / r.fastest:.2f}",
                 f"{r.call:.3g}", f"{base.call / r.call:.2f}", f"{r.cold:.3g}",
                 "" if r.rel_l1 is None else f"{r.rel_l1:.3g}"]  # fmt: skip
        table.add_row(r.name, *([] if r.failure else cells))
    console = Console(soft_wrap=True)
    console.width = max(console.width, TABLE_WIDTH)
    console.print(table)
    for r in results:
        for note in filter(None, [r.failure, *r.notes]):
            console.print(f"{r.name}: {note}", highlight=False)


def compare_csv(
    base: Path, new: Path, *, worse: float = 0.03
) -> list[tuple[str, str, float, float]]:
    """Print what two runs share, (case, impl, ms before, ms now); returns those that became slower by more than
    `worse`, a share. Raises ValueError where they share nothing."""
    before, now = (_times(path) for path in (base, new))
    shared = [key for key in now if key in before]
    if not shared:
        raise ValueError(f"{base} and {new} have no case and implementation in common.")
    table = Table("case", "impl", title=f"{new} against {base}")
    for name in ("before, ms", "now, ms", "now / before"):
        table.add_column(name, justify="right")
    slower = []
    for key in shared:
        a, b = before[key], now[key]
        changed = b / a - 1
        color = "red" if changed > worse else "green" if changed < -worse else ""
        ratio = f"[{color}]{b / a:.3f}[/]" if color else f"{b / a:.3f}"
        table.add_row(*key, f"{a:.4g}", f"{b:.4g}", ratio)
        if changed > worse:
            slower.append((*key, a, b))
    Console().print(table)
    return slower


def _times(path: Path) -> dict[tuple[str, str], float]:
    with path.open(newline="", encoding="utf-8") as file:
        found = [row for row in csv_module.DictReader(file) if row["ms"]]
    return {(row["case"], row["impl"]): float(row["ms"]) for row in found}

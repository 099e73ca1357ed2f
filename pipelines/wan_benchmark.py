"""Wan at full size with random weights: attention alone, and one denoising step, stock and by recipe.

python pipelines/wan.py --benchmark --model wan2.1-14b --size 720p --recipes "fps, sage"
python pipelines/wan.py --benchmark --size 32x64 --frames 5 --layers 1    # on a CPU

A recipe is measured variant by variant, as they would run in a step of their own; its mean over a run follows from
how many steps each has. A step is a call of the pipeline with one step and without guidance, the VAE and the text
encoder left out: one forward of the transformer.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import visionfuse
from visionfuse.bench.accuracy import sampled_errors
from visionfuse.bench.table import Row
from visionfuse.bench.timing import time_in_turns
from visionfuse.choice import choose
from visionfuse.kernels.attention import block_sparse_attention
from visionfuse.kernels.plan import (
    AttentionPlan,
    Neighborhood,
    TileWindow,
    TokenLayout,
    plan_attention,
)
from visionfuse.pipelines.benchmark import (
    Call,
    compile_alone,
    errors,
    random_weights,
    synchronize,
)
from visionfuse.profile.models import named
from visionfuse.recipe import Recipe, Variant
from visionfuse.schedule import STOCK, Schedule

SIZES = {"480p": (480, 832), "720p": (720, 1280)}
PARTS = ("attention", "step", "combined")
COMBINED = {"compile": True, "linear": "fp8"}  # beside the recipe
RUN = 50  # steps of the run whose mean is told
STOCK_ATTENTION = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


@dataclass(frozen=True, kw_only=True)
class Task:
    """model: a name of `visionfuse.profile.models`. size: height and width. layers: instead of the model's own number.
    repeats: timed calls of a step, after one that is not."""

    model: str
    size: tuple[int, int]
    recipes: tuple[Recipe, ...]
    frames: int = 81
    layers: int | None = None
    repeats: int = 1
    parts: tuple[str, ...] = PARTS[:2]
    device: torch.device
    dtype: torch.dtype

    def __post_init__(self):
        if named(self.model).cls != "WanTransformer3DModel":
            raise ValueError(f"{self.model} is no Wan model; choose wan2.1-1.3b or wan2.1-14b.")
        if wrong := [part for part in self.parts if part not in PARTS]:
            raise ValueError(f"Unknown part {', '.join(wrong)}. Choose from {', '.join(PARTS)}.")
        if self.frames % 4 != 1 or any(side % 16 for side in self.size):
            raise ValueError(
                "Sides are multiples of 16 pixels and frames one more than a multiple of 4, got "
                f"{self.size[0]}x{self.size[1]} and {self.frames}."
            )

    @property
    def grid(self) -> tuple[int, int, int]:
        height, width = self.size
        return (self.frames - 1) // 4 + 1, height // 16, width // 16

    @property
    def case(self) -> str:
        layers = "" if self.layers is None else f", {self.layers} layers"
        return f"{self.model} {_times(self.size)}, {self.frames} frames{layers}"


@dataclass(frozen=True, kw_only=True)
class Part:
    """A variant of a recipe as a recipe of its own. share: of the steps of a run."""

    of: str
    name: str
    recipe: Recipe
    share: float


def parts_of(recipe: Recipe) -> tuple[list[Part], float]:
    """What the schedule of a recipe names, and the share of a run that is the model's own attention."""
    spans = recipe.schedule.spans(RUN)
    shares = {name: sum(s.end - s.start for s in spans if s.variant == name) / RUN
              for name in (STOCK, *(way.name for way in recipe.ways))}  # fmt: skip
    found = [way for way in recipe.ways if way.name in recipe.schedule.names]
    return [
        Part(of=recipe.name, name=f"{recipe.name} {way.name}" if len(found) > 1 else recipe.name,
             recipe=_alone(recipe, way), share=shares[way.name])
        for way in found
    ], shares[STOCK]  # fmt: skip


def _alone(recipe: Recipe, way: Variant) -> Recipe:
    return replace(recipe, plan=way.plan, precision=way.precision, variants=(),
                   schedule=Schedule(min_steps=0))  # fmt: skip


def measure(task: Task) -> Iterator[list[Row]]:
    """The rows of attention alone, those of a step, and those of a step with compile= and linear= as well."""
    if "attention" in task.parts:
        yield attention_rows(task)
    if "step" in task.parts:
        yield step_rows(task)
    if "combined" in task.parts:
        yield step_rows(task, combined=True)


# -- attention alone --------------------------------------------------------------------------------


def attention_rows(task: Task) -> list[Row]:
    """One attention call of a layer, normal data: stock kernels, and of each variant the kernel with its rounding,
    and with the order of q, k and v and that of the result as well (in a model that is done once a forward)."""
    layout = TokenLayout.joint(grids=[task.grid])
    config = named(task.model).config
    heads, dim = config["num_attention_heads"], config["attention_head_dim"]
    generator = torch.Generator(task.device).manual_seed(0)
    shape = (1, layout.length, heads, dim)
    q, k, v = (torch.randn(shape, generator=generator, device=task.device, dtype=task.dtype)
               for _ in range(3))  # fmt: skip
    case = f"{task.case}, attention, {heads} heads"
    calls: dict[str, Callable[[], object]] = {}
    rows: dict[str, Row] = {}
    visited: dict[str, float] = defaultdict(lambda: 1.0)
    for name, backend in STOCK_ATTENTION.items() if q.is_cuda else [("stock", None)]:
        calls[name] = _stock_attention(q, k, v, backend)
        rows[name] = Row(suite="wan", case=case, impl=name, density=1.0)
    for recipe in task.recipes:
        for part in parts_of(recipe)[0]:
            for name, row, plan, call in _part_calls(part, case, layout, q, k, v):
                rows[name], calls[name], visited[name] = row, call, plan.blocks.visited_density
    with torch.no_grad():
        timed = time_in_turns(calls, device=task.device, seconds=0.3, least=3, most=20, turn=0.1)
    base = next(iter(rows))
    for name, row in rows.items():
        row.ms, row.ms_p20, row.ms_p80 = timed[name].ms, timed[name].ms_p20, timed[name].ms_p80
        if name != base:
            row.baseline, row.speedup = base, timed[base].ms / timed[name].ms
        if "flash" in timed and name not in STOCK_ATTENTION:
            row.note += f", {timed['flash'].ms / timed[name].ms:.2f}x FlashAttention-2"
        row.tflops_visited = (
            4 * dim * heads * layout.length**2 * visited[name] / timed[name].ms * 1e-9
        )
    return list(rows.values())


def _stock_attention(
    q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend | None
) -> Callable[[], Tensor]:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))

    def call() -> Tensor:
        if backend is None:
            return scaled_dot_product_attention(q, k, v)
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v)

    return call


def _part_calls(
    part: Part, case: str, layout: TokenLayout, q: Tensor, k: Tensor, v: Tensor
) -> Iterator[tuple[str, Row, AttentionPlan, Callable[[], Tensor]]]:
    choice = choose("auto", q.device, q.dtype, q.shape[-1], part.recipe.precision)
    plan = plan_attention(
        layout, part.recipe.plan, order=part.recipe.order, impl=choice.impl, head_dim=q.shape[-1],
        precision=choice.precision.name, device=q.device,
    )  # fmt: skip

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return block_sparse_attention(
            q, k, v, plan.blocks, impl=choice.impl, precision=choice.precision
        )

    ordered = [_moved(x, plan.permutation) for x in (q, k, v)]
    with torch.no_grad():
        out = _moved(attend(*ordered), plan.inverse)
        error = sampled_errors(out, q, k, v, _visible(part, layout, q.device))
    for what, call in (
        ("all in", lambda: attend(*ordered)),
        ("all in, with order", lambda: _moved(
            attend(*(_moved(x, plan.permutation) for x in (q, k, v))), plan.inverse)),
    ):  # fmt: skip
        yield (
            f"{part.name}, {what}",
            Row(
                suite="wan", case=case, impl=choice.impl, recipe=f"{part.name}, {what}",
                density=plan.density, rel_l1=error[0], cosine=error[1], note=_words(part, plan, choice),
            ),
            plan, call,
        )  # fmt: skip


def _visible(part: Part, layout: TokenLayout, device) -> Callable[[Tensor], Tensor] | None:
    if not isinstance(part.recipe.plan, (Neighborhood, TileWindow)):
        return None
    lo, hi, coord = part.recipe.plan.resolve(layout.segments[0].shape).intervals(device)
    return lambda rows: (
        (lo[:, rows, None] <= coord[:, None]) & (coord[:, None] < hi[:, rows, None])
    ).all(0)


def _moved(x: Tensor, index: Tensor | None) -> Tensor:
    return x if index is None else x.index_select(1, index)


def _words(part: Part, plan: AttentionPlan, choice) -> str:
    """ "windows of 2x3x3 tiles of 7x9x6 tokens, fp8_tile, blocks 192x128"."""
    blocks = f"{choice.precision}, blocks {plan.blocks.block_q}x{plan.blocks.block_k}"
    if not isinstance(part.recipe.plan, (Neighborhood, TileWindow)):
        return blocks
    rule = part.recipe.plan.resolve(plan.layout.segments[0].shape)
    tiles = getattr(rule, "tiles", None)
    window = f"window {_times(rule.window)}, stride {_times(rule.stride)}"
    if tiles is not None:
        window = f"windows of {_times(tiles)} tiles of {_times(rule.stride)} tokens"
    return f"{window}, {blocks}"


def _times(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))


# -- a step -----------------------------------------------------------------------------------------


def step_rows(task: Task, *, combined: bool = False) -> list[Row]:
    """One row a variant, then the mean of each recipe. combined: blocks compiled and linear layers in 8 bits."""
    pipe, call = random_weights(
        task.model, (*task.size, task.frames), layers=task.layers, device=task.device, dtype=task.dtype
    )  # fmt: skip
    case = f"{task.case}, a step"
    stock, ms = _timed_step(pipe, call, task)
    rows = [Row(suite="wan", case=case, impl="stock", recipe=STOCK, ms=ms, peak_gib=_peak_gib())]
    more, words = (COMBINED, " + compile + fp8 linears") if combined else ({}, "")
    if combined:
        undo = compile_alone(pipe)
        compiled_ms = _timed_step(pipe, call, task)[1]
        undo()
        rows.append(Row(suite="wan", case=case, impl="stock", recipe="stock + compile", ms=compiled_ms,
                        baseline="stock", speedup=ms / compiled_ms, peak_gib=_peak_gib()))  # fmt: skip
    for recipe in task.recipes:
        parts, own = parts_of(recipe)
        mean = own * ms
        for part in parts:
            pipe.enable_visionfuse(part.recipe, **more)
            try:
                out, part_ms = _timed_step(pipe, call, task)
                report = visionfuse.report(pipe)
            finally:
                pipe.disable_visionfuse()
            mean += part.share * part_ms
            row = Row(suite="wan", case=case, impl="stock", recipe=part.name + words, ms=part_ms,
                      baseline="stock", speedup=ms / part_ms, peak_gib=_peak_gib())  # fmt: skip
            row.rel_l1, row.cosine = errors(out, stock)
            changes = [what for _, what in report.changes]
            if said := report.denoisers:
                row.impl, row.density = said[0].impl or "stock", said[0].density
                changes = [said[0].precision, *said[0].notes, *changes]
            row.note = "; ".join(filter(None, changes))
            rows.append(row)
        shares = ", ".join(f"{part.share:.0%} {part.name}" for part in parts)
        rows.append(
            Row(suite="wan", case=case, impl="schedule", recipe=f"{recipe.name}{words}, mean of {RUN} steps",
                ms=mean, baseline="stock", speedup=ms / mean,
                note=shares + (f", {own:.0%} stock" if own else ""))
        )  # fmt: skip
    return rows


def _timed_step(pipe: Any, call: Call, task: Task) -> tuple[Tensor, float]:
    """The latents after one step, and the median of its times in ms."""
    samples = []
    for _ in range(1 + task.repeats):
        if task.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        synchronize()
        start = time.perf_counter()
        out = call(pipe, 1)
        synchronize()
        samples.append((time.perf_counter() - start) * 1e3)
    return out, median(samples[1:])


def _peak_gib() -> float | None:
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None


def show(rows: list[Row]) -> None:
    """A table of one case."""
    table = Table(title=rows[0].case)
    for name in ("recipe", "runs in"):
        table.add_column(name)
    for name in ("ms", "speed-up", "density", "rel. L1", "peak GiB"):
        table.add_column(name, justify="right")
    for row in rows:
        cells = (row.ms, row.speedup, row.density, row.rel_l1, row.peak_gib)
        table.add_row(
            row.recipe or "stock", row.impl, *("" if x is None else f"{x:.4g}" for x in cells)
        )
    Console().print(table)

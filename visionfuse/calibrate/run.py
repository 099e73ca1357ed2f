"""Calibration: measure candidates, learn how much each part of a run matters, choose, and check.

1. One stock run a prompt measures every candidate in every attention call: e(candidate, layer, step), the
   relative L1 error of the output of attention (`measure`).
2. Errors of early steps grow, those of late ones hardly, and rounding, which is random, does less harm than pairs
   that are left out: for each class of blocks, phase and kind of candidate (dense or not), a run in which it alone
   takes one of the candidates tells the factor s from the sum of e to the error of the final picture (root mean
   square, 10^(-PSNR / 20)). The errors of a recipe are then predicted to add up: sum of s e.
3. The recipe of least time whose predicted error is inside the budget (`choose`).
4. It is run, and the budget of step 3 is corrected by what was predicted wrong, a few times. Rounding everywhere, whose
   error is less than the sum, is run as well where it would be faster than what was found.
5. Prompts that were never looked at tell what to expect.

Every run is kept in a journal as soon as it ends, so that an interrupted calibration goes on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from itertools import pairwise
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..kernels.plan import Dense, Segment, TokenLayout
from ..recipe import Recipe, Variant
from ..schedule import STOCK, Phase, Schedule
from ..sites import SITES, denoisers
from .choose import Group, Selection, choose, choose_in_order, uniform
from .journal import Journal
from .measure import Errors, MeasuringSession, block_classes, psnr
from .times import candidate_ms, setting_of, stock_ms

TRIES = 4  # of step 4
MOST_DB = 120.0  # what cannot be told from equal
NEVER = 1e6  # the error of a variant that could not be measured in a layer


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is calibrated, for which prompts, and how.

    call: arguments of the pipeline. phases: parts of equal length into which the run is cut. every, heads: only
    each so many-th step, and so many heads, are measured. batch: outputs at once, for times.
    """

    candidates: tuple[Variant, ...]
    prompts: tuple[str, ...]
    held_out: tuple[str, ...]
    call: dict[str, Any]
    steps: int
    phases: int = 5
    seed: int = 0
    every: int = 1
    heads: int | None = None
    batch: int = 1
    impl: str = "auto"

    def to_dict(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        values["candidates"] = [candidate.to_dict() for candidate in self.candidates]
        return json.loads(json.dumps(values))

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """The steps [start, end) of every phase."""
        ends = [round(i * self.steps / self.phases) for i in range(self.phases + 1)]
        return list(pairwise(ends))


@dataclass(frozen=True, kw_only=True)
class Part:
    """A class of blocks in a phase: one group of the choice. weights: s of the module docstring, by variant."""

    steps: tuple[int, int]
    block: str
    layers: tuple[int, ...]
    names: tuple[str, ...]  # of the variants, stock first
    times: tuple[float, ...]  # ms of one call, by variant
    rel_l1: np.ndarray  # mean over the steps, [layers, variants]
    weights: np.ndarray  # [variants]

    @property
    def group(self) -> Group:
        count = self.steps[1] - self.steps[0]
        return Group(
            times=tuple(count * ms for ms in self.times), errors=self.weights * self.rel_l1
        )


@dataclass(frozen=True, kw_only=True)
class Try:
    """A recipe that was run on the measured prompts. psnr: predicted, and as it came out, in dB."""

    selection: Selection
    recipe: Recipe
    predicted: float
    psnr: float


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """The outcome. held_out: PSNR of every prompt that was never looked at. times in ms of attention a run."""

    recipe: Recipe
    budget: float
    chosen: Try
    tries: tuple[Try, ...]
    parts: tuple[Part, ...]
    errors: Errors
    held_out: tuple[float, ...]
    left_out: dict[str, str]
    measured_times: bool

    @property
    def stock_ms(self) -> float:
        return sum(part.group.times[0] * len(part.layers) for part in self.parts)

    @property
    def ms(self) -> float:
        return self.chosen.selection.time


class Calibration:
    """One calibration of a pipeline. tell(job, done, of) hears of progress: jobs done, of at most so many."""

    def __init__(
        self,
        pipe: Any,
        task: Task,
        journal: Journal,
        tell: Callable[[str, float, int], None] = lambda job, done, of: None,
    ):
        found = list(denoisers(pipe))
        if not found:
            known = ", ".join(SITES)
            raise ValueError(f"{type(pipe).__name__} has no denoiser among {known}.")
        self.pipe, self.task, self.journal, self.tell = pipe, task, journal, tell
        site, model = found[0].site, found[0].model
        self.blocks = block_classes(model, site.layers(model))
        self.classes = tuple(dict.fromkeys(self.blocks))
        self.jobs = 0
        self.checks = 1  # recipes that will be run on held-out prompts

    @property
    def most_jobs(self) -> int:
        task = self.task
        kinds = len({isinstance(candidate.plan, Dense) for candidate in task.candidates})
        each = 1 + kinds * task.phases * len(self.classes) + TRIES + len(task.candidates)
        return len(task.prompts) * each + (1 + self.checks) * len(task.held_out)

    def run(self, budget: float, name: str = "calibrated", *, in_order: bool = False) -> Calibrated:
        """budget: the least PSNR to the stock output, in dB, mean over the prompts. in_order: the model's own
        attention, then the candidates one after another, in all layers: only where each ends is searched for."""
        parts = self.parts
        tries = self.search(budget, name, in_order)
        inside = [t for t in tries if t.psnr >= budget]
        if inside:
            chosen = min(inside, key=lambda t: (t.selection.time, -t.psnr))
        else:  # even the last corrections were not enough: what changes nothing
            chosen = self.attempt(self.select(0.0, in_order), name)
        return Calibrated(
            recipe=chosen.recipe, budget=budget, chosen=chosen, tries=tuple(tries), parts=parts,
            errors=self.errors, held_out=self.check(chosen.recipe), left_out=self.left_out,
            measured_times=self.measured_times,
        )  # fmt: skip

    def check(self, recipe: Recipe) -> tuple[float, ...]:
        """PSNR of a recipe on each prompt that was not measured."""
        return tuple(
            self.compare(recipe, prompt, f"held-out-{i}", 1000 + i)
            for i, prompt in enumerate(self.task.held_out)
        )

    # -- runs -----------------------------------------------------------------------------------------

    def draw(self, prompt: str, number: int, job: str) -> Tensor:
        """One output, in 0..1, fp32 on the CPU. The noise depends on the number of the prompt alone."""

        def stepped(pipe, step, time, values):
            self.tell(job, self.jobs + (step + 1) / self.task.steps, self.most_jobs)
            return values

        self.tell(job, self.jobs, self.most_jobs)
        generator = torch.Generator("cpu").manual_seed(self.task.seed + number)
        out = self.pipe(
            prompt, num_inference_steps=self.task.steps, generator=generator, output_type="pt",
            return_dict=False, callback_on_step_end=stepped, **self.task.call,
        )  # fmt: skip
        self.jobs += 1
        return torch.as_tensor(out[0]).float().cpu()

    def compare(self, recipe: Recipe, prompt: str, stock: str, number: int) -> float:
        """PSNR of a recipe's output to the stock one, which is drawn first where it is not known."""

        def draw_stock() -> bool:
            self.journal.keep(stock, self.draw(prompt, number, "stock, held-out prompt"))
            return True

        def with_recipe() -> float:
            self.pipe.enable_visionfuse(recipe, impl=self.task.impl)
            try:
                out = self.draw(prompt, number, f"check on prompt {number % 1000 + 1}")
            finally:
                self.pipe.disable_visionfuse()
            return min(psnr(out, self.journal.tensor(stock)), MOST_DB)

        self.journal.do(f"stock {stock}", draw_stock)
        facts = recipe.to_dict()
        facts = [facts[k] for k in ("variants", "schedule", "linear") if k in facts]
        what = sha256(json.dumps(facts).encode()).hexdigest()[:16]
        return self.journal.do(f"psnr {stock} {what}", with_recipe)

    def measure(self, index: int) -> dict[str, Any]:
        """The stock run of a prompt: its output, and what every candidate would have changed."""
        task = self.task
        first = frozenset(self.blocks.index(block) for block in self.classes)
        on_gpu = self.pipe._execution_device.type == "cuda"
        session = MeasuringSession(
            self.pipe, task.candidates, task.steps, impl=task.impl, every=task.every,
            heads=task.heads, timed=first if on_gpu and index == 0 else frozenset(),
            batch=task.batch,
        )  # fmt: skip
        with session:
            out = self.draw(task.prompts[index], index, f"candidates, prompt {index + 1}")
        if session.errors is None or session.layout is None:
            why = "; ".join(reason for ran in session.ran.values() for reason in ran.notes)
            raise ValueError(f"No attention of this model can follow a recipe here: {why}.")
        self.journal.keep(f"prompt-{index}", out)
        refused = {
            name: "; ".join(way.choice.precision_reasons) or way.reason
            for name, way in session.ways.items()
            if way.choice.precision_reasons or way.reason
        }
        return {
            "errors": session.errors.to_dict(), "refused": refused, "times": session.times,
            "shapes": session.shapes, "layout": [[s.kind, s.shape] for s in session.layout.segments],
        }  # fmt: skip

    # -- what they tell ---------------------------------------------------------------------------------

    @cached_property
    def measured(self) -> list[dict[str, Any]]:
        found = []
        for i in range(len(self.task.prompts)):
            found.append(self.journal.do(f"measure {i}", lambda i=i: _plain(self.measure(i))))
            self.journal.do(f"stock prompt-{i}", lambda: True)
        return found

    @cached_property
    def errors(self) -> Errors:
        return Errors.merged([one["errors"] for one in self.measured])

    @property
    def measured_times(self) -> bool:
        return bool(self.measured[0]["times"])

    @cached_property
    def left_out(self) -> dict[str, str]:
        """Candidates that cannot be chosen here, and why."""
        reasons = dict(self.measured[0]["refused"])
        for name, (_, why) in self.times[self.classes[0]].items():
            if why:
                reasons.setdefault(name, why)
        return reasons

    @cached_property
    def times(self) -> dict[str, dict[str, tuple[float, str]]]:
        """By class of blocks and variant: ms of one call, and why it is not known."""
        first = self.measured[0]
        layout = TokenLayout(tuple(Segment(kind, tuple(shape)) for kind, shape in first["layout"]))
        out = {}
        for block in self.classes:
            layer = str(self.blocks.index(block))
            if self.measured_times:
                out[block] = {name: (ms, "") for name, ms in first["times"][layer].items()}
                continue
            batch, heads, head_dim = first["shapes"][layer]
            setting = setting_of(
                layout, batch=batch * self.task.batch, heads=heads, head_dim=head_dim
            )
            out[block] = {STOCK: (stock_ms(setting), "")}
            for candidate in self.task.candidates:
                try:
                    out[block][candidate.name] = (candidate_ms(candidate, layout, setting), "")
                except ValueError as error:
                    out[block][candidate.name] = (0.0, str(error))
        return out

    @cached_property
    def usable(self) -> list[int]:
        """Candidates that were measured and have a time."""
        names = [candidate.name for candidate in self.task.candidates]
        found = [i for i, name in enumerate(names) if name not in self.left_out]
        if not found:
            raise ValueError(
                "None of the candidates can be chosen here: "
                + "; ".join(f"{name}: {why}" for name, why in self.left_out.items())
            )
        return found

    def mean_errors(self, start: int, end: int) -> np.ndarray:
        """rel_l1 over the steps [start, end), where some were left out that of the last one before them:
        [layers, candidates]."""
        steps = [step - step % self.task.every for step in range(start, end)]
        return self.errors.rel_l1[:, :, steps].mean(-1).T

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """The groups of the choice, with how much each of them matters."""
        usable = self.usable
        names = (STOCK, *(self.task.candidates[i].name for i in usable))
        probes = self.probes
        found = []
        for number, (start, end) in enumerate(self.task.bounds):
            errors = self.mean_errors(start, end)  # [layers, candidates]
            for block in self.classes:
                layers = tuple(i for i, own in enumerate(self.blocks) if own == block)
                weights = {
                    kind: self.weight(probe, number, layers, errors[:, probe])
                    for kind, probe in probes.items()
                }
                own = np.nan_to_num(errors[np.ix_(layers, usable)], nan=NEVER)
                found.append(
                    Part(
                        steps=(start, end), block=block, layers=layers, names=names,
                        times=tuple(self.times[block][name][0] for name in names),
                        rel_l1=np.concatenate([np.zeros((len(layers), 1)), own], axis=1),
                        weights=np.array([0.0, *(weights[self.kind(i)] for i in usable)]),
                    )
                )  # fmt: skip
        return tuple(found)

    def kind(self, candidate: int) -> bool:
        """Whether a candidate is dense, so that all its errors are those of rounding."""
        return isinstance(self.task.candidates[candidate].plan, Dense)

    @property
    def probes(self) -> dict[bool, int]:
        """Of each kind of candidate the one of middling error."""
        means = {i: float(np.nanmean(self.errors.rel_l1[i])) for i in self.usable}
        by_error = sorted(self.usable, key=lambda i: means[i])
        kinds = {kind: [i for i in by_error if self.kind(i) == kind] for kind in (True, False)}
        return {kind: own[len(own) // 2] for kind, own in kinds.items() if own}

    def weight(self, probe: int, number: int, layers: tuple[int, ...], errors: np.ndarray) -> float:
        """Error of the output by sum of errors of these layers in this phase, from a run in which they alone take
        the candidate `probe`."""
        known = tuple(i for i in layers if not np.isnan(errors[i]))
        if not known:
            return 0.0
        recipe = self.alone(probe, number, known)
        db = fmean(
            self.compare(recipe, prompt, f"prompt-{i}", i)
            for i, prompt in enumerate(self.task.prompts)
        )
        return 10 ** (-db / 20) / float(errors[list(known)].sum())

    def alone(self, candidate: int, number: int, layers: tuple[int, ...]) -> Recipe:
        """The candidate in one class of blocks in one phase, and the model's own attention everywhere else."""
        chosen = self.task.candidates[candidate]
        phases = [
            Phase(
                until=end / self.task.steps,
                variant=STOCK,
                layers=((chosen.name, layers),) if i == number else (),
            )
            for i, (_, end) in enumerate(self.task.bounds)
        ]
        schedule = Schedule(phases=tuple(phases), min_steps=0)
        return Recipe(variants=(chosen,), schedule=schedule)

    # -- the choice ---------------------------------------------------------------------------------------

    def select(self, budget: float, in_order: bool) -> Selection:
        """budget: of predicted errors."""
        groups = [part.group for part in self.parts]
        if not in_order:
            return choose(groups, budget)
        size = len(self.classes)  # of a phase
        return choose_in_order([groups[i : i + size] for i in range(0, len(groups), size)], budget)

    def search(self, budget: float, name: str, in_order: bool = False) -> list[Try]:
        """Choose, run, correct the budget of the choice by what was predicted wrong, and again."""
        tries: list[Try] = []
        target = budget
        for number in range(1, TRIES + 1):
            found = self.attempt(self.select(10 ** (-target / 20), in_order), name)
            if any(t.recipe == found.recipe for t in tries):
                break
            tries.append(found)
            missed = budget - found.psnr  # what was predicted wrong once may be again
            target += missed * (number if missed > 0 else 1)
        if not in_order:
            groups = [part.group for part in self.parts]
            inside = [t.selection.time for t in tries if t.psnr >= budget]
            least = min([uniform(groups, 0).time, *inside])
            for variant, candidate in enumerate(self.usable, 1):
                alone = uniform(groups, variant)
                if self.kind(candidate) and alone.time < least:
                    tries.append(self.attempt(alone, name))
        return tries

    def attempt(self, selection: Selection, name: str) -> Try:
        recipe = to_recipe(self.task, self.parts, selection, name)
        measured = fmean(
            self.compare(recipe, prompt, f"prompt-{i}", i)
            for i, prompt in enumerate(self.task.prompts)
        )
        predicted = -20 * float(np.log10(max(selection.error, 10 ** (-MOST_DB / 20))))
        return Try(selection=selection, recipe=recipe, predicted=predicted, psnr=measured)


def to_recipe(task: Task, parts: Sequence[Part], selection: Selection, name: str) -> Recipe:
    """The choice as phases: neighbours that run the same become one."""
    per_phase: dict[tuple[int, int], dict[int, str]] = {}
    for part, chosen in zip(parts, selection.variants, strict=True):
        layers = per_phase.setdefault(part.steps, {})
        layers |= {i: part.names[v] for i, v in zip(part.layers, chosen, strict=True)}
    phases: list[Phase] = []
    for (_, end), layers in per_phase.items():
        names = [layers[i] for i in sorted(layers)]
        most = max(dict.fromkeys(names), key=names.count)
        others = {
            other: tuple(i for i, own in enumerate(names) if own == other)
            for other in dict.fromkeys(names)
            if other != most
        }
        phase = Phase(until=end / task.steps, variant=most, layers=tuple(others.items()))
        if phases and replace(phases[-1], until=phase.until) == phase:
            phases.pop()
        phases.append(phase)
    used = {used for phase in phases for used in phase.names}
    return Recipe(
        name=name,
        variants=tuple(c for c in task.candidates if c.name in used),
        schedule=Schedule(phases=tuple(phases), min_steps=min(task.steps, Schedule().min_steps)),
    )


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """As it will be read from the journal: keys are text, tuples are lists."""
    return json.loads(json.dumps(values))

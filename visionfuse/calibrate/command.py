"""`visionfuse calibrate`: the recipe of least time whose output stays near the stock one.

Any diffusers pipeline with a site: images or videos. `run` says what is measured and how it is chosen.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..recipe import Variant
    from .compare import Row
    from .run import Calibrated, Calibration, Task

CANDIDATES = (
    "sage,dense precision=fp8,gna density=0.75,gna density=0.5,gna density=0.3,"
    "gna density=0.5 precision=int8_fp8,gna density=0.3 precision=int8_fp8"
)
# Of the model that ships with the project: what it was made for, instead of the pipeline's defaults.
MICRO_CALL = {"height": 256, "width": 256, "max_sequence_length": 64}


def calibrate(
    model: Annotated[
        str | None, typer.Argument(help="Folder or Hugging Face name; default: the shipped model.")
    ] = None,
    budget: Annotated[
        float, typer.Option(help="Least PSNR to the stock output, in dB, mean over prompts.", min=0)
    ] = 45.0,
    linear: Annotated[
        str | None,
        typer.Option(
            help="fp8 or int8: also choose linear layers to round, inside the same budget."
        ),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="One prompt a line; default: captions of the shipped model.")
    ] = None,
    measure: Annotated[int, typer.Option(help="Prompts that are measured.", min=1)] = 2,
    held_out: Annotated[
        int, typer.Option(help="Prompts after those, which only check the result.", min=0)
    ] = 4,
    candidates: Annotated[
        str, typer.Option(help="Recipes with options, separated by commas.")
    ] = CANDIDATES,
    in_order: Annotated[
        bool,
        typer.Option(
            "--in-order",
            help="Run the candidates one after another, as fps does: find only where each ends.",
        ),
    ] = False,
    by_head: Annotated[
        float | None,
        typer.Option(
            help="Instead of a budget: tile windows for every head that visit this share of all pairs.",
            min=0.0,
            max=1.0,
        ),
    ] = None,
    phases: Annotated[int, typer.Option(help="Parts into which a run is cut.", min=1)] = 5,
    steps: Annotated[int, typer.Option(help="Denoising steps.", min=1)] = 20,
    height: Annotated[int | None, typer.Option(help="Pixels.", min=16)] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.", min=16)] = None,
    frames: Annotated[int | None, typer.Option(help="Of a video.", min=1)] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.")] = None,
    max_sequence_length: Annotated[int | None, typer.Option(help="Text tokens.", min=1)] = None,
    batch: Annotated[
        int, typer.Option(help="Times are those of so many outputs at once.", min=1)
    ] = 1,
    every: Annotated[
        int,
        typer.Option(help="Measure each so many-th step; others count as the one before.", min=1),
    ] = 1,
    heads: Annotated[
        int | None, typer.Option(help="Measure so many heads; default: all.", min=1)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the noise, and of the default captions.")] = 0,
    impl: Annotated[str, typer.Option(help="Attention implementation.")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32.")] = None,
    offload: Annotated[bool, typer.Option(help="Keep idle parts in CPU memory.")] = False,
    out: Annotated[Path, typer.Option(help="Where the recipe goes.")] = Path("recipe.json"),
    plot: Annotated[
        Path | None, typer.Option(help="A picture of every error by layer and step.")
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(
            help="Run each candidate alone on the held-out prompts too; rows go to this CSV."
        ),
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on where an earlier one stopped.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Say what would run, and run nothing.")] = False,
) -> None:
    """Measure attention variants on a few prompts, and choose which runs when: a recipe inside an error budget.

    Results are kept beside --out until you delete them: an interrupted calibration goes on with --resume, and
    another --budget needs only the runs that check it.
    """
    from ..cli import MICRO, console, user_errors
    from ..linears import Linears

    with user_errors():
        if out.suffix != ".json":
            raise ValueError(f"--out must name a .json file, got {out}.")
        given = {
            "height": height, "width": width, "num_frames": frames, "guidance_scale": guidance,
            "max_sequence_length": max_sequence_length,
        }  # fmt: skip
        shipped = model is None or Path(model).resolve() == MICRO.resolve()
        if model is None and not MICRO.is_dir():
            raise ValueError("The shipped model is not here; name a folder or a model on the Hub.")
        call = (MICRO_CALL if shipped else {}) | {k: v for k, v in given.items() if v is not None}
        linears = Linears.of(linear)
        texts = read_prompts(prompts, measure + held_out, seed, shipped)
        from .journal import Journal
        from .linears import run_with_linears
        from .run import Calibration, Task

        task = Task(
            candidates=parse_candidates(candidates), prompts=texts[:measure],
            held_out=texts[measure:], call=call, steps=steps, phases=min(phases, steps), seed=seed,
            every=every, heads=heads, batch=batch, impl=impl,
        )  # fmt: skip
        if dry_run:
            for line in expected(task, budget):
                console.print(line, markup=False, highlight=False, soft_wrap=True)
            return
        if by_head is not None:
            if in_order or linear or plot or compare or resume:
                raise ValueError(
                    "--by-head goes without --in-order, --linear, --plot, --compare and --resume."
                )
            found_by_head(str(model or MICRO), task, by_head, dtype, offload, out)
            return
        folder = out.with_suffix(".calibration")
        settings = task.to_dict() | {"model": str(model or MICRO.name), "dtype": dtype}
        journal = Journal(folder, settings, resume=resume)
        pipe = load(str(model or MICRO), dtype, offload)
        check_call(pipe, call)
        try:
            with progress() as tell:
                calibration = Calibration(pipe, task, journal, tell)
                calibration.checks += len(task.candidates) * (compare is not None)
                if linears is None:
                    found, more = calibration.run(budget, out.stem, in_order=in_order), ""
                else:
                    found, more = run_with_linears(
                        calibration, linears, budget, out.stem, in_order=in_order
                    )
                rows = side_by_side(calibration, found, str(model or MICRO)) if compare else []
        except KeyboardInterrupt:
            console.print(f"Stopped. What ran is kept in {folder}: --resume goes on.",
                          highlight=False, soft_wrap=True)  # fmt: skip
            raise typer.Exit(130) from None
        save(found, task, str(model or MICRO), gpu_of(pipe, found), out, more)
        if plot:
            from .show import plot as draw

            plot.parent.mkdir(parents=True, exist_ok=True)
            draw(found, [candidate.name for candidate in task.candidates], plot)
            console.print(f"Picture: {plot}", highlight=False, soft_wrap=True)
        if compare:
            from . import compare as comparison

            console.print(comparison.table(rows))
            comparison.write(rows, compare)
            console.print(f"Rows: {compare}", highlight=False, soft_wrap=True)


def found_by_head(
    model: str, task: Task, density: float, dtype: str | None, offload: bool, out: Path
) -> None:
    """The recipe of `heads.windows_by_head`, saved."""
    from ..cli import console
    from .heads import windows_by_head

    pipe = load(model, dtype, offload)
    check_call(pipe, task.call)
    with progress() as tell:
        recipe, _ = windows_by_head(pipe, task, density, tell)
    recipe = replace(recipe, name=out.stem)
    out.parent.mkdir(parents=True, exist_ok=True)
    recipe.save(out)
    ends = ", ".join(f"{phase.until:.0%}" for phase in recipe.schedule.phases)
    for line in (recipe.note, f"Phases end after {ends} of the run.", f"Recipe: {out}"):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def parse_candidates(text: str) -> tuple[Variant, ...]:
    """ "sage, gna density=0.5 precision=fp8" as variants, named as they are written; of "fps" those of its phases."""
    from ..cli import parse_options
    from ..recipe import Variant
    from ..recipes import build

    found: dict[str, Variant] = {}
    for part in text.split(","):
        name, *pairs = part.split()
        try:
            recipe = build(name, **parse_options(pairs))
        except TypeError as error:  # an unknown option is the user's mistake, as a wrong value is
            raise ValueError(str(error)) from error
        written = " ".join([name, *pairs])
        own = [replace(way, name=f"{written} {way.name}") for way in recipe.variants]
        for variant in own or [Variant(name=written, plan=recipe.plan, precision=recipe.precision)]:
            if not variant.changes_numbers:
                raise ValueError(f"The candidate {variant.name!r} is the model's own attention.")
            found[variant.name] = variant
    return tuple(found.values())


def read_prompts(path: Path | None, count: int, seed: int, shipped: bool) -> tuple[str, ...]:
    """So many prompts, from the lines of a file."""
    if path is None:
        if not shipped:
            raise ValueError(
                "Give --prompts, a file with one prompt a line: only the shipped model has some."
            )
        from ..shapes import held_out_scenes

        return tuple(scene.text for scene in held_out_scenes(count, seed=seed))
    texts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(texts) < count:
        raise ValueError(f"{path} has {len(texts)} prompts, --measure and --held-out need {count}.")
    return tuple(texts[:count])


def expected(task: Task, budget: float) -> list[str]:
    """What a calibration would run."""
    runs = f"{len(task.prompts)} x (1 stock run with all candidates beside it, 1 run for each of "
    runs += f"{task.phases} phases, class of blocks and kind of candidate, up to 4 checks)"
    sizes = ", ".join(f"{name} {value}" for name, value in task.call.items())
    return [
        f"Runs of {task.steps} steps ({sizes}): {runs} + {len(task.held_out)} x 2 on held-out prompts",
        *(f"Candidate: {candidate.name}" for candidate in task.candidates),
        f"Budget: {budget:g} dB",
    ]


def load(model: str, dtype: str | None, offload: bool):
    """The pipeline on its device."""
    import torch
    from diffusers import DiffusionPipeline

    from ..info import default_device, default_dtype

    device = default_device()
    kind = getattr(torch, dtype or "", None) if dtype else default_dtype(device)
    if not isinstance(kind, torch.dtype):
        raise ValueError(f"Unknown dtype {dtype!r}. Choose bfloat16, float16 or float32.")
    pipe = DiffusionPipeline.from_pretrained(model, dtype=kind)
    pipe.set_progress_bar_config(disable=True)
    if offload:
        pipe.enable_model_cpu_offload(device=device)
        return pipe
    return pipe.to(device)


def check_call(pipe: Any, call: dict[str, Any]) -> None:
    known = signature(type(pipe).__call__).parameters
    if unknown := [name for name in call if name not in known]:
        raise ValueError(f"{type(pipe).__name__} takes no {', '.join(unknown)}.")
    # Pipelines round sides down by themselves, some with no more than a warning in their log.
    pixels = getattr(pipe, "vae_scale_factor", getattr(pipe, "vae_scale_factor_spatial", 1))
    for name in ("height", "width"):
        if call.get(name, pixels) % pixels:
            raise ValueError(
                f"{name}={call[name]} is no multiple of {pixels}, the pixels of a latent."
            )


@contextmanager
def progress():
    """A bar that counts pipeline runs, and steps inside them; gives `tell` of `Calibration`."""
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from ..cli import console

    columns = (
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f}%"),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bars:
        bar = bars.add_task("loading", total=None)

        def tell(job: str, done: float, of: int) -> None:
            bars.update(bar, description=job, completed=done, total=of)

        yield tell


def gpu_of(pipe: Any, found: Calibrated) -> str:
    """The GPU that the times are of."""
    from ..info import device_name
    from ..simulate import H200

    return device_name(pipe._execution_device) if found.measured_times else H200.name


def case_of(task: Task, model: str) -> str:
    """ "flux-micro, 512x512, 20 steps"."""
    sizes = "x".join(str(task.call[k]) for k in ("num_frames", "height", "width") if k in task.call)
    return ", ".join(filter(None, [Path(model).name, sizes, f"{task.steps} steps"]))


def side_by_side(calibration: Calibration, found: Calibrated, model: str) -> list[Row]:
    from .compare import compare

    how = "measured" if found.measured_times else "predicted"
    times = f"{how}, {gpu_of(calibration.pipe, found)}, batch {calibration.task.batch}"
    return compare(calibration, found, case_of(calibration.task, model), times)


def save(found: Calibrated, task: Task, model: str, gpu: str, out: Path, more: str = "") -> None:
    """The recipe, with a note of where it comes from, and the summary on the terminal; more: of linear layers."""
    from statistics import fmean

    from ..cli import console
    from . import show

    how = "measured on" if found.measured_times else "predicted for"
    note = (
        f"Calibrated for {case_of(task, model)}: attention {found.stock_ms / found.ms:.2f}x, {how} "
        f"{gpu} at batch {task.batch}; PSNR to stock {found.chosen.psnr:.1f} dB on {len(task.prompts)} "
        "measured prompts"
    )
    if found.held_out:
        note += f", {fmean(found.held_out):.1f} dB on {len(found.held_out)} others"
    note += f"; budget {found.budget:g} dB." + f" {more}." * bool(more)
    recipe = replace(found.recipe, note=note)
    out.parent.mkdir(parents=True, exist_ok=True)
    recipe.save(out)
    console.print(show.table(found))
    for line in [*show.lines(found, gpu), *[more] * bool(more)]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(f"Recipe: {out}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    typer.run(calibrate)

"""`visionfuse bench attention`: the options. What they import, they import when they run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def attention(
    shapes: Annotated[
        str, typer.Option(help="Names such as flux-2k,wan-720p, or all; --dry-run lists them.")
    ] = "all",
    impl: Annotated[
        str | None,
        typer.Option(help="Only these beside the baseline, e.g. triton,natten; default: by case."),
    ] = None,
    flex: Annotated[
        bool, typer.Option("--flex", help="FlexAttention too; compiles for 20 s a case.")
    ] = False,
    csv: Annotated[
        Path | None, typer.Option(help="Write rows here, case by case; others that it has stay.")
    ] = None,
    repeats: Annotated[
        int | None,
        typer.Option(help="Runs of each; default: what fits 0.15 s, on a CPU 0.5 s.", min=1),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            help="Leave out cases not expected to end by then; default on a GPU: 75, with --flex 540."
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu; default: what there is.")] = None,
    commit: Annotated[str, typer.Option(help="For the CSV, where there is no git.")] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would run, and run nothing.")
    ] = False,
) -> None:
    """Attention by name of shape: speed and error of every implementation, in one run with cuDNN.

    Exit code 1: something failed or was wrong; its row has no time and says why.
    """
    from visionfuse.cli import user_errors

    with user_errors():
        from visionfuse.bench import attention as benchmark

        place = _bench_device(device, dry_run)
        names = [] if shapes == "all" else _names(shapes)
        cases = benchmark.choose_cases(place, names)
        if seconds is None and place.type == "cuda":
            seconds = 540.0 if flex else 75.0
        settings = benchmark.Settings(
            device=place, impls=benchmark.check_impls(_names(impl or "")), flex=flex,
            repeats=repeats, seconds=seconds,
        )  # fmt: skip
        if dry_run:
            _print_bench_plan(cases, settings)
            return
        rows = _run_bench(cases, settings, csv, commit)
    if any(benchmark.went_wrong(row) for row in rows):
        raise typer.Exit(1)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _bench_device(name: str | None, dry_run: bool):
    import torch

    here = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in (None, "cuda", "cpu"):
        raise ValueError(f"--device is cuda or cpu, not {name!r}.")
    if name == "cuda" and here != "cuda" and not dry_run:
        raise ValueError("--device cuda: there is no GPU here. --dry-run says what would run.")
    return torch.device(name or here)


def _run_bench(cases, settings, csv: Path | None, commit: str) -> list:
    from visionfuse.bench import attention as benchmark
    from visionfuse.bench.table import as_text, show_rows, update_csv
    from visionfuse.cli import console

    suite = "attention" if settings.device.type == "cuda" else "attention-cpu"
    rows = []
    for done, (case, found) in enumerate(benchmark.run(cases, settings, suite=suite), 1):
        if not found:
            console.print(f"[{done}/{len(cases)}] {case.name}: left out, --seconds is used up",
                          markup=False, highlight=False, soft_wrap=True)  # fmt: skip
        for row in found:
            text = f"{as_text(row.ms)} ms, error {as_text(row.rel_l1)}" if row.ms else row.note
            console.print(f"[{done}/{len(cases)}] {case.name}: {row.impl}: {text}",
                          markup=False, highlight=False, soft_wrap=True)  # fmt: skip
        results = [row for row in found if benchmark.is_result(row)]
        if csv and results:
            update_csv(results, csv, commit=commit)
        rows += found
    for name in settings.impls:
        own = [row for row in rows if row.impl == name]
        if own and not any(benchmark.is_result(row) for row in own):
            reasons = "; ".join(dict.fromkeys(row.note for row in own))
            raise ValueError(f"--impl {name} runs in none of these cases: {reasons}.")
    show_rows(
        [row for row in rows if benchmark.is_result(row)],
        title=f"Attention on {settings.device.type}",
    )
    if csv:
        console.print(f"Rows: {csv}", soft_wrap=True, highlight=False)
    return rows


def _print_bench_plan(cases, settings) -> None:
    from visionfuse.bench import attention as benchmark
    from visionfuse.cli import console

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    total = benchmark.start_seconds(settings.device)
    itemsize = 2 if settings.device.type == "cuda" else 4
    for case in cases:
        shape = f"{case.batch}x{case.layout.length}x{case.heads}x{case.head_dim}"
        say(
            f"{case.name}: {shape}, density {case.density:.1%}, "
            f"{case.tensor_bytes(itemsize) / 1e6:.0f} MB, {case.flops / 1e9:.0f} GFLOP visible of "
            f"{case.flops / case.density / 1e9:.0f}"
        )
        for line in benchmark.expect(case, settings):
            total += line.seconds
            does = "; ".join(line.reasons) or f"about {line.ms:.3g} ms, {line.runs} runs"
            say(f"  {line.impl:<12}{does}")
    limit = "" if settings.seconds is None else f"; --seconds {settings.seconds:g}"
    say(f"About {total:.0f} s in all, by guessed speeds{limit}.")

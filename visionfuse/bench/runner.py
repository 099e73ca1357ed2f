"""Runs a suite: every line of its bar, each beside its baseline in the same run.

Every result is compared with float64 on sampled queries before it is timed; in 16 bits it may have twice
cuDNN's own error. The baseline runs again before each run of each candidate, so that both meet the same
clocks; medians are compared, and the note says at which clock and power. A plan with a mask is compared
with lists of as many whole blocks. `bars.py` says what is asked of every row.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .accuracy import sampled_errors
from .cases import BASELINE
from .clocks import sampled_clocks
from .suite import Candidate, Suite, Work
from .table import Row
from .timing import time_in_turns

SECONDS = {"cuda": 0.3, "cpu": 0.05}  # of measurement per candidate, besides the baseline's
LEAST, MOST = 3, 30  # runs
TURN_S = 0.1  # of calls without a pause: the power limit lowers the clock within milliseconds
# Relative L1 error above which a row is refused. 16 bits: twice cuDNN's on normal data, or of that very run.
MOST_ERROR = {"bf16": 4.6e-3, "fp32": 1e-5, "fp8": 0.08, "int8_fp8": 0.06, "int8": 0.02,
              "int8_fp8+smooth_q": 0.06, "int8_fp8+k_thread": 0.06}  # fmt: skip
_ERRORS = (RuntimeError, ImportError, ValueError, TypeError, AttributeError, AssertionError)


def choose_works(suite: Suite, device: torch.device, keys: list[str]) -> list[Work | str]:
    """The works of these keys, in their order here; all of them without keys. Keys of `more` are themselves."""
    gpu = device.type == "cuda"
    known: dict[str, Work | str] = {w.key: w for w in (suite.works if gpu else suite.tiny)}
    if gpu:
        known |= {key: key for key in suite.more}
    if unknown := [key for key in keys if key not in known]:
        raise ValueError(
            f"Unknown line {', '.join(map(repr, unknown))} on {device.type}. "
            f"Choose from {', '.join(known)}."
        )
    return [work for key, work in known.items() if not keys or key in keys]


def expect(suite: Suite, work: Work | str) -> list[str]:
    """What would run, a line each, and what is asked of it; nothing is allocated."""
    from .bars import BARS

    bars = BARS[suite.name]
    if isinstance(work, str):
        return [f"{work}:", *(f"  {bar.work}: {bar.asked}" for bar in bars if bar.group == work)]
    lines = [f"{work.key}: {work.name}"]
    for impl, recipes in ((work.impl, work.recipes), ("triton", work.portable)):
        for recipe in recipes:
            asked = [
                f", {bar.asked}"
                for bar in bars
                if bar.case == work.name and bar.impl in ("", impl) and recipe in bar.recipes
            ]
            lines.append(f"  {impl} {recipe}{''.join(asked)}")
    return lines


class DeviceLostError(RuntimeError):
    """An illegal memory access spoils every later call of a process. rest: keys that it left unmeasured."""

    def __init__(self, rest: list[str]):
        super().__init__("The device is lost to this process.")
        self.rest = rest


def run(
    suite: Suite, works: list[Work | str], device: torch.device, *, seconds: float | None = None
) -> Iterator[list[Row]]:
    """The rows of every work, as they are measured. seconds: instead of `SECONDS`."""
    each = SECONDS[device.type] if seconds is None else seconds
    for index, work in enumerate(works):
        try:
            rows = (
                suite.more[work](device, each)
                if isinstance(work, str)
                else measure(suite, work, device, each)
            )
        except _ERRORS as error:  # one broken line must not cost the others their rows
            name = work if isinstance(work, str) else work.name
            yield [Row(suite=suite.name, case=name, impl="", note=_failure(error))]
            if _is_lost(device):
                rest = [w if isinstance(w, str) else w.key for w in works[index + 1 :]]
                raise DeviceLostError(rest) from error
            continue
        yield rows
        if device.type == "cuda":
            torch.cuda.empty_cache()


@torch.no_grad()
def measure(suite: Suite, work: Work, device: torch.device, seconds: float) -> list[Row]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(work.shape, generator=generator, device=device, dtype=dtype) for _ in range(3)
    )
    found: dict[str, Candidate] = {}
    rows: dict[str, Row] = {}
    most = dict(MOST_ERROR)
    for c in suite.make(work, q, k, v):
        rows[c.name] = row = Row(
            suite=suite.name, case=work.name, impl=c.impl, recipe=c.recipe, density=c.density,
            note="; ".join(c.reasons) or c.note,
        )  # fmt: skip
        if not c.reasons and _passes(c, row, q, k, v, most):
            found[c.name] = c
        if c.name == BASELINE and row.rel_l1 and device.type == "cuda":
            most["bf16"] = max(most["bf16"], 2 * row.rel_l1)
    with sampled_clocks(device) as clocks:
        times = time_in_turns(
            {name: c.call for name, c in found.items()}, device=device, seconds=seconds,
            least=LEAST if seconds else 1, most=MOST, between=BASELINE if BASELINE in found else None,
            turn=TURN_S if seconds else 0.0,
        )  # fmt: skip
    for name, timing in times.items():
        row, c = rows[name], found[name]
        row.ms, row.ms_p20, row.ms_p80 = timing.ms, timing.ms_p20, timing.ms_p80
        pairs = work.batch * work.heads * work.tokens**2
        row.tflops_visited = 4e-9 * work.head_dim * pairs * c.visited / timing.ms
        if name != c.baseline and c.baseline in times:
            base = found[c.baseline].work / times[c.baseline].ms
            row.baseline, row.speedup = c.baseline, c.work / timing.ms / base
        row.note = "; ".join(filter(None, (row.note, str(clocks))))
    return list(rows.values())


def _passes(c: Candidate, row: Row, q, k, v, most: dict[str, float]) -> bool:
    """Whether it may be timed. Its error goes into the row; what fails or is wrong is said there."""
    try:
        out = c.call()
        out = out if c.inverse is None else out[:, c.inverse]
        row.rel_l1, row.cosine = sampled_errors(out, q, k, v, c.visible)
        del out
        limit = most.get(c.recipe.partition(", ")[0], MOST_ERROR["bf16"])
        if not row.rel_l1 <= limit:  # NaN is not
            row.note = f"REFUSED: relative L1 error {row.rel_l1:.3g} is above {limit:.3g}"
            return False
        if q.is_cuda:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            c.call()
            row.peak_gib = (torch.cuda.max_memory_allocated() - before) / 2**30
    except _ERRORS as error:
        if _is_lost(q.device):
            raise
        row.note = _failure(error)
        return False
    return True


def went_wrong(row: Row) -> bool:
    return row.note.startswith(("REFUSED", "FAILED"))


def _failure(error: Exception) -> str:
    return f"FAILED: {type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def _is_lost(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False

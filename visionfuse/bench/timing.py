"""Timing of alternatives side by side: median, 20th and 80th percentile, in turns."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

# More than the L2 cache of any GPU: writing it evicts what the last run left there.
L2_BYTES = 256 << 20
# A call that waits for the GPU itself takes longer, and idling does not help it.
LONGEST_LAUNCH_S = 0.02
SHORTEST_STEADY_MS = 1.0  # of a call; below, Python's share shows when calls follow one another


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Milliseconds of one call."""

    ms: float
    ms_p20: float
    ms_p80: float


def time_in_turns(
    calls: dict[str, Callable[[], object]],
    *,
    device: torch.device | str,
    seconds: float = 0.5,
    least: int = 3,
    most: int = 50,
    between: str | None = None,
    turn: float = 0.0,
) -> dict[str, Timing]:
    """Time every call, one after another in rounds, so that drifting clocks touch all alike.

    Each takes about `seconds`, at least `least` and at most `most` runs after a warm-up. On a GPU times
    come from events, and the L2 cache is cold; elsewhere from the wall clock. between: the call that runs
    again before each of the others: a baseline that all are compared with. turn: a run of a call of a
    millisecond or more on a GPU is so many seconds of calls without a pause, of which the second half is
    timed: under a power limit every call then has the clock that it has in use.
    """
    device = torch.device(device)
    once = _event_timer(device) if device.type == "cuda" else _wall_timer
    samples: dict[str, list[float]] = {}
    for name, call in calls.items():
        call()
        samples[name] = [once(call)]
    first = {name: times[0] for name, times in samples.items()}
    steady = device.type == "cuda" and turn > 0
    timers = {
        name: partial(_steady_timer, repeats=max(2, round(turn * 1e3 / ms)))
        if steady and ms >= SHORTEST_STEADY_MS
        else once
        for name, ms in first.items()
    }
    run_ms = {name: ms if timers[name] is once else turn * 1e3 for name, ms in first.items()}
    rounds = {
        name: min(most, max(least, round(seconds * 1e3 / max(ms, 1e-3))))
        for name, ms in run_ms.items()
        if name != between or len(samples) == 1
    }
    for number in range(max(rounds.values(), default=0)):
        for name in rounds:
            if number < rounds[name]:
                if between is not None and name != between:
                    samples[between].append(timers[between](calls[between]))
                samples[name].append(timers[name](calls[name]))
    return {name: _summary(times[1:]) for name, times in samples.items()}


def _summary(times: list[float]) -> Timing:
    low, middle, high = torch.tensor(times, dtype=torch.float64).quantile(
        torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    ).tolist()  # fmt: skip
    return Timing(ms=middle, ms_p20=low, ms_p80=high)


def _wall_timer(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def _steady_timer(call: Callable[[], object], repeats: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    skipped = repeats // 2
    for run in range(repeats):
        if run == skipped:
            start.record()
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / (repeats - skipped)


def _event_timer(device: torch.device) -> Callable[[Callable[[], object]], float]:
    flush = torch.empty(L2_BYTES, dtype=torch.int8, device=device)
    launch_s: dict[int, float] = {}

    def once(call: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        # The GPU idles until the launch is queued, so that what is timed is the work, not Python: for a
        # millisecond, and for a call that takes longer to launch, twice as long as it took last time.
        torch.cuda._sleep(int(2e9 * max(1e-3, 2 * launch_s.get(id(call), 0.0))))
        start.record()
        before = time.perf_counter()
        call()
        launch_s[id(call)] = min(time.perf_counter() - before, LONGEST_LAUNCH_S)
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return once

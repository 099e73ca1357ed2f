"""Timing of alternatives side by side: median, 20th and 80th percentile, in turns."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

# More than the L2 cache of any GPU: writing it evicts what the last run left there.
L2_BYTES = 256 << 20
# A call that waits for the GPU itself takes longer, and idling does not help it.
LONGEST_LAUNCH_S = 0.02


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
) -> dict[str, Timing]:
    """Time every call, one after another in rounds, so that drifting clocks touch all alike.

    Each takes about `seconds`, at least `least` and at most `most` runs after a warm-up. On a GPU times
    come from events, and the L2 cache is cold; elsewhere from the wall clock. between: the call that runs
    again before each of the others: a baseline that all are compared with.
    """
    device = torch.device(device)
    once = _event_timer(device) if device.type == "cuda" else _wall_timer
    samples: dict[str, list[float]] = {}
    for name, call in calls.items():
        call()
        samples[name] = [once(call)]
    rounds = {
        name: min(most, max(least, round(seconds * 1e3 / max(first[0], 1e-3))))
        for name, first in samples.items()
        if name != between or len(samples) == 1
    }
    for turn in range(max(rounds.values(), default=0)):
        for name in rounds:
            if turn < rounds[name]:
                if between is not None and name != between:
                    samples[between].append(once(calls[between]))
                samples[name].append(once(calls[name]))
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

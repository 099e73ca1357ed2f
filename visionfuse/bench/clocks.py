"""SM clock and power of the GPU while something runs, as nvidia-smi samples them in a process of its own.

A GPU at its power limit lowers its clock, so a time means little without both.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from threading import Thread

import torch

EVERY_MS = 50


class Samples(list[tuple[float, float]]):
    """(MHz, W) of every sample."""

    def __str__(self) -> str:
        if not self:
            return ""
        clock, power = (median(values) for values in zip(*self, strict=True))
        return f"SM {clock:.0f} MHz, {power:.0f} W"


@contextmanager
def sampled_clocks(device: torch.device) -> Iterator[Samples]:
    """Samples that grow while the block runs; none without an NVIDIA GPU or nvidia-smi."""
    samples = Samples()
    process = _start(device)
    if process is None:
        yield samples
        return
    reader = Thread(target=_read, args=(process, samples), daemon=True)
    reader.start()
    try:
        yield samples
    finally:
        process.terminate()
        process.wait()
        reader.join()


def _start(device: torch.device) -> subprocess.Popen[str] | None:
    if device.type != "cuda" or torch.version.hip:
        return None
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", "")
    try:
        return subprocess.Popen(
            ["nvidia-smi", *(["-i", f"GPU-{uuid}"] if uuid else []), "-lms", str(EVERY_MS),
             "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits"],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
    except OSError:
        return None


def _read(process: subprocess.Popen[str], samples: Samples) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        try:
            clock, power = map(float, line.split(","))
        except ValueError:  # "No devices were found", "[N/A]"
            continue
        samples.append((clock, power))

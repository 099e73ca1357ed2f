"""Whole models side by side: training steps and inference under bf16 autocast, with the memory they take."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .table import Row
from .timing import time_in_turns

Prepare = Callable[[nn.Module, Tensor, Tensor], Callable[[], object]]


def measure_models(
    name: str,
    build: dict[str, Callable[[], nn.Module]],
    prepare: Prepare,
    *,
    batch: int,
    suite: str,
    device: torch.device,
    seconds: float,
    compiled: bool = False,
    mode: str = "",
    side: int = 224,
    most: int = 20,
) -> list[Row]:
    """One row for every model by its name; speed-ups are relative to the first.

    prepare: `training` or `inference`. compiled: compile all. mode: what the case calls that.
    """
    images = torch.randn(batch, 3, side, side, device=device)
    labels = torch.randint(0, 1000, (batch,), device=device)
    steps: dict[str, Callable[[], object]] = {}
    peaks = {}
    for key, make in build.items():
        torch.manual_seed(0)
        model = make().to(device)
        if compiled:
            model.compile()
        steps[key] = prepare(model, images, labels)
        steps[key]()
        if device.type == "cuda":  # above what other models and their optimizers hold
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated() - _held(model, prepare)
            torch.cuda.reset_peak_memory_stats()
            steps[key]()
            peaks[key] = (torch.cuda.max_memory_allocated() - before) / 2**30
    times = time_in_turns(steps, device=device, seconds=seconds, most=most)
    base = next(iter(build))
    mode = mode or ("compiled" if compiled else "eager")
    rows = []
    for key, timing in times.items():
        row = Row(
            suite=suite, case=f"{name} {prepare.__name__}, batch {batch}, bf16 autocast, {mode}",
            impl=key, direction="forward" if prepare is inference else "both",
            ms=timing.ms, ms_p20=timing.ms_p20, ms_p80=timing.ms_p80, peak_gib=peaks.get(key),
            note=f"{batch / timing.ms * 1e3:.0f} images/s",
        )  # fmt: skip
        if key != base:
            row.baseline, row.speedup = base, times[base].ms / timing.ms
        rows.append(row)
    return rows


def _held(model: nn.Module, prepare: Prepare) -> int:
    """Bytes of the weights, and of AdamW's two moments where it trains."""
    weights = sum(p.nbytes for p in model.parameters())
    return 3 * weights if prepare is training else weights


def training(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """A training step: forward, backward, AdamW."""
    fused = images.device.type == "cuda"
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-4, fused=fused)

    def step() -> None:
        with torch.autocast(images.device.type, dtype=torch.bfloat16):
            loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def inference(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], object]:
    model.eval()

    def step() -> Tensor:
        with torch.inference_mode(), torch.autocast(images.device.type, dtype=torch.bfloat16):
            return model(images)

    return step

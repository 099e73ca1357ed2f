"""MedViTV2 with our kernels and by its formula: `python -m visionfuse.bench.medvit --csv assets/bench/medvit.csv`.

`formula` writes the basis of every KAN layer as FasterKAN does, masks dense attention and keeps everything for
the backward; `kan` has the fused KAN layers only; `visionfuse` has block-sparse neighborhood attention and
recomputed activations too, and is compiled as well: the bar of the project is the eager formula. The published
code runs its attention in NATTEN 0.17, which is no part of this comparison. All three are compared on one
picture in float32 first.
The layer alone (`--layer`) is timed at the shapes of MedViT-S and -L.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..kernels.kan import rswaf_linear
from .models import inference, measure_models, training
from .table import Row, show_rows, update_csv
from .timing import time_in_turns

NAMES = ("medvit_tiny", "medvit_small", "medvit_base", "medvit_large")
MOST_ERROR = {"float32": 1e-3, "layer": 8e-3}  # relative L1
# rows of batch 128, channels, outputs: the second stage, the third and the last one of MedViT-S
LAYERS = ((100352, 128, 256), (25088, 512, 256), (6272, 512, 1024))


def build(name: str, way: str) -> Any:
    """The model in one of three ways, or compiled as a user would have it."""
    import timm

    from .. import models  # noqa: F401  puts MedViTV2 into timm's registry

    if way == COMPILED:
        model: Any = build(name, "visionfuse").to(memory_format=torch.channels_last)
        model.compile()
        return model
    model = timm.create_model(name, kan_impl="reference" if way == "formula" else "auto")
    if way != "visionfuse":
        model.set_recompute(False)
        for module in model.modules():
            if hasattr(module, "dense_tokens"):
                module.dense_tokens = 1 << 20
    return model


WAYS = ("formula", "kan", "visionfuse")
COMPILED = "visionfuse, compiled"
DIRECTIONS = {"inference": inference, "training": training}


def compare(name: str, device: torch.device, *, side: int = 224) -> dict[str, float]:
    """Relative L1 errors against the formula, in float32. Raises RuntimeError where the three do not agree."""
    images = torch.randn(4, 3, side, side, device=device)
    torch.manual_seed(0)
    settled = build(name, "formula").to(device)
    # Without statistics of its own, numbers grow until rounding decides.
    for module in settled.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    # Convolutions have TF32 by default, which a deep random model makes 0.1 of.
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        settled.train().forward_features(images)
        found = {}
        for way in WAYS:
            model = build(name, way).to(device).eval()
            model.load_state_dict(settled.state_dict())
            found[way] = model.forward_features(images)
    errors = {}
    for way in WAYS[1:]:
        errors[way] = float(
            (found[way] - found["formula"]).abs().sum() / found["formula"].abs().sum()
        )
        if not errors[way] <= MOST_ERROR["float32"]:
            raise RuntimeError(f"{name}: {way} differs from the formula by {errors[way]:.1e}.")
    return errors


def measure_layer(
    shape: tuple[int, int, int], *, suite: str, device: torch.device, seconds: float
) -> list[Row]:
    """Forward and backward of one layer in bf16, ours and the formula."""
    rows, channels, outputs = shape
    x = torch.randn(rows, channels, device=device, dtype=torch.bfloat16)
    weight = torch.randn(outputs, 8 * channels, device=device, dtype=torch.bfloat16)
    weight *= (8 * channels) ** -0.5
    grad = torch.randn(rows, outputs, device=device, dtype=torch.bfloat16)
    leaves = [t.requires_grad_() for t in (x, weight)]
    calls: Any = {key: partial(rswaf_linear, impl=impl) for key, impl in (("formula", "reference"), ("visionfuse", "auto"))}  # fmt: skip
    few = [t[:2048].detach().double() for t in (x, grad)]
    exact_leaves = [few[0].requires_grad_(), weight.detach().double().requires_grad_()]
    y = rswaf_linear(exact_leaves[0], exact_leaves[1], impl="reference")
    exact = (y, *torch.autograd.grad(y, exact_leaves, few[1]))
    part = [x[:2048].detach().requires_grad_(), weight]
    out = calls["visionfuse"](*part)
    got = (out, *torch.autograd.grad(out, part, grad[:2048]))
    errors = [
        ((p.double() - q).abs().sum() / q.abs().sum()).item()
        for p, q in zip(got, exact, strict=True)
    ]
    if device.type == "cuda" and not max(errors) <= MOST_ERROR["layer"]:
        raise RuntimeError(
            f"Wrong on {shape}: {errors}, at most {MOST_ERROR['layer']} is expected."
        )
    found = []
    flops = 2 * rows * 8 * channels * outputs
    for direction, products in (("forward", 1), ("backward", 2)):
        timed: dict[str, Callable[[], object]] = {}
        for key, call in calls.items():
            if direction == "forward":
                timed[key] = partial(_without_gradient, call, *leaves)
            else:
                timed[key] = partial(
                    torch.autograd.grad, call(*leaves), leaves, grad, retain_graph=True
                )
        times = time_in_turns(timed, device=device, seconds=seconds)
        for key, timing in times.items():
            row = Row(
                suite=suite, case=f"KAN layer {shape} bfloat16", impl=key, direction=direction,
                ms=timing.ms, ms_p20=timing.ms_p20, ms_p80=timing.ms_p80,
                note=f"{products * flops / timing.ms * 1e-9:.0f} TFLOPS",
            )  # fmt: skip
            if key == "visionfuse":
                row.baseline, row.speedup = "formula", times["formula"].ms / timing.ms
                row.rel_l1 = errors[0] if direction == "forward" else max(errors[1:])
            found.append(row)
    return found


def _without_gradient(call: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return call(*inputs)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--csv", type=Path, default=Path("assets/bench/medvit.csv"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda",
                        help="cpu: tiny cases, to try the script")  # fmt: skip
    parser.add_argument("--models", nargs="*", default=["medvit_small"], choices=NAMES)
    parser.add_argument("--directions", nargs="+", default=[*DIRECTIONS], choices=[*DIRECTIONS])
    parser.add_argument("--ways", nargs="+", default=[*WAYS, COMPILED], choices=[*WAYS, COMPILED])
    parser.add_argument("--layer", action="store_true", help="the KAN layer alone, too")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--commit", default="", help="where the tree is a copy without git")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; --device cpu tries the script")
    seconds = 0.05 if arguments.quick else 0.5
    options: Any = {"suite": arguments.csv.stem, "device": device, "seconds": seconds}
    sizes: Any = {"batch": arguments.batch}
    layers = LAYERS
    if device.type == "cpu":
        sizes, layers, options["seconds"] = (
            {"batch": 2, "side": 32, "most": 1},
            ((64, 16, 32),),
            0.0,
        )
    runs: list[Callable[[], list[Row]]] = [
        partial(measure_layer, shape, **options) for shape in layers if arguments.layer
    ]
    for name in arguments.models:
        if device.type == "cuda":
            compare(name, device)
        compiled = [WAYS[0], COMPILED] if COMPILED in arguments.ways else []
        modes = {
            "eager": [way for way in WAYS if way in arguments.ways],
            "compiled beside the eager formula": compiled,
        }
        for direction, (mode, ways) in product(arguments.directions, modes.items()):
            models: Any = {way: partial(build, name, way) for way in ways}
            run = partial(measure_models, name, models, DIRECTIONS[direction], mode=mode)
            if models:
                runs.append(partial(run, **sizes, **options))
    rows: list[Row] = []
    for run in runs:
        measured = run()
        update_csv(measured, arguments.csv, commit=arguments.commit)
        rows += measured
    show_rows(rows, title=f"MedViTV2 on {arguments.device}")
    print(f"Wrote {arguments.csv}")


if __name__ == "__main__":
    main()

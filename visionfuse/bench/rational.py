"""The rational activation and KAT: `python -m visionfuse.bench.rational --csv assets/bench/rational.csv`.

Forward and backward at shapes of KAT, version A, degrees 5/4, 8 groups with one numerator, beside a device copy
of as many bytes as have to move: in elements of x, e bytes each, 2 e forward (x, y) and 3 e backward (x, the
gradients of y and of x). `torch.compile` and `torch` are the formula in PyTorch. Everything is compared with
float64 first; rel_l1 and cosine are those of y or of dx, the coefficients' are in the notes.

`--training` and `--inference` time KAT and the vision transformer of the same size instead, under bf16
autocast: whole training steps (forward, backward, AdamW), or the forward.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..kernels.rational import coefficients, rational, reference
from .models import inference, measure_models, training
from .table import Row, show_rows, update_csv
from .timing import time_in_turns

GROUPS = 8
RECIPE = "A 5/4, 8 groups"
MOST_ERROR = {torch.bfloat16: 4e-3, torch.float32: 1e-6}  # relative L1, twice what rounding costs
Call = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Case:
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return f"{self.shape} {str(self.dtype).removeprefix('torch.')}"


CASES = [
    Case(shape=shape, dtype=dtype)
    for dtype in (torch.bfloat16, torch.float32)
    for shape in ((1024, 197, 768), (128, 197, 3072), (128, 197, 768))
]
MODELS = {
    "KAT-T": ("kat_tiny_patch16_224", "vit_tiny_patch16_224"),
    "KAT-S": ("kat_small_patch16_224", "vit_small_patch16_224"),
    "KAT-B": ("kat_base_patch16_224", "vit_base_patch16_224"),
}


def formula(x: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
    """Version A in PyTorch, for inductor: coefficients of every channel, arithmetic in float32."""
    channels = x.shape[-1] // GROUPS
    a = numerator.expand(GROUPS, -1).repeat_interleave(channels, 0).unbind(1)
    b = denominator.abs().repeat_interleave(channels, 0).unbind(1)
    z = x.float()
    u = z.abs()
    p, q = a[-1], b[-1]
    for c in reversed(a[:-1]):
        p = p * z + c
    for c in reversed(b[:-1]):
        q = q * u + c
    return (p / (q * u + 1)).to(x.dtype)


def measure(case: Case, *, suite: str, device: torch.device, seconds: float) -> list[Row]:
    """Rows of both directions: the copy, ours, and the formula compiled and eager."""
    generator = torch.Generator(device).manual_seed(0)
    x, grad = (
        torch.randn(case.shape, generator=generator, device=device).to(case.dtype) for _ in range(2)
    )
    a, b = _coefficients(generator, device)
    calls: dict[str, Call] = {"visionfuse": rational}
    if device.type == "cuda":
        calls["torch.compile"] = torch.compile(formula, dynamic=False)
        if x.numel() < 1e8:  # its backward keeps twenty tensors in float32
            calls["torch"] = formula
    errors = {}
    for name in calls:  # of the first images, so that float64 fits
        errors[name] = _errors(calls[name], x[:16], grad[:16], a, b)
        limit = MOST_ERROR[case.dtype]
        if name == "visionfuse" and not max(errors[name][d][0] for d in errors[name]) <= limit:
            raise RuntimeError(
                f"Wrong on {case.name}: {errors[name]}, at most {limit} is expected."
            )
    rows = []
    leaves = [t.requires_grad_() for t in (x, a, b)]
    for direction, tensors in (("forward", 2), ("backward", 3)):
        moved = tensors * x.numel() * x.itemsize
        timed: dict[str, Callable[[], object]] = {"copy": _copy(moved, device)}
        for name, call in calls.items():
            if direction == "forward":
                timed[name] = partial(_without_gradient, call, *leaves)
            else:
                y = call(*leaves)
                timed[name] = partial(torch.autograd.grad, y, leaves, grad, retain_graph=True)
        times = time_in_turns(timed, device=device, seconds=seconds)
        base = "torch.compile" if "torch.compile" in times else "copy"
        for name, timing in times.items():
            share = times["copy"].ms / timing.ms
            row = Row(
                suite=suite, case=case.name, impl=name, recipe=RECIPE, direction=direction,
                ms=timing.ms, ms_p20=timing.ms_p20, ms_p80=timing.ms_p80,
                note=f"{moved / timing.ms * 1e-6:.0f} GB/s, {share:.0%} of the copy",
            )  # fmt: skip
            if name != base:
                row.baseline, row.speedup = base, times[base].ms / timing.ms
            if name in errors:
                row.rel_l1, row.cosine, worst = errors[name][direction]
                if direction == "backward":
                    row.note += f"; coefficient gradients off by {worst:.1e}"
            rows.append(row)
    return rows


def _without_gradient(call: Call, *inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return call(*inputs)


def _coefficients(generator: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor]:
    """SiLU with noise, as after some training."""
    fit = coefficients("silu")
    a = torch.tensor([fit.numerator], device=device)
    b = torch.tensor(fit.denominator, device=device).repeat(GROUPS, 1)
    a, b = (c + 0.05 * torch.randn(c.shape, generator=generator, device=device) for c in (a, b))
    return a, b


def _copy(moved: int, device: torch.device) -> Callable[[], Tensor]:
    source = torch.zeros(moved // 16, 2, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _errors(call: Call, x: Tensor, grad: Tensor, a: Tensor, b: Tensor) -> dict:
    """By direction: relative L1 error, cosine, and the worst coefficient gradient by the largest one."""
    x64, a64, b64 = leaves64 = [t.double().requires_grad_() for t in (x, a, b)]
    y64 = reference.forward(x64, a64, b64)
    exact = (y64, *torch.autograd.grad(y64, leaves64, grad.double()))
    leaves = [t.detach().requires_grad_() for t in (x, a, b)]
    y = call(*leaves)
    got = (y, *torch.autograd.grad(y, leaves, grad))

    def compare(i: int) -> tuple[float, float]:
        p, q = got[i].double(), exact[i]
        cosine = (p * q).sum() / (p.norm() * q.norm())
        return ((p - q).abs().sum() / q.abs().sum()).item(), cosine.item()

    worst = max(((got[i] - exact[i]).abs().max() / exact[i].abs().max()).item() for i in (2, 3))
    return {"forward": (*compare(0), 0.0), "backward": (*compare(1), worst)}


def _created(name: str):
    import timm

    from .. import models  # noqa: F401  puts KAT into timm's registry

    return timm.create_model(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--csv", type=Path, default=Path("assets/bench/rational.csv"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda",
                        help="cpu: one tiny case, to try the script")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, bf16 only")
    parser.add_argument("--training", nargs="+", default=[], choices=[*MODELS],
                        help="training steps of these models")  # fmt: skip
    parser.add_argument("--inference", nargs="+", default=[], choices=[*MODELS],
                        help="the forward of these models")  # fmt: skip
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--compiled", action="store_true", help="compile these models")
    parser.add_argument("--commit", default="", help="where the tree is a copy without git")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; --device cpu tries the script")
    options = {
        "suite": arguments.csv.stem, "device": device, "seconds": 0.05 if arguments.quick else 0.3,
    }  # fmt: skip
    runs: list[Callable[[], list[Row]]] = []
    for prepare, names in ((training, arguments.training), (inference, arguments.inference)):
        for name in names:
            ours, base = MODELS[name]
            runs.append(partial(
                measure_models, name, {n: partial(_created, n) for n in (base, ours)}, prepare,
                batch=arguments.batch, compiled=arguments.compiled, **options,
            ))  # fmt: skip
    if not runs:
        cases = CASES[:3] if arguments.quick else CASES
        if device.type == "cpu":
            cases = [Case(shape=(2, 17, 64), dtype=torch.float32)]
        runs = [partial(measure, case, **options) for case in cases]
    rows: list[Row] = []
    for run in runs:
        measured = run()
        update_csv(measured, arguments.csv, commit=arguments.commit)
        rows += measured
    show_rows(rows, title=f"Rational activations on {arguments.device}")
    print(f"Wrote {arguments.csv}")


if __name__ == "__main__":
    main()

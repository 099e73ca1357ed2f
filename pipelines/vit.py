"""Train, evaluate and time vision transformers of timm, KAT and MedViTV2 among them, side by side.

    python pipelines/vit.py train kat_tiny_patch16_224 vit_tiny_patch16_224 --seeds 0 1 2 --out runs/vit
    python pipelines/vit.py train kat_tiny_patch16_224 vit_tiny_patch16_224 --seeds 0 1 2 --out runs/vit --resume
    python pipelines/vit.py evaluate --out runs/vit
    python pipelines/vit.py time medvit_tiny kat_tiny_patch16_224 vit_tiny_patch16_224 --batch 128 --csv new.csv --base old.csv

The pictures are drawn by `visionfuse.shapes` as they are needed, so that nothing is downloaded and none comes
twice: a shape of any size anywhere near the middle, on any background, a class for every colour and shape. All
models of a run see the same pictures. A step depends on seed and step number alone: a run that was stopped
goes on with `--resume` as if nothing had happened. `--out` gets curves.csv, curves.png with the mean and the
range over seeds, and the state of every run. On a CPU try `--side 32 --batch 32 --steps 300
--model-kwargs depth=2 patch_size=4`.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.console import Console
from rich.table import Table
from timm.models import get_pretrained_cfg
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ParseKwargs
from torch import Tensor, nn
from tqdm import tqdm

import visionfuse.models  # noqa: F401  puts KAT and MedViTV2 into timm's registry
from visionfuse.bench.table import Row, update_csv
from visionfuse.bench.timing import time_in_turns
from visionfuse.pipelines.benchmark import compare_csv
from visionfuse.shapes import Scene, Scenes, arrange, draw, pack
from visionfuse.shapes.captions import PAIRS, Group

CLASSES = tuple(Scene(groups=(Group(color=color, shape=shape),)) for color, shape in PAIRS)
HELD_OUT = 1 << 40  # seeds from here on draw test pictures
CHUNK = 256  # pictures of an evaluation at a time


class Pictures:
    """Batches of pictures and their classes, each by a seed of its own."""

    def __init__(self, side: int, device: torch.device) -> None:
        self.side, self.device = side, device
        self.scenes = pack(CLASSES).to(device)

    def batch(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """Images [count, 3, side, side] in -1..1 and classes [count]."""
        generator = torch.Generator(self.device).manual_seed(seed)
        labels = torch.randint(len(CLASSES), (count,), generator=generator, device=self.device)
        chosen = Scenes(*(field[labels] for field in self.scenes))
        return draw(arrange(chosen, generator), self.side) * 2 - 1, labels


@dataclass(frozen=True, kw_only=True)
class Check:
    """A row of curves.csv. loss: the mean since the last check. accuracy: on held-out pictures."""

    model: str
    seed: int
    step: int
    loss: float
    accuracy: float
    images_per_s: float


class Progress:
    """What a run knows beside its weights; `accelerate` saves and restores it."""

    def __init__(self) -> None:
        self.checks: list[Check] = []

    @property
    def step(self) -> int:
        return self.checks[-1].step if self.checks else 0

    def state_dict(self) -> dict[str, Any]:
        return {"checks": [asdict(check) for check in self.checks]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.checks = [Check(**check) for check in state["checks"]]


def create(name: str, args: argparse.Namespace) -> nn.Module:
    """The model for these pictures and classes."""
    sized = {"img_size": args.side} if _is_sized(name) else {}
    return timm.create_model(name, num_classes=len(CLASSES), **{**sized, **args.model_kwargs})


def _is_sized(name: str) -> bool:
    cfg = get_pretrained_cfg(name)
    return cfg is not None and cfg.fixed_input_size


# Training ---------------------------------------------------------------------------------------------


def train(args: argparse.Namespace) -> None:
    accelerator = Accelerator(mixed_precision=args.mixed_precision, cpu=args.device == "cpu")
    for seed in args.seeds:
        for name in args.models:
            train_one(name, seed, accelerator, args)
    checks = read_checks(args.out)
    plot(checks, args.out / "curves.png")
    show(checks)
    print(f"Wrote {args.out / 'curves.csv'} and curves.png")


def train_one(name: str, seed: int, accelerator: Accelerator, args: argparse.Namespace) -> None:
    """Trains from where the last slice ended, to --stop-at or to the end."""
    folder = args.out / f"{name}-{seed}"
    set_seed(seed)
    pictures = Pictures(args.side, accelerator.device)
    model = create(name, args)
    optimizer = create_optimizer_v2(model, "adamw", lr=args.lr, weight_decay=args.weight_decay)
    schedule = CosineLRScheduler(
        optimizer, t_initial=args.steps, warmup_t=max(1, args.steps // 20), t_in_epochs=False
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    progress = Progress()
    accelerator.register_for_checkpointing(progress)
    settings = _settings(args)
    if args.resume and (folder / "state").is_dir():
        before = json.loads((folder / "run.json").read_text())
        if changed := [key for key in settings if settings[key] != before["settings"].get(key)]:
            raise SystemExit(
                f"{folder} was trained with another {', '.join(changed)}. Give the same, or another --out."
            )
        accelerator.load_state(str(folder / "state"))
    end = min(args.steps, args.stop_at or args.steps)
    losses: list[Tensor] = []
    started, stopped = time.perf_counter(), progress.step
    bar = tqdm(range(progress.step, end), initial=progress.step, total=args.steps, desc=f"{name}, seed {seed}")  # fmt: skip
    for step in bar:
        images, labels = pictures.batch(args.batch, seed << 24 | step)
        set_seed(seed << 24 | step)  # drop path and the like
        schedule.step_update(step)
        model.train()
        with accelerator.autocast():
            loss = F.cross_entropy(model(images), labels, label_smoothing=args.smoothing)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        done = step + 1
        if done % args.every == 0 or done == end:
            mean = torch.stack(losses).mean().item()  # waits for the device
            rate = args.batch * (done - stopped) / (time.perf_counter() - started)
            right = accuracy(model, pictures, args.pictures, accelerator)
            progress.checks.append(
                Check(model=name, seed=seed, step=done, loss=mean, accuracy=right, images_per_s=rate)
            )  # fmt: skip
            bar.set_postfix(loss=f"{mean:.3f}", accuracy=f"{right:.1%}")
            accelerator.save_state(str(folder / "state"))
            run = {"model": name, "seed": seed, "settings": settings, **progress.state_dict()}
            (folder / "run.json").write_text(json.dumps(run, indent=1))
            write_checks(args.out)
            losses, started, stopped = [], time.perf_counter(), done
    accelerator.free_memory()
    accelerator._custom_objects.clear()  # the next run has a progress of its own


@torch.inference_mode()
def accuracy(model: nn.Module, pictures: Pictures, count: int, accelerator: Accelerator) -> float:
    """The share of `count` held-out pictures that are classified right."""
    model.eval()
    right = torch.zeros((), device=pictures.device)
    for start in range(0, count, CHUNK):
        images, labels = pictures.batch(min(CHUNK, count - start), HELD_OUT + start)
        with accelerator.autocast():
            right += (model(images).argmax(-1) == labels).sum()
    return right.item() / count


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """What a run may not change when it goes on."""
    names = ("side", "batch", "steps", "every", "lr", "weight_decay", "smoothing", "model_kwargs")
    return {name: getattr(args, name) for name in names}


# Results ----------------------------------------------------------------------------------------------


def read_checks(out: Path) -> list[Check]:
    """Those of all runs under `out`."""
    runs = (json.loads(path.read_text()) for path in sorted(out.glob("*/run.json")))
    return [Check(**check) for run in runs for check in run["checks"]]


def write_checks(out: Path) -> None:
    with (out / "curves.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Check)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(check) for check in read_checks(out))


def by_model(checks: list[Check]) -> dict[str, dict[int, list[Check]]]:
    """Model -> step -> one check for every seed that came so far."""
    curves: dict[str, dict[int, list[Check]]] = defaultdict(lambda: defaultdict(list))
    for check in checks:
        curves[check.model][check.step].append(check)
    return curves


def plot(checks: list[Check], path: Path) -> None:
    """Accuracy and loss by step: the mean over seeds, and the range as a band."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for model, curve in by_model(checks).items():
        steps = sorted(curve)
        for axis, name in zip(axes, ("accuracy", "loss"), strict=True):
            values = [torch.tensor([getattr(c, name) for c in curve[step]]) for step in steps]
            (line,) = axis.plot(steps, [float(v.mean()) for v in values], label=model)
            low, high = ([float(getattr(v, end)()) for v in values] for end in ("min", "max"))
            axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.2)
            axis.set(xlabel="steps", ylabel=name)
    axes[0].set_title("held-out pictures")
    axes[1].set_title("training")
    axes[0].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def show(checks: list[Check]) -> None:
    table = Table(
        "model", "seeds", "steps", "accuracy", "range", "images/s", title="Held-out pictures"
    )
    for model, curve in by_model(checks).items():
        step = max(curve)
        right = sorted(check.accuracy for check in curve[step])
        rate = max(check.images_per_s for checks in curve.values() for check in checks)
        table.add_row(
            model, str(len(right)), str(step), f"{sum(right) / len(right):.1%}",
            f"{right[0]:.1%} to {right[-1]:.1%}", f"{rate:.0f}",
        )  # fmt: skip
    Console().print(table)


def evaluate(args: argparse.Namespace) -> None:
    """Accuracy of every run under --out, on other held-out pictures than its curve."""
    accelerator = Accelerator(mixed_precision=args.mixed_precision, cpu=args.device == "cpu")
    paths = sorted(args.out.glob("*/run.json"))
    if not paths:
        raise SystemExit(f"There are no runs under {args.out}. Train some first.")
    table = Table("model", "seed", "steps", "accuracy", title=f"{args.pictures} pictures")
    for path in paths:
        run = json.loads(path.read_text())
        settings = argparse.Namespace(**run["settings"])
        model = create(run["model"], settings)
        timm.models.load_checkpoint(model, str(path.parent / "state" / "model.safetensors"))
        pictures = Pictures(settings.side, accelerator.device)
        right = accuracy(model.to(accelerator.device), pictures, args.pictures, accelerator)
        steps = run["checks"][-1]["step"]
        table.add_row(run["model"], str(run["seed"]), str(steps), f"{right:.2%}")
    Console().print(table)


# Times ------------------------------------------------------------------------------------------------


def time_models(args: argparse.Namespace) -> None:
    """Inference and a training step (forward, backward, AdamW) of all models, in turns."""
    accelerator = Accelerator(mixed_precision=args.mixed_precision, cpu=args.device == "cpu")
    device = accelerator.device
    images, labels = Pictures(args.side, device).batch(args.batch, args.seed)
    table = Table("model", "what", "ms", "images/s", title=f"batch {args.batch}, {args.side} pixels, {device}")  # fmt: skip
    rows = []
    for what, prepare in (("inference", _inference), ("training", _training)):
        calls = {}
        for name in args.models:
            set_seed(args.seed)
            model = create(name, args).to(device)
            calls[name] = prepare(torch.compile(model) if args.compile else model, images, labels, accelerator)  # fmt: skip
        times = time_in_turns(calls, device=device, seconds=0.0 if args.dry_run else 1.0)
        for name, found in times.items():
            rate = f"{args.batch / found.ms * 1e3:.0f}"
            table.add_row(name, what, f"{found.ms:.2f}", rate)
            row = Row(
                suite="vit", case=f"{what}, batch {args.batch}, {args.side} pixels", impl=name,
                direction="forward" if prepare is _inference else "both", ms=found.ms,
                ms_p20=found.ms_p20, ms_p80=found.ms_p80, note=f"{rate} images/s",
            )  # fmt: skip
            if name != args.models[0]:
                row.baseline, row.speedup = args.models[0], times[args.models[0]].ms / found.ms
            rows.append(row)
    Console().print(table)
    if args.csv:
        update_csv(rows, args.csv, commit=args.commit)
    if args.base:
        compare_csv(args.base, args.csv)


def _inference(model: Any, images: Tensor, labels: Tensor, accelerator: Accelerator) -> Callable[[], object]:  # fmt: skip
    model.eval()

    def call() -> Tensor:
        with torch.inference_mode(), accelerator.autocast():
            return model(images)

    return call


def _training(model: Any, images: Tensor, labels: Tensor, accelerator: Accelerator) -> Callable[[], object]:  # fmt: skip
    optimizer = create_optimizer_v2(model.train(), "adamw", lr=1e-4)

    def call() -> None:
        with accelerator.autocast():
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return call


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--device", choices=("auto", "cpu"), default="auto")
    shared.add_argument("--mixed-precision", choices=("no", "bf16"),
                        help="bf16 where there is a GPU, by default")  # fmt: skip
    shared.add_argument("--dry-run", action="store_true", help="a few steps on tiny pictures")
    made = argparse.ArgumentParser(add_help=False)
    made.add_argument("models", nargs="+", help="timm's names of them")
    made.add_argument("--side", type=int, default=224, help="of the pictures, in pixels")
    made.add_argument("--batch", type=int, default=128)
    made.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs,
                      metavar="NAME=VALUE", help="for all models, such as depth=4")  # fmt: skip
    kept: Any = {
        "type": Path,
        "default": Path("runs/vit"),
        "help": "folder of runs, curves.csv, curves.png",
    }

    command = commands.add_parser("train", parents=[shared, made], help="side by side, over seeds")
    command.add_argument("--out", **kept)
    command.add_argument("--seeds", "--seed", type=int, nargs="+", default=[0])
    command.add_argument("--steps", type=int, default=2000)
    command.add_argument("--every", type=int, default=100, help="steps from check to check")
    command.add_argument("--pictures", type=int, default=1024, help="of a check")
    command.add_argument("--lr", type=float, default=1e-3)
    command.add_argument("--weight-decay", type=float, default=0.05)
    command.add_argument("--smoothing", type=float, default=0.0, help="of labels")
    command.add_argument("--resume", action="store_true", help="go on where each run stopped")
    command.add_argument("--stop-at", type=int, help="end there, to go on later")
    command.set_defaults(run=train)

    command = commands.add_parser("evaluate", parents=[shared], help="all runs, on more pictures")
    command.add_argument("--out", **kept)
    command.add_argument("--pictures", type=int, default=10_000)
    command.set_defaults(run=evaluate)

    command = commands.add_parser(
        "time", parents=[shared, made], help="inference and training steps"
    )
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--compile", action="store_true")
    command.add_argument("--csv", type=Path, help="write rows into this file")
    command.add_argument("--commit", default="", help="for a copy of the tree without git")
    command.add_argument("--base", type=Path, help="compare --csv with this one, of another commit")
    command.set_defaults(run=time_models)

    args = parser.parse_args()
    if getattr(args, "base", None) and not args.csv:
        parser.error("--base compares with --csv, which is not given")
    on_gpu = args.device == "auto" and torch.cuda.is_available()
    args.mixed_precision = args.mixed_precision or ("bf16" if on_gpu else "no")
    if args.dry_run:
        args.side, args.batch, args.pictures, args.steps, args.every = 32, 4, 8, 4, 2
    if hasattr(args, "out"):
        args.out.mkdir(parents=True, exist_ok=True)
    args.run(args)


if __name__ == "__main__":
    main()

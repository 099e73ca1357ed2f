"""One training loop for Wan-type transformers: flow matching, under a recipe of visionfuse or without.

With a recipe the forward runs its sparse plans and rounded formats as a generation does, each noise level in
the phase of the schedule that meets it, and the gradients go straight through (FPSAttention, arXiv 2506.04648,
section 3.3). Plain `accelerate`: one process a GPU, one alone, or sharded by `accelerate launch --use_fsdp`.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import WanPipeline
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm

from visionfuse.pipelines.train_wan_data import Batch, Samples, draw_batch, padded
from visionfuse.pipelines.train_wan_phases import Phases, Times
from visionfuse.pipelines.train_wan_teacher import Teacher

SYNC_STEPS = 10  # between looks at the clock, which all processes must agree on
GAP_TIMES = (0.95, 0.85, 0.6)  # at which the loss of right and wrong captions is compared


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to train.

    steps, minutes: the whole length; one of them. The learning rate warms up for `warmup` steps, stays until
    `steady` of the length, then falls linearly. drop: share of empty captions. ema: of the weights.
    align: weight of the alignment loss, if the trainee has one. sampling_steps: of the generation whose schedule
    decides which phase a time belongs to. slice_steps, slice_minutes: end this call there and save its state.
    """

    steps: int | None = None
    minutes: float | None = None
    slice_steps: int | None = None
    slice_minutes: float | None = None
    rate: float = 5e-6
    warmup: int = 200
    steady: float = 1.0
    clip: float = 1.0
    drop: float = 0.1
    ema: float = 0.99
    align: float = 0.0
    sampling_steps: int = 50
    seed: int = 0
    log_steps: int = 50
    gap_steps: int = 500
    save_seconds: float = 60.0
    check_seconds: float = 120.0

    def __post_init__(self):
        if (self.steps is None) == (self.minutes is None):
            raise ValueError(
                f"Give either steps or minutes, got steps={self.steps} and minutes={self.minutes}."
            )

    def after(self, seconds: float) -> Settings:
        """What is left of the times when `seconds` went by before the first step."""
        whole, part = (_less(minutes, seconds) for minutes in (self.minutes, self.slice_minutes))
        return replace(self, minutes=whole, slice_minutes=part)

    def done(self, step: int, seconds: float) -> float:
        """The share of the whole length."""
        return seconds / (60 * self.minutes) if self.minutes else step / (self.steps or 1)


def _less(minutes: float | None, seconds: float) -> float | None:
    return None if minutes is None else max(minutes - seconds / 60, 1e-3)


class Source(NamedTuple):
    """Samples of one size; `batch` of them, of every process, in a `share` of the steps, at these times."""

    samples: Samples
    batch: int = 1
    times: Times = Times(((1.0, 5.0),))
    share: float = 1.0


class Trainee(nn.Module):
    """The transformer and what is trained beside it, in one module for `Accelerator.prepare`."""

    def __init__(self, transformer: nn.Module, alignment: nn.Module | None = None):
        super().__init__()
        self.transformer, self.alignment = transformer, alignment

    def forward(
        self, noisy: Tensor, timestep: Tensor, text: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Velocity, and the alignment loss (0 without one)."""
        velocity = self.transformer(
            hidden_states=noisy, timestep=timestep, encoder_hidden_states=text, return_dict=False
        )[0]
        if self.alignment is None or labels is None:
            return velocity, velocity.new_zeros(())
        return velocity, self.alignment(labels)


class Log:
    """What was measured so far; saved with the state, so that an interrupted run forgets nothing.

    loss: rows of step, phase, loss. gap: step, time, loss with the right and with a wrong caption. check: step,
    seconds, result.
    """

    def __init__(self):
        self.step, self.seconds = 0, 0.0
        self.rows: dict[str, list] = {"loss": [], "gap": [], "check": []}

    def state_dict(self) -> dict:
        return {"step": self.step, "seconds": self.seconds, "rows": json.dumps(self.rows)}

    def load_state_dict(self, state: dict) -> None:
        self.step, self.seconds = state["step"], state["seconds"]
        self.rows = json.loads(state["rows"])

    def write(self, path: Path) -> None:
        path.write_text(json.dumps({"step": self.step, "seconds": self.seconds, **self.rows}))


class Average(EMAModel):
    """The averaged weights. In a saved state they are whole, where FSDP leaves every process a shard."""

    def state_dict(self) -> dict:
        state = super().state_dict()
        whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in self.shadow_params]
        return state | {"shadow_params": whole}

    def load_state_dict(self, state_dict: dict) -> None:
        own = self.shadow_params
        super().load_state_dict(state_dict)
        self.shadow_params = [
            distribute_tensor(p.to(o.device), o.device_mesh, o.placements) if isinstance(o, DTensor) else p
            for p, o in zip(self.shadow_params, own, strict=True)
        ]  # fmt: skip


def flow_loss(
    trainee: nn.Module,
    batch: Batch,
    t: Tensor,
    accelerator: Accelerator,
    teacher: Teacher | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean squared error of the velocity `noise - latents` at times `[B]`, and the alignment loss.

    With a teacher that of its velocity, and of its blocks.
    """
    noisy = torch.lerp(batch.latents, batch.noise, t[:, None, None, None, None])
    text = batch.text
    if (
        accelerator.mixed_precision == "bf16"
    ):  # the plan is made for the format that attention meets
        noisy, text = noisy.bfloat16(), text.bfloat16()
    with accelerator.autocast():
        target = teacher.velocity(noisy, 1000 * t, text) if teacher else batch.noise - batch.latents
        velocity, aligned = trainee(noisy, 1000 * t, text, batch.labels)
    loss = F.mse_loss(velocity.float(), target.float())
    return loss + teacher.error() if teacher else loss, aligned.float()


def train(
    pipe: WanPipeline,
    sources: Sequence[Source],
    held_out: Samples,
    settings: Settings,
    out: Path,
    accelerator: Accelerator,
    optimizers: Callable[[Trainee], list[torch.optim.Optimizer]],
    *,
    alignment: nn.Module | None = None,
    teacher: Teacher | None = None,
    check: Callable[[WanPipeline], dict] | None = None,
    resume: bool = False,
    compile: bool = False,
) -> Log:
    """Train `pipe.transformer` in place; it has the averaged weights at the end.

    The recipe is that of `pipe.enable_visionfuse`, if it is enabled. held_out: for the losses of right and wrong
    captions. teacher: instead of the data, what is learned.
    check: measures the averaged weights, on the main process, every `check_seconds`. The state is saved under
    `out/state` every `save_seconds` and at the end of a slice, and taken up with `resume`: the losses go on as
    if nothing had happened. `out` also gets log.json and loss.png.
    """
    # cuDNN's fused attention hit an illegal address in the backward pass on an H200 (PyTorch 2.11).
    torch.backends.cuda.enable_cudnn_sdp(False)
    transformer = pipe.transformer.to(accelerator.device).train()
    phases = Phases(pipe, settings.sampling_steps)
    shares = torch.tensor([source.share for source in sources])
    if teacher is not None:
        teacher.to(accelerator.device)
    for each in (transformer, *([teacher.transformer] if teacher else [])) if compile else ():
        compile_blocks(each)
    trainee = Trainee(transformer, alignment)
    prepared = accelerator.prepare(trainee, *optimizers(trainee))
    model, chosen = prepared[0], list(prepared[1:])
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in chosen]
    weights = list(transformer.parameters())  # FSDP's shards have no copy of many at once
    foreach = not any(isinstance(p, DTensor) for p in weights)
    average = Average(weights, decay=settings.ema, foreach=foreach)
    log = Log()
    accelerator.register_for_checkpointing(average, log)
    if resume and (out / "state").is_dir():
        accelerator.load_state(str(out / "state"))
    average.to(accelerator.device)
    held_out = held_out.to(accelerator.device)

    first_step, before, started = log.step, log.seconds, time.time()
    saved = checked = started
    elapsed = log.seconds
    bar = tqdm(
        unit="step", mininterval=5, initial=log.step, disable=not accelerator.is_main_process
    )

    def keep() -> None:
        log.seconds = elapsed
        accelerator.save_state(str(out / "state.new"))
        accelerator.wait_for_everyone()
        if (
            accelerator.is_main_process
        ):  # a run that is cut off while it writes keeps the state before
            shutil.rmtree(out / "state", ignore_errors=True)
            (out / "state.new").rename(out / "state")
            log.write(out / "log.json")

    def look() -> None:
        with averaged(average, transformer):
            if check is not None and accelerator.is_main_process:
                with force_eager(compile):
                    result = check(pipe)
                log.rows["check"].append([log.step, round(elapsed, 1), result])
                bar.write(json.dumps({"step": log.step, "seconds": round(elapsed), **result}))
            phases.restart()
        transformer.train()
        accelerator.wait_for_everyone()

    with phases.session():
        while not _ended(settings, log.step, first_step, elapsed, before):
            rate = _rate(settings, log.step, settings.done(log.step, elapsed))
            for optimizer, own in zip(chosen, peaks, strict=True):
                for group, peak in zip(optimizer.param_groups, own, strict=True):
                    group["lr"] = peak * rate
            # All processes run the same size and phase, so that none waits for another.
            generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + log.step)
            source = sources[int(torch.multinomial(shares, 1, generator=generator))]
            part = phases.choose(source.times, generator)
            phases.enter(part)
            seed = (settings.seed, log.step, accelerator.process_index)
            batch = draw_batch(
                source.samples, source.batch, seed, accelerator.device, drop=settings.drop
            )
            generator.manual_seed((settings.seed * 1_000_003 + log.step) * 64 + seed[-1])
            t = source.times.draw(source.batch, generator, part.low, part.high)
            t = t.to(accelerator.device)
            loss, aligned = flow_loss(model, batch, t, accelerator, teacher)
            accelerator.backward(loss + settings.align * aligned)
            norm = cast(Tensor, accelerator.clip_grad_norm_(model.parameters(), settings.clip))
            for optimizer in chosen:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            average.step(transformer.parameters())
            log.step += 1
            bar.update()
            if log.step % settings.log_steps == 0:
                value = loss.item()
                log.rows["loss"].append([log.step, part.name, value])
                bar.set_postfix(
                    loss=f"{value:.4f}", align=f"{aligned.item():.3f}", lr=f"{rate:.2f}"
                )
            if log.step % settings.gap_steps == 0:
                _gap(model, held_out, phases, settings, accelerator, log, bar)
            if log.step % SYNC_STEPS == 0 or settings.steps:
                if not (loss + norm).isfinite():  # before it reaches a file
                    raise FloatingPointError(
                        f"Loss {loss.item()}, gradient {norm.item()} at step {log.step}. Go on from the last "
                        "state with --resume and another --seed, or with a lower rate."
                    )
                elapsed = before + _agreed(time.time() - started, accelerator)
                now = started + elapsed - before
                if now - checked > settings.check_seconds:
                    look()
                    checked = now
                if now - saved > settings.save_seconds:
                    keep()
                    saved = now
        look()
    bar.close()
    keep()
    if accelerator.is_main_process:  # once: it takes seconds
        plot(log, out / "loss.png")
    average.copy_to(transformer.parameters())
    return log


def compile_blocks(transformer: nn.Module) -> None:
    """Compile every block's forward; hooks of the blocks stay outside.

    PyTorch 2.11: a mixed-order reduction may slice its workspace wrongly and hit an illegal address in the
    backward pass, and the tiling analysis asserts; both are switched off. A block that fails runs eagerly.
    """
    import torch._dynamo
    import torch._inductor.config

    torch._inductor.config.triton.mix_order_reduction = False
    torch._inductor.config.triton.coalesce_tiling_analysis = False
    torch._dynamo.config.suppress_errors = True
    torch._dynamo.config.recompile_limit = (
        64  # of one code object: a graph for each phase of a recipe
    )
    for block in transformer.blocks:  # pyright: ignore[reportGeneralTypeIssues, reportArgumentType]
        block.forward = torch.compile(block.forward, dynamic=False)


def force_eager(compiled: bool):
    """Checks have other shapes, which are not worth compiling."""
    return torch.compiler.set_stance("force_eager") if compiled else ExitStack()


@contextmanager
def averaged(average: Average, transformer: nn.Module):
    """The averaged weights for a while."""
    average.store(transformer.parameters())
    average.copy_to(transformer.parameters())
    try:
        yield
    finally:
        average.restore(transformer.parameters())


@torch.no_grad()
def loss_gap(
    trainee: nn.Module, held_out: Samples, phases: Phases, seed: int, accelerator: Accelerator
) -> list[tuple[float, float, float]]:
    """Rows of time, loss with the right captions, loss with those of other videos.

    If the two losses are the same, the caption is not read at that time, however small they are.
    """
    device, rows = accelerator.device, []
    generator = torch.Generator(device).manual_seed(seed)
    latents = held_out.latents.to(device, torch.float32)
    noise = torch.randn(latents.shape, generator=generator, device=device)
    text = padded(held_out.text.to(device))
    for t in GAP_TIMES:
        phases.enter(phases.of(t))
        time = torch.full((len(latents),), t, device=device)
        right, wrong = (
            flow_loss(trainee, Batch(latents, noise, told, None), time, accelerator)[0].item()
            for told in (text, text.roll(1, 0))
        )
        rows.append((t, right, wrong))
    return rows


def _gap(model, held_out: Samples, phases, settings, accelerator, log: Log, bar) -> None:
    with force_eager(True):
        rows = loss_gap(model, held_out, phases, settings.seed, accelerator)
    log.rows["gap"] += [[log.step, *row] for row in rows]
    told = ", ".join(f"t={t:.2f} {right:.4f} / {wrong:.4f}" for t, right, wrong in rows)
    if accelerator.is_main_process:
        bar.write(f"step {log.step}, loss with right / wrong captions: {told}")


def _ended(s: Settings, step: int, first_step: int, elapsed: float, before: float) -> bool:
    return (
        s.done(step, elapsed) >= 1
        or (s.slice_steps is not None and step - first_step >= s.slice_steps)
        or (s.slice_minutes is not None and elapsed - before >= 60 * s.slice_minutes)
    )


def _rate(settings: Settings, step: int, done: float) -> float:
    """Factor of the learning rate: warm-up, then steady, then falling to 2%."""
    left = 1.0 if settings.steady >= 1 else (1 - done) / (1 - settings.steady)
    return min(1.0, (step + 1) / max(settings.warmup, 1)) * min(1.0, max(0.02, left))


def _agreed(seconds: float, accelerator: Accelerator) -> float:
    """The main process's clock, in all of them."""
    if accelerator.num_processes == 1:
        return seconds
    from accelerate.utils import broadcast

    return broadcast(torch.tensor(seconds, device=accelerator.device)).item()


def plot(log: Log, path: Path) -> None:
    """Loss by phase, losses of right and wrong captions, and what the checks found, over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    for name in sorted({row[1] for row in log.rows["loss"]}):
        points = [(s, v) for s, phase, v in log.rows["loss"] if phase == name]
        left.plot(*zip(*points, strict=True), ".", markersize=3, label=name)
    left.set(xlabel="step", ylabel="flow matching loss", yscale="log")
    for t in GAP_TIMES:
        points = [(s, w / r - 1) for s, at, r, w in log.rows["gap"] if at == t]
        if points:
            steps, values = zip(*points, strict=True)
            middle.plot(steps, [100 * v for v in values], "o-", markersize=3, label=f"t = {t}")
    middle.set(xlabel="step", ylabel="loss with wrong captions above that with right ones (%)")
    shares = [(s, 100 * r["right"]) for s, _, r in log.rows["check"] if "right" in r]
    if shares:
        right.plot(*zip(*shares, strict=True), "o-", markersize=3)
    right.set(xlabel="step", ylabel="held-out captions fully right (%)", ylim=(0, 102))
    for axis in (left, middle, right):
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)

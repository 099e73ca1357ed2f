"""Train flux-micro: a 6 M parameter stock FluxPipeline that draws captioned shapes.

    python pipelines/train_flux_micro.py vae  --out runs/flux-micro --minutes 1.5
    python pipelines/train_flux_micro.py flow --out runs/flux-micro --minutes 9 --resume

The first stage trains the autoencoder, the second the text encoders and the transformer together
by flow matching (arXiv:2210.02747). Pictures are drawn and encoded on the fly and never repeat.
The second stage follows `PLAN` by minutes trained and may be cut into slices: each ends by itself
after `--minutes`, saves `state.pt`, and the next continues with `--resume`. `--dry-run` runs both
loops for a few steps with a tiny model on a CPU.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import torch._dynamo
import torch._inductor.config
import torch.nn.functional as F
from diffusers import FluxPipeline
from torch import Tensor, nn
from tqdm import tqdm

from pipelines.flux_micro import Muon, build, decode, encode, image_ids
from visionfuse.shapes import (
    accuracy,
    arrange,
    breakdown,
    draw,
    held_out_scenes,
    pack,
    score,
    training_scenes,
)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of the training: `minutes` long, with picture sides drawn by their weights."""

    minutes: float
    sides: dict[int, float]


# 512x512 comes last because it costs six times more a picture.
PLAN = (
    Phase(minutes=4.6, sides={256: 1.0}),
    Phase(minutes=2.2, sides={256: 0.45, 512: 0.55}),
)
BATCH = {128: 448, 256: 80, 512: 20}  # about 80,000 tokens each
# Time shifts. Flat shapes show through the noise early (256x256: the loss knows the caption only above
# t = 0.85), so most samples are drawn where the caption matters, the rest where edges get sharp.
SHIFT_CAPTION = {128: 6.0, 256: 12.0, 512: 20.0}
SHIFT_DETAIL = {128: 1.5, 256: 2.0, 512: 3.2}
CAPTION_SHARE = 0.75
TEXT_LENGTH = {64: 0.88, 128: 0.05, 256: 0.03, 512: 0.04}  # padding is not masked, so it is varied
NO_POOLED = 0.3  # share of captions without the pooled embedding, which else is an easy way out
NO_CAPTION = 0.04  # share of empty captions, which makes true_cfg_scale work
LR_MATRIX, LR_OTHER = 3e-3, 1.5e-3
WARMUP_STEPS = 200
DECAY_FROM = 0.6  # share of the plan after which the rate falls linearly to zero
EMA = 0.999
PREFETCH = 4  # batches drawn at once: drawing waits for the GPU
SCENES = 128_000
NETWORKS = ("transformer", "text_encoder", "text_encoder_2")


class Data:
    """Captions as tensors on the device, and endless batches of (latents, caption tokens)."""

    def __init__(self, pipe: FluxPipeline, *, scenes: int, seed: int, device: str):
        started = time.time()
        chosen = list(islice(training_scenes(seed), scenes))
        texts = [scene.text for scene in chosen]
        self.scenes = pack(chosen).to(device)
        self.ids = _tokens(pipe.tokenizer, texts).to(device)  # [N, <=77] CLIP
        self.ids_2 = _tokens(pipe.tokenizer_2, texts).to(device)  # [N, <=64] T5
        self.empty = _tokens(pipe.tokenizer, [""], self.ids.shape[1]).to(device)
        self.empty_2 = _tokens(pipe.tokenizer_2, [""], self.ids_2.shape[1]).to(device)
        self.device = device
        print(f"{len(texts)} captions in {time.time() - started:.0f} s, e.g. {texts[0]!r}")

    @torch.no_grad()
    def images(self, side: int, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """`[B, 3, side, side]` pictures and the index of their captions."""
        index = torch.randint(len(self.ids), (batch,), generator=generator, device=self.device)
        return draw(arrange(self.scenes[index], generator), side), index

    def captions(self, index: Tensor, length: int, generator: torch.Generator):
        """CLIP ids `[B, L]` and T5 ids `[B, length]`, some of them of the empty caption."""
        drop = torch.rand(len(index), 1, generator=generator, device=self.device) < NO_CAPTION
        ids = torch.where(drop, self.empty, self.ids[index])
        ids_2 = torch.where(drop, self.empty_2, self.ids_2[index])
        return ids, F.pad(ids_2, (0, length - ids_2.shape[1]), value=0)


def train_vae(pipe: FluxPipeline, data: Data, args: argparse.Namespace) -> None:
    """L1 with heavier edges, a weak KL term, and noise on the latents to make decoding robust."""
    vae = pipe.vae.to(args.device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=3e-3, weight_decay=0.0, betas=(0.9, 0.99))
    generator = torch.Generator(args.device).manual_seed(args.seed)
    started, losses, bar = time.time(), [], tqdm(unit="step", mininterval=5)
    side, batch = (32, 8) if args.dry_run else (128, 80)
    while (progress := (time.time() - started) / (60 * args.minutes)) < 1:
        images, _ = data.images(side, batch, generator)
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (len(losses) + 1) / 100) * (1 - progress)
        with torch.autocast(args.device, torch.bfloat16):
            posterior = vae.encode(images * 2 - 1).latent_dist
            latents = posterior.sample()
            noise = torch.randn_like(latents) * latents.detach().std()
            strength = 0.1 * torch.rand(batch, 1, 1, 1, device=args.device)
            restored = vae.decode(latents + strength * noise).sample / 2 + 0.5
        high, low = F.max_pool2d(images, 3, 1, 1), -F.max_pool2d(-images, 3, 1, 1)
        weight = 1 + 8 * (high - low).amax(1, keepdim=True)
        error = ((restored.float() - images).abs() * weight).mean()
        loss = error + 1e-4 * posterior.kl().mean() / latents[0].numel()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(error.detach())
        bar.update()
        if len(losses) % 100 == 0:
            bar.set_postfix(error=f"{error.item():.4f}")
        if args.dry_run and len(losses) >= 3:
            break
    bar.close()
    vae.eval()
    with torch.no_grad():
        images, _ = data.images(2 * side, 8 if args.dry_run else 128, generator)
        latents = vae.encode(images * 2 - 1).latent_dist.mode()
        mean, std = latents.mean().item(), latents.std().item()
        vae.register_to_config(shift_factor=round(mean, 4), scaling_factor=round(1 / std, 4))
        scenes = held_out_scenes(8 if args.dry_run else 200, seed=args.seed)
        truth = draw(arrange(pack(scenes).to(args.device), generator), 256)
        restored = decode(vae, encode(vae, truth), 256)
        verdicts = score(restored, scenes)
        deviation = latents.std((0, 2, 3)).tolist()
    print(
        f"vae: {len(losses)} steps, latent mean {mean:.3f} std {std:.3f} by channel "
        f"{[round(d, 2) for d in deviation]}, mean error {(restored - truth).abs().mean():.4f}, "
        f"{accuracy(verdicts):.1%} of restored pictures fully right {breakdown(verdicts)['reasons']}"
    )


def train_flow(pipe: FluxPipeline, data: Data, args: argparse.Namespace) -> None:
    """One slice of flow matching; saves its state and the averaged weights at every check."""
    device = args.device
    pipe.to(device)
    # Fused attention with a mask or bias hit an illegal address in the backward pass on an H200.
    torch.backends.cuda.enable_cudnn_sdp(False)
    for name in ("text_encoder", "text_encoder_2"):
        getattr(pipe, name).set_attn_implementation("eager")
    live = nn.ModuleDict({name: getattr(pipe, name) for name in NETWORKS}).train()
    mean = copy.deepcopy(live).eval().requires_grad_(False)
    averaged = FluxPipeline(**(pipe.components | dict(mean.items())))
    averaged.set_progress_bar_config(disable=True)
    matrices = [
        p
        for name, p in live.named_parameters()
        if p.ndim == 2 and "blocks" in name and "norm" not in name
    ]
    chosen = {id(p) for p in matrices}
    others = [p for p in live.parameters() if id(p) not in chosen]
    muon = Muon(matrices, lr=LR_MATRIX)
    adamw = torch.optim.AdamW(others, lr=LR_OTHER, betas=(0.9, 0.98), weight_decay=0.0)
    log = {"step": 0, "images": 0, "seconds": 0.0, "loss": [], "fidelity": []}
    state = args.out / "state.pt"
    if args.resume and state.exists():
        saved = torch.load(state, map_location=device, weights_only=True)
        live.load_state_dict(saved["live"])
        mean.load_state_dict(saved["mean"])
        muon.load_state_dict(saved["muon"])
        adamw.load_state_dict(saved["adamw"])
    if args.resume and (args.out / "log.json").exists():
        log = json.loads((args.out / "log.json").read_text())
    if args.compile:
        # The tiling analysis of PyTorch 2.11 asserts on dynamic shapes; a block that still does not
        # compile runs eagerly.
        torch._inductor.config.triton.coalesce_tiling_analysis = False
        torch._dynamo.config.suppress_errors = True
        pipe.transformer.compile_repeated_blocks(dynamic=True)

    def keep() -> None:
        (args.out / "log.json").write_text(json.dumps(log))
        torch.save(
            {
                "live": live.state_dict(),
                "mean": mean.state_dict(),
                "muon": muon.state_dict(),
                "adamw": adamw.state_dict(),
            },
            state,
        )
        plot(log, args.out / "loss.png")
        save(averaged, args.out / "model")

    total = 60 * sum(phase.minutes for phase in PLAN)
    until = min(total, log["seconds"] + 60 * args.minutes)
    before, started, first_step = log["seconds"], time.time(), log["step"]
    next_check = before + args.check_seconds
    batches = _batches(pipe, data, log, args)
    bar = tqdm(unit="step", mininterval=5, initial=log["step"])
    while log["seconds"] < until and not (args.dry_run and log["step"] >= first_step + 3):
        rate = _rate(log["step"], log["seconds"] / total)
        for optimizer, peak in ((muon, LR_MATRIX), (adamw, LR_OTHER)):
            for group in optimizer.param_groups:
                group["lr"] = peak * rate
        side, latents, ids, ids_2, generator = next(batches)
        with torch.autocast(device, torch.bfloat16):
            loss = _flow_loss(live, side, latents, ids, ids_2, data.empty, generator)
        loss.backward()
        nn.utils.clip_grad_norm_(live.parameters(), 1.0)
        for optimizer in (muon, adamw):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        decay = min(EMA, (1 + log["step"]) / (10 + log["step"]))
        torch._foreach_lerp_(list(mean.parameters()), list(live.parameters()), 1 - decay)
        log["step"] += 1
        log["images"] += len(latents)
        if log["step"] % 50 == 0:
            value = loss.item()  # waits for the GPU, so the clock below is right
            log["loss"].append([log["step"], side, value])
            bar.set_postfix(side=side, loss=f"{value:.4f}", lr=f"{rate:.2f}")
        log["seconds"] = before + time.time() - started
        bar.update()
        if log["seconds"] >= next_check or log["seconds"] >= until:
            next_check += args.check_seconds
            for size in sorted({min(256, side), side} if not args.dry_run else {128}):
                result = _check(averaged, size, args)
                log["fidelity"].append([log["step"], log["seconds"], size, result["right"]])
                bar.write(json.dumps({"step": log["step"], "side": size, **result}))
            keep()
    bar.close()
    speed = (log["step"] - first_step) / (time.time() - started)
    print(f"{log['images']:,} images, {log['seconds']:.0f} s, {speed:.1f} steps/s in this slice")
    keep()


def plot(log: dict, path: Path) -> None:
    """Loss by picture side, and fidelity of the averaged weights, over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for side in sorted({row[1] for row in log["loss"]}):
        steps, values = zip(*((s, v) for s, at, v in log["loss"] if at == side), strict=True)
        left.plot(steps, values, ".", markersize=3, label=f"{side}x{side}")
    left.set(xlabel="step", ylabel="flow matching loss", yscale="log")
    for side in sorted({row[2] for row in log["fidelity"]}):
        steps, values = zip(
            *((s, 100 * v) for s, _, at, v in log["fidelity"] if at == side), strict=True
        )
        right.plot(steps, values, "o-", markersize=3, label=f"{side}x{side}")
    right.set(xlabel="step", ylabel="held-out captions fully right (%)", ylim=(0, 102))
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend() if axis.get_legend_handles_labels()[0] else None
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _flow_loss(
    live, side: int, latents: Tensor, ids: Tensor, ids_2: Tensor, empty: Tensor, generator
) -> Tensor:
    """Mean squared error of the velocity `noise - latents` at a random time."""
    size, device = len(latents), latents.device
    u = torch.sigmoid(torch.randn(size, generator=generator, device=device))
    draw = torch.rand(2, size, generator=generator, device=device)
    shift = torch.where(draw[0] < CAPTION_SHARE, SHIFT_CAPTION[side], SHIFT_DETAIL[side])
    t = shift * u / (1 + (shift - 1) * u)  # [B], 1 is pure noise
    ids = torch.where((draw[1] < NO_POOLED)[:, None], empty, ids)
    noise = torch.randn(latents.shape, generator=generator, device=device)
    noisy = torch.lerp(latents, noise, t[:, None, None])
    velocity = live["transformer"](
        hidden_states=noisy,
        timestep=t,
        encoder_hidden_states=live["text_encoder_2"](ids_2).last_hidden_state,
        pooled_projections=live["text_encoder"](ids).pooler_output,
        txt_ids=torch.zeros(ids_2.shape[1], 3, device=device),
        img_ids=image_ids(side, device),
        return_dict=False,
    )[0]
    return F.mse_loss(velocity.float(), noise - latents)


def _batches(pipe: FluxPipeline, data: Data, log: dict, args: argparse.Namespace) -> Iterator:
    """Side, latents `[B, S, 32]`, CLIP and T5 ids, and the generator of the step."""
    generator = torch.Generator(args.device)
    chooser = torch.Generator()
    while True:
        chooser.manual_seed(args.seed * 1_000_003 + log["step"])
        generator.manual_seed(args.seed * 1_000_003 + log["step"])
        side = _choose(_phase(log["seconds"]).sides, chooser)
        length = _choose(TEXT_LENGTH, chooser)
        side, batch = (128, 2) if args.dry_run else (side, BATCH[side])
        images, index = data.images(side, batch * PREFETCH, generator)
        with torch.no_grad(), torch.autocast(args.device, torch.bfloat16):
            latents = encode(pipe.vae, images).float()
        for part, rows in zip(latents.split(batch), index.split(batch), strict=True):
            yield side, part, *data.captions(rows, length, generator), generator


@torch.no_grad()
def _check(pipe: FluxPipeline, side: int, args: argparse.Namespace) -> dict:
    """Fidelity of the averaged weights on fixed held-out captions, by the stock pipeline."""
    scenes = held_out_scenes(4 if args.dry_run else args.check_captions, seed=args.seed)
    images, size = [], 64 if side >= 512 else 256
    with torch.autocast(args.device, torch.bfloat16):
        for first in range(0, len(scenes), size):
            images += pipe(
                [scene.text for scene in scenes[first : first + size]],
                height=side,
                width=side,
                num_inference_steps=2 if args.dry_run else 20,
                max_sequence_length=64,
                generator=torch.Generator(args.device).manual_seed(args.seed),
            ).images
    verdicts = score(images, scenes)
    return {"right": accuracy(verdicts), **breakdown(verdicts)}


def _rate(step: int, progress: float) -> float:
    """Warm up, stay, then fall linearly."""
    return min(1.0, (step + 1) / WARMUP_STEPS, max(0.02, (1 - progress) / (1 - DECAY_FROM)))


def _phase(seconds: float) -> Phase:
    for phase in PLAN:
        seconds -= 60 * phase.minutes
        if seconds < 0:
            return phase
    return PLAN[-1]


def _choose(weights: dict[int, float], generator: torch.Generator) -> int:
    index = torch.multinomial(torch.tensor(list(weights.values())), 1, generator=generator)
    return list(weights)[int(index)]


def _tokens(tokenizer, texts: list[str], length: int = 0) -> Tensor:
    """Padded token ids of captions, word by word: 100 times faster than the tokenizer's own way."""
    *start, end = tokenizer("").input_ids
    words = {word for text in texts for word in text.split()}
    table = {word: tokenizer(word, add_special_tokens=False).input_ids for word in words}
    rows = [start + [i for w in text.split() for i in table[w]] + [end] for text in texts]
    assert rows[:8] == tokenizer(texts[:8]).input_ids, "words do not tokenize independently"
    length = max(length, max(map(len, rows)))
    return torch.tensor([row + [tokenizer.pad_token_id] * (length - len(row)) for row in rows])


def save(pipe: FluxPipeline, folder: Path) -> None:
    """Write a loadable pipeline in half precision: 15 MB."""
    components = {
        name: copy.deepcopy(part).half() if isinstance(part, nn.Module) else part
        for name, part in pipe.components.items()
    }
    FluxPipeline(**components).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=("vae", "flow"))
    parser.add_argument("--out", type=Path, default=Path("runs/flux-micro"), help="run folder")
    parser.add_argument("--minutes", type=float, default=9.0, help="length of this slice")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--check-seconds", type=float, default=120.0, help="between fidelity checks"
    )
    parser.add_argument("--check-captions", type=int, default=128)
    parser.add_argument("--dry-run", action="store_true", help="three steps of a tiny model")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    args.out.mkdir(parents=True, exist_ok=True)
    model = args.out / "model"
    new = build(width=64, double=1, single=1) if args.dry_run else build()
    if args.stage == "flow" or args.resume:
        pipe = FluxPipeline.from_pretrained(model, torch_dtype=torch.float32)
    else:
        pipe = new
    pipe.scheduler = new.scheduler
    scenes = 256 if args.dry_run else SCENES
    data = Data(pipe, scenes=scenes, seed=args.seed, device=args.device)
    if args.stage == "vae":
        train_vae(pipe, data, args)
        save(pipe, model)
    else:
        train_flow(pipe, data, args)


if __name__ == "__main__":
    main()

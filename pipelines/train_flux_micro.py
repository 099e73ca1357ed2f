"""Train flux-micro: a 6 M parameter stock FluxPipeline that draws captioned shapes.

    python pipelines/train_flux_micro.py vae  --out runs/flux-micro --minutes 1.5
    python pipelines/train_flux_micro.py text --out runs/flux-micro
    python pipelines/train_flux_micro.py flow --out runs/flux-micro --minutes 9
    python pipelines/train_flux_micro.py flow --out runs/flux-micro --minutes 9 --resume

The first stage trains the autoencoder, the second the text encoders, on captions alone (see
`flux_micro_text`), the third the transformer by flow matching (arXiv:2210.02747), on what the other two
have become. Pictures are drawn and encoded on the fly and never repeat. The third stage follows `PLAN`
by minutes trained and may be cut into slices: each ends by itself after `--minutes`, saves `state.pt`,
and the next continues with `--resume`. `--dry-run` runs a stage for a few steps with a tiny model.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch._dynamo
import torch._inductor.config
import torch.nn.functional as F
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn
from tqdm import tqdm

from pipelines.flux_micro import build, decode, encode, image_ids
from pipelines.flux_micro_data import Data
from pipelines.flux_micro_text import train_text
from pipelines.muon import Muon
from visionfuse.shapes import (
    accuracy,
    arrange,
    breakdown,
    draw,
    held_out_scenes,
    pack,
    score,
)
from visionfuse.shapes.captions import COLORS, SHAPES


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of the training, `minutes` long.

    sides: picture sides and how often each is drawn. captions: share of the samples at times where the
    caption decides (`SHIFT_CAPTION`). rate: learning rate at its start; it stays for half of the phase and
    then falls to zero.
    """

    minutes: float
    sides: dict[int, float]
    captions: float
    rate: float = 1.0


# Small pictures first, because they are cheap and what stands where is learned on them; the tips of small
# stars come last.
PLAN = (
    Phase(minutes=5.0, sides={256: 1.0}, captions=0.75),
    Phase(minutes=8.2, sides={256: 0.4, 512: 0.6}, captions=0.6),
    Phase(minutes=3.2, sides={256: 0.75, 512: 0.25}, captions=0.35, rate=0.5),
)
BATCH = {128: 448, 256: 112, 512: 20}
# Time shifts. Flat shapes show through the noise early (256x256: the loss knows the caption only above
# t = 0.85), so most samples are drawn where the caption matters, the rest where edges get sharp.
SHIFT_CAPTION = {128: 6.0, 256: 12.0, 512: 20.0}
SHIFT_DETAIL = {128: 1.5, 256: 2.0, 512: 3.2}
TEXT_LENGTH = {64: 0.88, 128: 0.05, 256: 0.03, 512: 0.04}  # padding is not masked, so it is varied
LR_MATRIX, LR_OTHER = 3e-3, 1.5e-3
WARMUP_STEPS = 200
EMA = 0.999
PREFETCH = 4  # batches drawn at once: drawing waits for the GPU
SCENES = 128_000
TEXT_STEPS = 2500
ALIGN = 0.1  # weight of the alignment loss


def train_vae(pipe: FluxPipeline, data: Data, args: argparse.Namespace) -> None:
    """L1 with heavier edges, a weak KL term, and noise on the latents to make decoding robust."""
    vae = pipe.vae.to(args.device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=3e-3, weight_decay=0.0, betas=(0.9, 0.99))
    generator = torch.Generator(args.device).manual_seed(args.seed)
    started, losses, bar = time.time(), [], tqdm(unit="step", mininterval=5)
    side, batch = (32, 8) if args.dry_run else (128, 80)
    while (progress := (time.time() - started) / (60 * args.minutes)) < 1:
        images, *_ = data.images(side, batch, generator)
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
        images, *_ = data.images(2 * side, 8 if args.dry_run else 128, generator)
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
    # cuDNN's fused attention hit an illegal address in the backward pass on an H200 (PyTorch 2.11).
    torch.backends.cuda.enable_cudnn_sdp(False)
    pipe.vae.to(memory_format=torch.channels_last)
    live = pipe.transformer.train()
    mean = copy.deepcopy(live).eval().requires_grad_(False)
    averaged = FluxPipeline(**(pipe.components | {"transformer": mean}))
    averaged.set_progress_bar_config(disable=True)
    align = Alignment(live).to(device)
    matrices = [
        p
        for name, p in live.named_parameters()
        if p.ndim == 2 and "blocks" in name and "norm" not in name
    ]
    chosen = {id(p) for p in matrices}
    others = [p for p in [*live.parameters(), *align.parameters()] if id(p) not in chosen]
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
        # PyTorch 2.11 with dynamic shapes: the tiling analysis asserts, and a mixed-order reduction
        # slices its workspace wrongly (a missing parenthesis; illegal address in the backward pass).
        torch._inductor.config.triton.mix_order_reduction = False
        torch._inductor.config.triton.coalesce_tiling_analysis = False
        torch._dynamo.config.suppress_errors = True
        for block in (*live.transformer_blocks, *live.single_transformer_blocks):
            block.forward = torch.compile(block.forward, dynamic=True)  # hooks stay outside

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
        phase, rate = _phase(log["seconds"])
        rate *= min(1.0, (log["step"] - first_step + 1) / WARMUP_STEPS)
        for optimizer, peak in ((muon, LR_MATRIX), (adamw, LR_OTHER)):
            for group in optimizer.param_groups:
                group["lr"] = peak * rate
        side, latents, tokens, pooled, labels, generator = next(batches)
        with torch.autocast(device, torch.bfloat16):
            loss = _flow_loss(live, side, latents, tokens, pooled, phase.captions, generator)
            aligned = align(labels)
        (loss + ALIGN * aligned).backward()
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
            bar.set_postfix(
                side=side, loss=f"{value:.4f}", align=f"{aligned.item():.3f}", lr=f"{rate:.2f}"
            )
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
    live, side: int, latents: Tensor, tokens: Tensor, pooled: Tensor, captions: float, generator
) -> Tensor:
    """Mean squared error of the velocity `noise - latents` at a random time."""
    size, device = len(latents), latents.device
    u = torch.sigmoid(torch.randn(size, generator=generator, device=device))
    early = torch.rand(size, generator=generator, device=device) < captions
    shift = torch.where(early, SHIFT_CAPTION[side], SHIFT_DETAIL[side])
    t = shift * u / (1 + (shift - 1) * u)  # [B], 1 is pure noise
    noise = torch.randn(latents.shape, generator=generator, device=device)
    noisy = torch.lerp(latents, noise, t[:, None, None])
    velocity = live(
        hidden_states=noisy,
        timestep=t,
        encoder_hidden_states=tokens,
        pooled_projections=pooled,
        txt_ids=torch.zeros(tokens.shape[1], 3, device=device),
        img_ids=image_ids(side, device),
        return_dict=False,
    )[0]
    return F.mse_loss(velocity.float(), noise - latents)


class Alignment(nn.Module):
    """Training aid: half-way through, an image token must know which object it will belong to.

    The flow loss sees an object's identity in few pixels and few time steps; naming it for every token
    at every time step (as arXiv:2410.06940 aligns tokens with a recogniser) shortens training. The
    classifier is thrown away. Shape and colour have heads of their own, so that no pair is ruled out.
    """

    def __init__(self, transformer: FluxTransformer2DModel):
        super().__init__()
        width = transformer.inner_dim
        self.norm = nn.LayerNorm(width)
        self.heads = nn.ModuleList(nn.Linear(width, 1 + len(names)) for names in (SHAPES, COLORS))
        blocks = transformer.single_transformer_blocks
        blocks[(len(blocks) - 1) // 2].register_forward_hook(self._keep)

    def _keep(self, block, args, output) -> None:
        self.tokens = output[1]

    def forward(self, labels: Tensor) -> Tensor:
        """Cross entropy of `labels` `[2, B, tokens]`, objects and background weighing the same."""
        tokens, self.tokens = self.norm(self.tokens), None
        inside = (labels[0] > 0).float()
        weight = inside / inside.sum().clamp(min=1) + (1 - inside) / (1 - inside).sum().clamp(min=1)
        losses = [
            F.cross_entropy(head(tokens).float().transpose(1, 2), truth, reduction="none")
            for head, truth in zip(self.heads, labels, strict=True)
        ]
        return torch.stack([(loss * weight).sum() for loss in losses]).sum()


def _batches(pipe: FluxPipeline, data: Data, log: dict, args: argparse.Namespace) -> Iterator:
    """Side, latents `[B, S, 32]`, CLIP and T5 ids, and the generator of the step."""
    generator = torch.Generator(args.device)
    chooser = torch.Generator()
    while True:
        chooser.manual_seed(args.seed * 1_000_003 + log["step"])
        generator.manual_seed(args.seed * 1_000_003 + log["step"])
        side = _choose(_phase(log["seconds"])[0].sides, chooser)
        length = _choose(TEXT_LENGTH, chooser)
        side, batch = (128, 2) if args.dry_run else (side, BATCH[side])
        images, index, labels = data.images(side, batch * PREFETCH, generator)
        ids, ids_2 = data.captions(index, length, generator)
        with torch.no_grad(), torch.autocast(args.device, torch.bfloat16):
            latents = encode(pipe.vae, images).float()
            tokens = pipe.text_encoder_2(ids_2).last_hidden_state
            pooled = pipe.text_encoder(ids).pooler_output
        for n in range(PREFETCH):
            rows = slice(n * batch, (n + 1) * batch)
            yield side, latents[rows], tokens[rows], pooled[rows], labels[:, rows], generator


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
    new, seen = accuracy(verdicts[::2]), accuracy(verdicts[1::2])
    return {"right": accuracy(verdicts), "new": new, "seen": seen, **breakdown(verdicts)}


def _phase(seconds: float) -> tuple[Phase, float]:
    """The phase at a time, and its learning rate: it stays, then falls linearly."""
    for phase in PLAN:
        if seconds < 60 * phase.minutes or phase is PLAN[-1]:
            break
        seconds -= 60 * phase.minutes
    left = 1 - seconds / (60 * phase.minutes)
    return phase, phase.rate * min(1.0, max(0.02, 2 * left))


def _choose(weights: dict[int, float], generator: torch.Generator) -> int:
    index = torch.multinomial(torch.tensor(list(weights.values())), 1, generator=generator)
    return list(weights)[int(index)]


def save(pipe: FluxPipeline, folder: Path) -> None:
    """Write a loadable pipeline in half precision: 15 MB."""
    components = {
        name: copy.deepcopy(part).half() if isinstance(part, nn.Module) else part
        for name, part in pipe.components.items()
    }
    FluxPipeline(**components).save_pretrained(folder)
    for path in folder.glob("*/config.json"):  # the folder it came from tells nobody anything
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=("vae", "text", "flow"))
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
    if args.stage != "vae" or args.resume:
        pipe = FluxPipeline.from_pretrained(model, dtype=torch.float32)
    else:
        pipe = new
    pipe.scheduler = new.scheduler
    scenes = 256 if args.dry_run else SCENES
    data = Data(pipe, scenes=scenes, seed=args.seed, device=args.device)
    if args.stage == "vae":
        train_vae(pipe, data, args)
        save(pipe, model)
    elif args.stage == "text":
        pipe.text_encoder, pipe.text_encoder_2 = new.text_encoder, new.text_encoder_2
        train_text(pipe, data, steps=3 if args.dry_run else TEXT_STEPS)
        save(pipe, model)
    else:
        train_flow(pipe, data, args)


if __name__ == "__main__":
    main()

"""Train wan-micro: an 8 M parameter stock WanPipeline that draws captioned videos of moving shapes.

    python pipelines/train_wan_micro.py text  --out runs/wan-micro
    python pipelines/train_wan_micro.py vae   --out runs/wan-micro --minutes 2
    python pipelines/train_wan_micro.py flow  --out runs/wan-micro --minutes 10
    python pipelines/train_wan_micro.py flow  --out runs/wan-micro --minutes 10 --resume

or with `accelerate launch --num_processes 4 --mixed_precision bf16` instead of `python` for vae and flow. The
first stage trains the text encoder on captions alone, the second the VAE, the third the transformer by flow
matching on latents that are encoded once. `OUT/model` is a complete pipeline after every stage; the third saves
the averaged weights there every two minutes. `--slice-minutes` ends a call early, to go on with `--resume`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import WanPipeline, WanTransformer3DModel
from torch import Tensor, nn

from visionfuse.pipelines.muon import muon_and_adamw
from visionfuse.pipelines.train_wan import save_model
from visionfuse.pipelines.train_wan_data import Samples, shapes, training_shapes
from visionfuse.pipelines.train_wan_loop import Settings, Source, train
from visionfuse.pipelines.train_wan_phases import Times
from visionfuse.pipelines.wan_micro import build, save
from visionfuse.pipelines.wan_micro_text import CAPTIONS, train_text
from visionfuse.pipelines.wan_micro_vae import CLIPS, measure_latents, train_vae
from visionfuse.shapes.captions import COLORS, SHAPES
from visionfuse.shapes.fidelity import accuracy, breakdown
from visionfuse.shapes.video import MOTIONS, held_out_clips
from visionfuse.shapes.video_fidelity import score_clips
from visionfuse.shapes.video_render import FRAMES

TEXT_STEPS = 1500
# Shares and shifts of the times: what moves where is decided in noise, edges get sharp late.
# By the side of the videos: a larger picture shows through more noise.
TIMES = {128: Times(((0.7, 12.0), (0.3, 2.0))), 256: Times(((0.7, 20.0), (0.3, 3.2)))}
BATCH = {128: 96, 256: 14}
RATE = 3e-3
GUIDANCE, CHECK_STEPS = 3.0, 20


class Alignment(nn.Module):
    """Training aid: half-way through, a token must know which shape, colour and motion it belongs to.

    The flow loss sees what a caption says in few pixels and few time steps; naming it for every token at every
    time (as arXiv:2410.06940 aligns tokens with a recogniser) shortens training. The classifiers are thrown
    away, and have heads of their own, so that no combination is ruled out.
    """

    def __init__(self, transformer: WanTransformer3DModel):
        super().__init__()
        config = transformer.config
        width = config.num_attention_heads * config.attention_head_dim
        self.norm = nn.LayerNorm(width)
        sizes = (len(SHAPES), len(COLORS), len(MOTIONS))
        self.heads = nn.ModuleList(nn.Linear(width, 1 + size) for size in sizes)
        self.tokens: Tensor | None = None
        blocks = transformer.blocks
        blocks[(len(blocks) - 1) // 2].register_forward_hook(self._keep)

    def _keep(self, block, args, output) -> None:
        self.tokens = output if torch.is_grad_enabled() else None

    def forward(self, labels: Tensor) -> Tensor:
        """Cross entropy of `labels` `[B, 3, tokens]`, shapes and background weighing the same."""
        assert self.tokens is not None
        tokens, self.tokens = self.norm(self.tokens), None
        inside = (labels[:, 0] > 0).float()
        weight = inside / inside.sum().clamp(min=1) + (1 - inside) / (1 - inside).sum().clamp(min=1)
        losses = [
            F.cross_entropy(head(tokens).float().transpose(1, 2), truth, reduction="none")
            for head, truth in zip(self.heads, labels.unbind(1), strict=True)
        ]
        return torch.stack([(loss * weight).sum() for loss in losses]).sum()


@torch.no_grad()
def draw_videos(
    pipe: WanPipeline, captions: Sequence[str], *, side: int, steps: int, guidance: float, seed: int,
    frames: int = FRAMES,
) -> np.ndarray:  # fmt: skip
    """uint8 `[N, F, H, W, 3]`. The noise of a video depends on its own seed, `seed + i`, alone."""
    videos = pipe(
        list(captions),
        negative_prompt=[""] * len(captions),
        height=side,
        width=side,
        num_frames=frames,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=[torch.Generator("cpu").manual_seed(seed + i) for i in range(len(captions))],
        output_type="pt",
    ).frames  # [N, F, 3, H, W]
    return (videos.float() * 255).round().byte().permute(0, 1, 3, 4, 2).cpu().numpy()


def check_captions(pipe: WanPipeline, *, side: int, count: int, seed: int) -> dict:
    """Fidelity on held-out captions by the stock pipeline."""
    clips = held_out_clips(count, seed=seed)
    pipe.set_progress_bar_config(disable=True)
    device = pipe.transformer.device
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        videos = draw_videos(pipe, [clip.text for clip in clips], side=side, steps=CHECK_STEPS,
                             guidance=GUIDANCE, seed=seed)  # fmt: skip
    verdicts = score_clips(videos, clips)
    new, seen = accuracy(verdicts[::2]), accuracy(verdicts[1::2])
    return {"right": accuracy(verdicts), "new": new, "seen": seen, **breakdown(verdicts)}


def source_of(
    pipe: WanPipeline, args: argparse.Namespace, side: int, share: float, rank: int
) -> Source:
    """Videos of one size; a file keeps them on a machine where calls follow each other."""
    videos = max(round(args.videos * (args.side[0] / side) ** 2), 1)
    path = args.out / f"latents-{side}-{videos}-{rank}.pt"
    if path.exists():
        samples = Samples(**torch.load(path, map_location=pipe.vae.device, weights_only=True))
    else:
        samples = training_shapes(pipe, videos, side=side, seed=args.seed * 1000 + rank)
        torch.save(samples._asdict(), path)
    batch = args.batch or BATCH.get(side, BATCH[128])
    return Source(samples, batch, TIMES.get(side, TIMES[128]), share)


def train_flow(
    pipe: WanPipeline, model: Path, args: argparse.Namespace, accelerator: Accelerator, began: float
) -> None:
    pipe.to(accelerator.device)
    pipe.vae.requires_grad_(False)
    pipe.text_encoder.requires_grad_(False)
    with accelerator.autocast():
        sources = [
            source_of(pipe, args, side, share, accelerator.process_index)
            for side, share in zip(args.side, args.share or [1.0] * len(args.side), strict=True)
        ]
        held_out = held_out_clips(args.check_captions, seed=1)
        held_out = shapes(pipe, held_out, side=args.side[0], seed=1)
    accelerator.print(f"videos ready after {time.monotonic() - began:.0f} s", flush=True)
    settings = Settings(
        minutes=None if args.steps else args.minutes, steps=args.steps,
        slice_minutes=args.slice_minutes, slice_steps=args.slice_steps, steady=0.5, ema=0.999, align=0.1, seed=args.seed, log_steps=args.log_steps,
        gap_steps=args.gap_steps, check_seconds=args.check_seconds, save_seconds=args.save_seconds,
    )  # fmt: skip

    def check(pipe: WanPipeline) -> dict:
        save_model(model, pipe.transformer, model, accelerator, torch.float16)
        found = {side: check_captions(pipe, side=side, count=args.check_captions, seed=args.seed)
                 for side in args.side}  # fmt: skip
        first, *others = args.side
        return found[first] | {f"right at {side}": found[side]["right"] for side in others}

    log = train(
        pipe, sources, held_out, settings.after(time.monotonic() - began), args.out, accelerator,
        lambda trainee: muon_and_adamw(trainee, RATE),
        alignment=Alignment(pipe.transformer) if settings.align else None, check=check,
        resume=args.resume, compile=args.compile,
    )  # fmt: skip
    speed = log.step / max(log.seconds, 1e-9)
    accelerator.print(f"flow: {log.step} steps, {log.seconds:.0f} s, {speed:.1f} steps/s")


def main(argv: Sequence[str] | None = None) -> None:
    args, began = _parser().parse_args(argv), time.monotonic()
    accelerator = Accelerator(
        cpu=args.device == "cpu", mixed_precision="bf16" if args.device == "cuda" else "no"
    )
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True  # for the 3-D convolutions of the VAE
    args.out.mkdir(parents=True, exist_ok=True)
    model = args.out / "model"
    new = build(width=64, layers=2, vae_width=8) if args.dry_run else build()
    pipe = new
    if (model / "model_index.json").exists():
        pipe = WanPipeline.from_pretrained(model, dtype=torch.float32, use_safetensors=True)
        pipe.scheduler = new.scheduler
    accelerator.wait_for_everyone()
    if args.stage == "text":
        steps = args.steps or (3 if args.dry_run else TEXT_STEPS)
        captions = 512 if args.dry_run else CAPTIONS
        pipe.text_encoder, pipe.tokenizer = new.text_encoder, new.tokenizer
        train_text(pipe, steps=steps, device=str(accelerator.device), seed=args.seed, captions=captions)  # fmt: skip
        save(pipe, model)
    elif args.stage == "vae":
        if args.resume is False:
            pipe.vae = new.vae
        error = train_vae(
            pipe.vae, accelerator, minutes=args.minutes, batch=args.batch or 48, steps=args.steps,
            seed=args.seed, clips=64 if args.dry_run else CLIPS, decoder_only=args.decoder_only,
        )  # fmt: skip
        if accelerator.is_main_process:
            said = measure_latents(pipe.vae.to(accelerator.device), accelerator.device,
                                   clips=args.check_captions, seed=0, keep=args.decoder_only)  # fmt: skip
            print(said, json.dumps({"last weighted error": round(error, 4)}))
            save(pipe, model)
    else:
        if args.restart:
            pipe.transformer = new.transformer
        train_flow(pipe, model, args, accelerator, began)
    accelerator.end_training()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("stage", choices=("text", "vae", "flow"))
    add("--out", type=Path, default=Path("runs/wan-micro"), help="run folder")
    add(
        "--minutes",
        type=float,
        default=10.0,
        help="length of the whole stage, encoding included; or:",
    )
    add("--steps", type=int)
    add(
        "--slice-minutes",
        type=float,
        help="end this call after so long, to go on with --resume; or:",
    )
    add("--slice-steps", type=int)
    add("--resume", action="store_true", help="continue the run in OUT")
    add(
        "--decoder-only",
        action="store_true",
        help="vae, with --resume: keep the latents as they are",
    )
    add("--restart", action="store_true", help="flow: from random weights, not from those in OUT/model")  # fmt: skip
    add(
        "--side",
        type=int,
        nargs="+",
        default=[128],
        help="flow: pixels, one size or several (default: 128)",
    )
    add("--share", type=float, nargs="+", help="of the steps, for each size (default: equal)")
    add("--batch", type=int, help=f"of every process (default: by size, {BATCH}; vae: 48)")
    add("--videos", type=int, default=49_152,
        help="encoded by every process at the first size, fewer at larger ones (default: 49152)")  # fmt: skip
    add("--check-captions", type=int, default=64)
    add("--check-seconds", type=float, default=120.0)
    add("--save-seconds", type=float, default=60.0)
    add("--log-steps", type=int, default=50)
    add("--gap-steps", type=int, default=500)
    add("--seed", type=int, default=0)
    add("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")  # fmt: skip
    add("--compile", action=argparse.BooleanOptionalAction, default=True)
    add("--dry-run", action="store_true", help="a tiny model")
    return parser


if __name__ == "__main__":
    main()

"""Fine-tune a Wan model under a recipe: rounded formats and sparse plans in the forward, exact gradients back.

    python pipelines/train_wan.py runs/wan-micro/model --recipe "fps" --data shapes --steps 2000 --batch 64 \\
        --rate 2e-4 --out runs/wan-fps
    accelerate launch --num_processes 8 --use_fsdp --fsdp_version 2 pipelines/train_wan.py \\
        Wan-AI/Wan2.1-T2V-1.3B-Diffusers --recipe "fps" --data videos/ --height 480 --width 832 --frames 81
    python pipelines/train_wan.py ... --resume

`--data` is "shapes", the project's own rendered videos, or a folder (see `train_wan_data`). Defaults are those of
FPSAttention (arXiv 2506.04648, appendix): AdamW at 5e-6, warm-up 200, decay 1e-4, clip 1, EMA 0.99, shift 5.
`OUT/model` becomes a pipeline folder with the averaged weights (only its transformer, where the model came from
the Hub); OUT also gets state/ for --resume, log.json and loss.png.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from diffusers import WanPipeline
from huggingface_hub import save_torch_state_dict

from visionfuse.pipelines.muon import muon_and_adamw
from visionfuse.pipelines.train_wan_data import FRAMES, Samples, folder, shapes, training_shapes
from visionfuse.pipelines.train_wan_loop import Settings, Source, Trainee, train
from visionfuse.pipelines.train_wan_phases import Times
from visionfuse.pipelines.train_wan_teacher import load as load_teacher
from visionfuse.pipelines.variants import Variant
from visionfuse.pipelines.wan_micro import forget_origin
from visionfuse.shapes.video import held_out_clips

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def save_model(
    source: str | Path, transformer: Any, out: Path, accelerator: Accelerator, dtype: torch.dtype
) -> None:
    """Write `transformer` to `out/transformer`, and beside it the rest of the pipeline folder `source`."""
    state = cast(dict[str, torch.Tensor], accelerator.get_state_dict(transformer))
    if not accelerator.is_main_process:
        return
    if Path(source).is_dir() and Path(source).resolve() != out.resolve():
        shutil.copytree(source, out, ignore=shutil.ignore_patterns("transformer", "*.md"), dirs_exist_ok=True)  # fmt: skip
    target = out / "transformer"
    shutil.rmtree(target, ignore_errors=True)
    transformer.save_config(target)
    forget_origin(target / "config.json")
    save_torch_state_dict(
        {name: value.to(dtype, copy=True) for name, value in state.items()},  # gathered ones share
        target,
        filename_pattern="diffusion_pytorch_model{suffix}.safetensors",
    )


def adamw(trainee: Trainee, rate: float) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW(trainee.parameters(), lr=rate, betas=(0.9, 0.999), eps=1e-15, weight_decay=1e-4)]  # fmt: skip


OPTIMIZERS = {"adamw": adamw, "muon": muon_and_adamw}


def load_samples(pipe: WanPipeline, args: argparse.Namespace, rank: int) -> tuple[Samples, Samples]:
    """Training and held-out samples. Every process renders shapes of its own; a folder's last tenth is held out."""
    if args.data != "shapes":
        found = folder(pipe, Path(args.data), height=args.height, width=args.width, frames=args.frames)  # fmt: skip
        kept = max(len(found.latents) // 10, 1)
        if len(found.latents) < 4:
            raise ValueError(f"{args.data} has {len(found.latents)} videos; at least 4 are needed.")
        return (
            found._replace(latents=found.latents[:-kept], text=found.text[:-kept]),
            found._replace(latents=found.latents[-kept:], text=found.text[-kept:]),
        )
    size = {"side": args.height, "frames": args.frames}
    seed = args.seed * 1000 + rank
    return (
        training_shapes(pipe, args.videos, seed=seed, **size),
        shapes(pipe, held_out_clips(args.held_out, seed=1), seed=1, **size),
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = _parser()
    args, began = parser.parse_args(argv), time.monotonic()
    accelerator = Accelerator(
        cpu=args.device == "cpu",
        mixed_precision="bf16" if args.device == "cuda" else "no",
        project_dir=args.out,
    )
    torch.set_float32_matmul_precision("high")
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        settings = Settings(
            steps=args.steps, minutes=args.minutes, slice_steps=args.slice_steps,
            slice_minutes=args.slice_minutes, rate=args.rate, warmup=args.warmup, drop=args.drop,
            ema=args.ema, sampling_steps=args.sampling_steps, seed=args.seed, log_steps=args.log_steps,
            gap_steps=args.gap_steps, steady=args.steady,
        )  # fmt: skip
        pipe = WanPipeline.from_pretrained(args.model, dtype=torch.float32, use_safetensors=True)
        Variant.parse(args.recipe).enable(pipe)
        pipe.vae.to(accelerator.device).requires_grad_(False)
        pipe.text_encoder.to(accelerator.device).requires_grad_(False)
        teacher = (
            load_teacher(args.teacher, pipe.transformer, blocks=args.blocks)
            if args.teacher
            else None
        )
        samples, held_out = load_samples(pipe, args, accelerator.process_index)
    except (ValueError, OSError, NotImplementedError) as error:
        parser.error(str(error))
    if args.gradient_checkpointing:
        pipe.transformer.enable_gradient_checkpointing()
    source = Source(samples, args.batch, Times(tuple(args.times)))
    log = train(
        pipe, [source], held_out, settings.after(time.monotonic() - began), args.out, accelerator,
        lambda trainee: OPTIMIZERS[args.optimizer](trainee, settings.rate), teacher=teacher,
        resume=args.resume, compile=args.compile,
    )  # fmt: skip
    save_model(args.model, pipe.transformer, args.out / "model", accelerator, DTYPES[args.save_dtype])  # fmt: skip
    if accelerator.is_main_process:
        print(f"{log.step} steps in {log.seconds:.0f} s; {args.out / 'model'}")
    accelerator.end_training()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", help="folder of a WanPipeline, or its name on the Hugging Face Hub")
    add(
        "--recipe",
        default="fps",
        help="a recipe and its options in quotes, a JSON file, or 'stock'",
    )
    add(
        "--teacher",
        help="distil: folder or name of a WanPipeline whose outputs are learned, not the data's",
    )
    add("--blocks", type=float, default=0.2,
        help="with --teacher: weight of the error of the blocks' outputs (default: 0.2)")  # fmt: skip
    add("--data", default="shapes", help="'shapes' or a folder of videos with a metadata.jsonl")
    add("--out", type=Path, default=Path("runs/train-wan"))
    add("--steps", type=int, help="length of the whole training; or:")
    add("--minutes", type=float, help="the same, encoding included")
    add("--slice-steps", type=int, help="end this call after so many steps, to go on with --resume; or:")  # fmt: skip
    add("--slice-minutes", type=float)
    add("--resume", action="store_true", help="go on from OUT/state")
    add("--batch", type=int, default=1, help="of every process (default: 1)")
    add("--rate", type=float, default=5e-6, help="learning rate (default: 5e-6)")
    add(
        "--optimizer",
        choices=OPTIMIZERS,
        default="adamw",
        help="muon is for weights that are not sharded",
    )
    add("--warmup", type=int, default=200, help="steps (default: 200)")
    add("--steady", type=float, default=1.0,
        help="share of the length after which the rate falls (default: 1, never)")  # fmt: skip
    add("--times", type=_pair, nargs="+", default=[(1.0, 5.0)], metavar="SHARE:SHIFT",
        help="mixture of logit-normal times (default: 1:5)")  # fmt: skip
    add("--drop", type=float, default=0.1, help="share of empty captions (default: 0.1)")
    add("--ema", type=float, default=0.99)
    add("--sampling-steps", type=int, default=50, help="of the generations to come (default: 50)")
    add("--height", type=int, default=128)
    add("--width", type=int, default=128)
    add("--frames", type=int, default=FRAMES, help="4 k + 1 (default: 17)")
    add("--videos", type=int, default=16_384, help="rendered by every process (default: 16384)")
    add("--held-out", type=int, default=64, help="rendered, for the loss gap (default: 64)")
    add("--gradient-checkpointing", action="store_true")
    add("--compile", action="store_true", help="compile the blocks")
    add("--save-dtype", choices=DTYPES, default="bfloat16")
    add("--log-steps", type=int, default=50)
    add("--gap-steps", type=int, default=500)
    add("--seed", type=int, default=0)
    add("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")  # fmt: skip
    return parser


def _pair(text: str) -> tuple[float, float]:
    share, colon, shift = text.partition(":")
    if not colon:
        raise argparse.ArgumentTypeError(f"expected SHARE:SHIFT such as 0.5:5, got {text!r}")
    return float(share), float(shift)


if __name__ == "__main__":
    main()

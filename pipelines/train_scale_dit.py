"""Train the LoRA of Scale-DiT for a FLUX.1 model: large images whose guidance is a small one (arXiv 2510.16325).

    python pipelines/train_scale_dit.py black-forest-labs/FLUX.1-dev --images photos --out runs/scale-dit --size 1024x1024
    python pipelines/train_scale_dit.py assets/flux-micro --shapes --out runs/micro --size 1024x1024 --steps 400

`--images` is a folder of pictures, each with its caption in a .txt file of the same name; `--shapes` draws captioned
shapes without end. An image and its bicubic quarter are encoded, the image is noised, and the velocity that the
model predicts for it, with local attention and the clean quarter as guidance, is compared with noise - image. The LoRA
acts on the guidance everywhere and on the image only where queries, keys and values are made; it is written in the
format of PEFT and diffusers: `pipe.load_lora_weights("runs/scale-dit")`. A run continues where it stopped with --resume.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import FluxPipeline
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from visionfuse import routing
from visionfuse.context import ACTIVE, Routed
from visionfuse.kernels.plan import AttentionPlan, Segment, TokenLayout, plan_attention
from visionfuse.recipes import build
from visionfuse.scale_dit import Guidance, guided
from visionfuse.scale_dit.guidance import NTK_FACTOR
from visionfuse.shapes import render
from visionfuse.shapes.captions import training_scenes
from visionfuse.sites import SITES

# What the published LoRA adapts.
TARGETS = (
    r"x_embedder|transformer_blocks\.\d+\.(norm1\.linear|attn\.to_[qkv]|attn\.to_out\.0|ff\.net\.2)"
    r"|single_transformer_blocks\.\d+\.(norm\.linear|proj_mlp|proj_out|attn\.to_[qkv])"
)
NO_CAPTION = 0.1
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class Data(Protocol):
    def batch(self, count: int, generator: torch.Generator) -> tuple[Tensor, list[str]]:
        """Images [B, 3, H, W] in 0 to 1 and their captions."""
        ...


@dataclass(frozen=True)
class Photos:
    """Pictures of a folder, cut to the size from their middle."""

    folder: Path
    size: tuple[int, int]

    def batch(self, count: int, generator: torch.Generator) -> tuple[Tensor, list[str]]:
        paths = sorted(p for p in self.folder.iterdir() if p.suffix.lower() in SUFFIXES)
        if not paths:
            raise ValueError(f"There are no pictures ({', '.join(SUFFIXES)}) in {self.folder}.")
        chosen = [paths[i] for i in torch.randint(len(paths), (count,), generator=generator)]
        texts = [p.with_suffix(".txt") for p in chosen]
        captions = [t.read_text(encoding="utf-8").strip() if t.is_file() else "" for t in texts]
        return torch.stack([self.picture(path) for path in chosen]), captions

    def picture(self, path: Path) -> Tensor:
        pixels = np.asarray(Image.open(path).convert("RGB"))
        height, width = self.size
        scale = max(height / pixels.shape[0], width / pixels.shape[1])
        pixels = cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
        cut = np.ascontiguousarray(pixels[top : top + height, left : left + width])
        return torch.from_numpy(cut).permute(2, 0, 1).float() / 255


class Shapes:
    """Drawn pictures that never repeat."""

    def __init__(
        self, size: tuple[int, int], device: torch.device | str = "cpu", scenes: int = 4096
    ):
        if size[0] != size[1]:
            raise ValueError(f"Shapes are drawn on squares, got {size}.")
        self.side, self.device = size[0], device
        self.scenes = list(islice(training_scenes(0), scenes))

    def batch(self, count: int, generator: torch.Generator) -> tuple[Tensor, list[str]]:
        chosen = [self.scenes[i] for i in torch.randint(len(self.scenes), (count,), generator=generator)]  # fmt: skip
        seed = int(torch.randint(2**31, (), generator=generator))
        return render(chosen, self.side, seed, self.device), [scene.text for scene in chosen]


@contextmanager
def local_attention(model: Any, plan: AttentionPlan) -> Iterator[None]:
    """The attention of a model, outside of a pipeline, by a plan whose order its tokens have."""
    with ExitStack() as changes:
        changes.callback(ACTIVE.clear)
        for layer in SITES[type(model).__name__].layers(model):
            changes.callback(routing.route(layer.processor))
        ACTIVE.variants = (Routed((plan.blocks,)),)
        ACTIVE.permutation = plan.permutation
        yield


class Training:
    """A model with its LoRA, and what a step does."""

    def __init__(self, pipe: FluxPipeline, args: argparse.Namespace, accelerator: Accelerator):
        self.pipe, self.args, self.accelerator = pipe, args, accelerator
        model = pipe.transformer.requires_grad_(False)
        config = LoraConfig(r=args.rank, lora_alpha=args.rank, init_lora_weights="gaussian", target_modules=TARGETS)  # fmt: skip
        model.add_adapter(config)
        if args.checkpointing:
            model.enable_gradient_checkpointing()
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.data = parameter.float()  # updates of bf16 weights would round away
        self.model = model.train()
        self.weights = [p for p in model.parameters() if p.requires_grad]
        unit = args.scale * pipe.vae_scale_factor * 2
        if args.size[0] % unit or args.size[1] % unit:
            raise ValueError(f"Sides must be multiples of {unit}, got {args.size}.")
        self.coarse = args.size[0] // unit, args.size[1] // unit
        self.image = args.scale * self.coarse[0], args.scale * self.coarse[1]
        recipe = build("scale_dit", rule=args.rule)
        layout = TokenLayout((Segment("text", (args.text_length,)), Segment("grid", self.image),
                              Segment("guidance", self.coarse)))  # fmt: skip
        self.plan = plan_attention(layout, recipe.plan, order=recipe.order, impl=args.impl,
                                   head_dim=model.config.attention_head_dim, device=accelerator.device)  # fmt: skip

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        vae = self.pipe.vae
        latents = vae.encode((images * 2 - 1).to(vae.device, vae.dtype)).latent_dist.mode()
        latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
        return self.pipe._pack_latents(latents, *latents.shape).float()

    def backward(self, images: Tensor, captions: list[str], generator: torch.Generator) -> Tensor:
        """Add the gradients of flow matching on the image, at times sigmoid(N(0, 1)); returns the loss."""
        args, model, device = self.args, self.model, self.accelerator.device
        small = F.interpolate(images, scale_factor=1 / args.scale, mode="bicubic", antialias=True)
        clean, low = self.encode(images), self.encode(small.clamp(0, 1))
        if self.plan.permutation is not None:
            text = args.text_length
            order = self.plan.permutation[text : text + clean.shape[1]] - text
            clean = clean[:, order]
        noise = torch.randn(clean.shape, generator=generator).to(device)
        t = torch.randn(len(captions), generator=generator).sigmoid().to(device)
        drop = torch.rand(len(captions), generator=generator) < NO_CAPTION
        captions = ["" if d else c for d, c in zip(drop.tolist(), captions, strict=True)]
        with torch.no_grad():
            words, pooled, text_ids = self.pipe.encode_prompt(
                captions, None, device=device, max_sequence_length=args.text_length
            )
        dtype = words.dtype
        noisy = ((1 - t[:, None, None]) * clean + t[:, None, None] * noise).to(dtype)
        guidance = Guidance(
            latents=low.to(dtype), coarse=self.coarse, image=self.image, ntk=args.ntk
        )
        strength = torch.ones_like(t) if model.config.guidance_embeds else None
        # Around the gradients too: with checkpointing they compute blocks again.
        with local_attention(model, self.plan), guided(model, guidance):
            with self.accelerator.autocast():
                velocity = model(
                    hidden_states=noisy, encoder_hidden_states=words, pooled_projections=pooled,
                    timestep=t.to(dtype), guidance=strength, txt_ids=text_ids, img_ids=text_ids,
                    return_dict=False,
                )[0]  # fmt: skip
            loss = F.mse_loss(velocity.float(), noise - clean) / args.accumulate
            self.accelerator.backward(loss)
        return loss.detach()

    def run(self, data: Data) -> list[float]:
        args, accelerator = self.args, self.accelerator
        optimizer = torch.optim.AdamW(self.weights, lr=args.lr, weight_decay=0.01)
        losses: list[float] = []
        state = args.out / "state.pt"
        if args.resume and state.is_file():
            saved = torch.load(state, map_location=accelerator.device, weights_only=True)
            set_peft_model_state_dict(self.model, saved["lora"])
            optimizer.load_state_dict(saved["optimizer"])
            losses = json.loads((args.out / "losses.json").read_text())
        optimizer = accelerator.prepare(optimizer)
        end = min(args.steps, args.stop_at or args.steps)
        bar = tqdm(range(len(losses), end), initial=len(losses), total=args.steps, desc="scale_dit")
        for step in bar:
            total = 0.0
            for part in range(args.accumulate):
                # So that a resumed run sees what one in one piece does.
                seed = (args.seed << 40) + (step << 8) + part
                set_seed(seed % 2**32)
                generator = torch.Generator().manual_seed(seed)
                total += self.backward(*data.batch(args.batch, generator), generator)
            accelerator.clip_grad_norm_(self.weights, args.clip)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(total))
            bar.set_postfix(loss=f"{losses[-1]:.4f}")
            if (step + 1) % args.every == 0 or step + 1 == end:
                self.save(optimizer, losses)
        return losses

    def save(self, optimizer: Any, losses: list[float]) -> None:
        weights = get_peft_model_state_dict(self.model)
        state = {"lora": weights, "optimizer": optimizer.state_dict()}
        torch.save(state, self.args.out / "state.pt")
        FluxPipeline.save_lora_weights(self.args.out, transformer_lora_layers=weights)
        (self.args.out / "losses.json").write_text(json.dumps(losses))
        plot(losses, self.args.out / "loss.png")


def plot(losses: list[float], path: Path) -> None:
    """The loss of every step, and its running mean."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    window = max(1, len(losses) // 20)
    mean = np.convolve(losses, np.ones(window) / window, "valid")
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    axis.plot(losses, alpha=0.3, label="step")
    axis.plot(np.arange(len(mean)) + window - 1, mean, label=f"mean of {window}")
    axis.set(xlabel="steps", ylabel="loss", title="flow matching")
    axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument(
        "model", help="a FLUX.1 pipeline: a folder, or a name on the Hugging Face Hub"
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", type=Path, help="folder of pictures with captions")
    source.add_argument("--shapes", action="store_true", help="draw pictures of captioned shapes")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", default="1024x1024", help="height x width, pixels")
    parser.add_argument("--scale", type=int, default=4, help="by which the guidance is smaller")
    parser.add_argument("--rule", default="columns", help="of the recipe scale_dit")
    parser.add_argument("--ntk", type=float, default=NTK_FACTOR)
    parser.add_argument("--impl", default="auto", help="for whose tiles the plan is made")
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--stop-at", type=int, help="end there, to go on later")
    parser.add_argument(
        "--every", type=int, default=200, help="steps from checkpoint to checkpoint"
    )
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--accumulate", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--clip", type=float, default=0.1)
    parser.add_argument("--text-length", type=int, default=512)
    parser.add_argument(
        "--checkpointing", action="store_true", help="recompute blocks in the backward pass"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto")
    args = parser.parse_args(argv)
    height, _, width = args.size.partition("x")
    args.size = int(height), int(width or height)
    args.out.mkdir(parents=True, exist_ok=True)
    on_gpu = args.device == "auto" and torch.cuda.is_available()
    accelerator = Accelerator(mixed_precision="bf16" if on_gpu else "no", cpu=args.device == "cpu")
    if args.impl == "auto":
        args.impl = "triton" if on_gpu else "blocks"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    pipe = FluxPipeline.from_pretrained(args.model, dtype=dtype, use_safetensors=True)
    pipe.to(accelerator.device)
    data = Shapes(args.size, accelerator.device) if args.shapes else Photos(args.images, args.size)
    set_seed(args.seed)  # of the first weights
    Training(pipe, args, accelerator).run(data)


if __name__ == "__main__":
    main()

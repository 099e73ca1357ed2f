"""Teach the text encoder of wan-micro to read: what stands where, in which colour, and what it does."""

from __future__ import annotations

from itertools import islice

import torch
from diffusers import WanPipeline
from torch import Tensor, nn
from tqdm import tqdm

from visionfuse.pipelines.micro_text import Reader, all_read, reading_loss
from visionfuse.shapes.captions import BACKGROUNDS, COLORS, SHAPES
from visionfuse.shapes.video import MAX_ACTORS, MOTIONS, held_out_clips, training_clips
from visionfuse.shapes.video_render import Clips, pack_clips

CAPTIONS = 65_536
BATCH, RATE, DROPOUT = 512, 1e-3, 0.1
CLASSES = {
    "shape": len(SHAPES) + 1,  # class 0: no shape
    "color": len(COLORS),
    "motion": len(MOTIONS),
    "background": len(BACKGROUNDS) + 1,  # class 0: not named
}


def answers(clips: Clips) -> dict[str, Tensor]:
    """The right classes `[B, 2]`, -100 where there is nothing to name."""
    absent = clips.shape < 0
    background = (clips.background + 1)[:, None].expand_as(clips.shape)
    return {
        "shape": clips.shape + 1,
        "color": clips.color.masked_fill(absent, -100),
        "motion": clips.motion.masked_fill(absent, -100),
        "background": background.masked_fill(absent, -100),
    }


def train_text(
    pipe: WanPipeline, *, steps: int, device: str, seed: int = 0, captions: int = CAPTIONS
) -> float:
    """Train the text encoder on captions alone. Returns the share of held-out captions read right."""
    encoder = pipe.text_encoder.to(device)
    reader = Reader(encoder.config.d_model, MAX_ACTORS, CLASSES).to(device)
    parts = nn.ModuleList([encoder, reader]).train()
    for module in parts.modules():
        if isinstance(module, nn.Dropout):
            module.p = DROPOUT
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parts.parameters() if p.ndim == 2], "weight_decay": 0.1},
            {"params": [p for p in parts.parameters() if p.ndim != 2], "weight_decay": 0.0},
        ],
        lr=RATE,
        betas=(0.9, 0.98),
    )
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    clips = list(islice(training_clips(seed), captions))
    told = pipe.tokenizer([clip.text for clip in clips], padding=True, return_tensors="pt")
    ids, mask = told.input_ids.to(device), told.attention_mask.to(device)
    packed = pack_clips(clips).to(device)
    bar = tqdm(range(steps), unit="step", mininterval=5)
    for step in bar:
        index = torch.randint(len(ids), (min(BATCH, captions),), device=device)
        embeddings = encoder(ids[index], mask[index]).last_hidden_state * mask[index][..., None]
        loss = reading_loss(reader(embeddings), answers(packed[index]))
        loss.backward()
        for part in parts:
            nn.utils.clip_grad_norm_(part.parameters(), 1.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
    for module in parts.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    parts.eval()
    return _read(pipe, reader, device)


@torch.no_grad()
def _read(pipe: WanPipeline, reader: Reader, device: str) -> float:
    clips = held_out_clips(500)
    told = pipe.tokenizer([clip.text for clip in clips], padding=True, return_tensors="pt")
    mask = told.attention_mask.to(device)
    embeddings = pipe.text_encoder(told.input_ids.to(device), mask).last_hidden_state
    right = all_read(reader(embeddings * mask[..., None]), answers(pack_clips(clips).to(device)))
    new, seen = right[::2].float().mean().item(), right[1::2].float().mean().item()
    print(f"text: {new:.1%} of captions with new pairs and {seen:.1%} of the others read right")
    return right.float().mean().item()

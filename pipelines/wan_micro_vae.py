"""Train the VAE of wan-micro on windows of shapes videos: 64x64 pixels around a shape, 9 or 17 frames."""

from __future__ import annotations

import time
from itertools import islice

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKLWan
from torch import Tensor, nn
from tqdm import tqdm

from visionfuse.pipelines.muon import Muon
from visionfuse.pipelines.wan_micro import decode, encode, without_attention
from visionfuse.shapes.fidelity import accuracy, breakdown
from visionfuse.shapes.render import draw
from visionfuse.shapes.video import held_out_clips, training_clips
from visionfuse.shapes.video_fidelity import score_clips
from visionfuse.shapes.video_render import Clips, animate, pack_clips, render_clips, stage

CLIPS = 16_384
SIDE, FRAMES = (
    64,
    (9, 17),
)  # of a window, in turns: short ones are cheap, long ones show the late frames
VIDEO_SIDES = (128, 128, 128, 256)  # pixels of the videos that windows are cut from
LR_CONVOLUTIONS, LR_OTHER, WARMUP_STEPS = 1e-2, 3e-3, 100
NOISE = 0.1  # of the latents' standard deviation, so that decoding forgives what denoising leaves
KL = 1e-4


class Autoencoder(nn.Module):
    """One module for both halves, because distributed training wraps a forward."""

    def __init__(self, vae: AutoencoderKLWan):
        super().__init__()
        self.vae = vae

    def forward(self, videos: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Restored `[B, F, 3, H, W]` in 0..1 and the KL term. noise: `[B, 1, 1, 1, 1]`, times the std."""
        posterior = self.vae.encode((videos * 2 - 1).transpose(1, 2)).latent_dist
        latents = posterior.sample()
        latents = latents + noise * latents.detach().std() * torch.randn_like(latents)
        restored = self.vae.decode(latents).sample
        return restored.transpose(1, 2) / 2 + 0.5, posterior.kl().mean() / latents[0].numel()


def windows(clips: Clips, generator: torch.Generator, *, side: int, frames: int) -> Tensor:
    """`[B, frames, 3, side, side]` in 0..1, each around a shape of a clip, at the pixels of a whole video."""
    device, n = clips.shape.device, len(clips.shape)

    def uniform(*size: int) -> Tensor:
        return torch.rand(n, *size, generator=generator, device=device)

    layout = animate(stage(clips, generator), clips.motion)
    total = len(layout.shape) // n
    start = (uniform() * (total - frames + 1)).long()
    rows = torch.arange(n, device=device)[:, None] * total + start[:, None]
    rows = (rows + torch.arange(frames, device=device)).flatten()
    layout = layout.take(rows)
    scale = torch.tensor(VIDEO_SIDES, device=device)[(uniform() * len(VIDEO_SIDES)).long()] / side
    which = ((uniform() < 0.5) & (clips.shape[:, 1] >= 0)).long()
    middle = layout.center.unflatten(0, (n, frames))[torch.arange(n, device=device), frames // 2]
    middle = middle[torch.arange(n, device=device), which] + (uniform(2) - 0.5) / scale[:, None]
    scale, middle = scale.repeat_interleave(frames), middle.repeat_interleave(frames, 0)
    center = (layout.center - middle[:, None]) * scale[:, None, None] + 0.5
    layout = layout._replace(center=center, radius=layout.radius * scale[:, None])
    return draw(layout, side).unflatten(0, (n, frames))


def train_vae(
    vae: AutoencoderKLWan, accelerator: Accelerator, *, minutes: float, batch: int,
    steps: int | None = None, seed: int = 0, clips: int = CLIPS, decoder_only: bool = False,
) -> float:  # fmt: skip
    """L1 with heavier edges, a weak KL term, and noise on the latents. Returns the mean error.

    Ends after `minutes`, or after `steps`. batch: short windows of every process; fewer long ones. decoder_only:
    what a transformer was trained on stays as it is.
    """
    device = accelerator.device
    packed = pack_clips(list(islice(training_clips(seed), clips))).to(device)
    generator = torch.Generator(device).manual_seed(seed * 1009 + accelerator.process_index)
    without_attention(vae)
    torch.backends.cuda.enable_cudnn_sdp(False)  # see train_wan_loop
    if decoder_only:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    model = Autoencoder(vae.train())
    trained = [p for p in model.parameters() if p.requires_grad]
    kernels = [p for p in trained if p.ndim >= 4 and p[0, 0].numel() > 1]
    chosen = {id(p) for p in kernels}
    others = [p for p in trained if id(p) not in chosen]
    model, muon, adamw = accelerator.prepare(
        model,
        Muon(kernels, lr=LR_CONVOLUTIONS),
        torch.optim.AdamW(others, lr=LR_OTHER, weight_decay=0.0, betas=(0.9, 0.99)),
    )
    started, step, error = time.time(), 0, torch.zeros(())
    bar = tqdm(unit="step", mininterval=5, disable=not accelerator.is_main_process)
    while (progress := _progress(accelerator, started, step, minutes, steps)) < 1:
        rate = min(1, (step + 1) / WARMUP_STEPS) * max(1 - progress, 0.01)
        for optimizer, peak in ((muon, LR_CONVOLUTIONS), (adamw, LR_OTHER)):
            for group in optimizer.param_groups:
                group["lr"] = peak * rate
        frames = FRAMES[step % len(FRAMES)]
        size = max(batch * FRAMES[0] // frames, 1)
        index = torch.randint(clips, (size,), generator=generator, device=device)
        videos = windows(packed[index], generator, side=SIDE, frames=frames)
        noise = NOISE * torch.rand(size, 1, 1, 1, 1, generator=generator, device=device)
        with accelerator.autocast():
            restored, kl = model(videos, noise)
        flat = videos.flatten(0, 1)
        high, low = F.max_pool2d(flat, 3, 1, 1), -F.max_pool2d(-flat, 3, 1, 1)
        weight = 1 + 8 * (high - low).amax(1, keepdim=True)
        error = ((restored.float().flatten(0, 1) - flat).abs() * weight).mean()
        accelerator.backward(error + KL * kl.float())
        accelerator.clip_grad_norm_(trained, 1.0)
        for optimizer in (muon, adamw):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        bar.update()
        if step % 50 == 0:
            bar.set_postfix(error=f"{error.item():.4f}")
    bar.close()
    vae.eval()
    return error.item()


def _progress(
    accelerator: Accelerator, started: float, step: int, minutes: float, steps: int | None
) -> float:
    """The share that is done, the same in all processes."""
    if steps is not None:
        return step / steps
    now = torch.tensor((time.time() - started) / (60 * minutes), device=accelerator.device)
    if accelerator.num_processes > 1:
        now = accelerator.reduce(now, "max")
    return float(now)  # pyright: ignore[reportArgumentType]


@torch.no_grad()
def measure_latents(
    vae: AutoencoderKLWan, device: torch.device, *, clips: int, seed: int, keep: bool = False
) -> str:
    """Write mean and standard deviation of the latents by channel into the configuration, unless to `keep` what is
    there, and say how good restored videos are: mean error, and captions that OpenCV reads off them."""
    chosen = held_out_clips(clips, seed=seed)
    videos = render_clips(chosen, 128, seed=seed, device=device)
    parts = videos.split(25)
    if not keep:
        channels = vae.config.z_dim
        vae.register_to_config(latents_mean=[0.0] * channels, latents_std=[1.0] * channels)
        latents = torch.cat([encode(vae, part) for part in parts])
        mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
        std = std.clamp(min=0.2 * std.mean().item())  # what hardly varies must not become noise
        vae.register_to_config(
            latents_mean=[round(x, 4) for x in mean.tolist()],
            latents_std=[round(x, 4) for x in std.tolist()],
        )
    restored = torch.cat([decode(vae, encode(vae, part)) for part in parts])
    verdicts = score_clips(restored.cpu(), chosen)
    return (
        f"vae: std by channel {[round(s, 2) for s in vae.config.latents_std]}, mean error "
        f"{(restored - videos).abs().mean():.4f}, {accuracy(verdicts):.1%} of {clips} restored videos "
        f"fully right {breakdown(verdicts)['reasons']}"
    )

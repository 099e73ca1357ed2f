"""The parts of wan-micro: tokenizer, text encoder, VAE and transformer of a stock WanPipeline.

Everything is built from configurations, nothing is downloaded. One token is 8x8 pixels and four frames: the
VAE takes 2x2 pixels at once, as that of Wan 2.2 does, and shrinks by 4 in space and time.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from visionfuse.pipelines.micro_text import word_tokenizer
from visionfuse.shapes.video import clip_vocabulary

TEXT_WIDTH = 128
LATENT_CHANNELS = 24
# Flat shapes show through the noise early: what moves where is decided above t = 0.85.
FLOW_SHIFT = 5.0


def build(
    *, width: int = 256, head_dim: int = 32, layers: int = 8, vae_width: int = 32
) -> WanPipeline:
    """A complete pipeline with random weights in float32.

    width: of the transformer, a multiple of `head_dim`. vae_width: channels of its first level.
    """
    tokenizer = word_tokenizer(clip_vocabulary())
    pipe = WanPipeline(
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW_SHIFT
        ),
        vae=AutoencoderKLWan(
            base_dim=vae_width,
            z_dim=LATENT_CHANNELS,
            dim_mult=[1, 2, 2],
            num_res_blocks=1,
            temperal_downsample=[True, True],
            latents_mean=[0.0] * LATENT_CHANNELS,
            latents_std=[1.0] * LATENT_CHANNELS,
            in_channels=12,
            out_channels=12,
            patch_size=2,
            scale_factor_temporal=4,
            scale_factor_spatial=8,
        ).eval(),
        text_encoder=UMT5EncoderModel(
            UMT5Config(
                vocab_size=len(tokenizer),
                d_model=TEXT_WIDTH,
                d_kv=32,
                d_ff=256,
                num_layers=3,
                num_heads=4,
                dropout_rate=0.0,
                feed_forward_proj="gated-gelu",
            )
        ).eval(),
        tokenizer=tokenizer,
        transformer=WanTransformer3DModel(
            patch_size=(1, 1, 1),
            num_attention_heads=width // head_dim,
            attention_head_dim=head_dim,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            text_dim=TEXT_WIDTH,
            freq_dim=256,
            ffn_dim=3 * width,
            num_layers=layers,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=64,
        ),
    )
    initialise(pipe.transformer)
    return pipe


def without_attention(vae: AutoencoderKLWan) -> None:
    """The VAE's attention adds nothing and is not trained, so that what small windows teach holds at any size."""
    for half in (vae.encoder, vae.decoder):
        for name, parameter in half.get_submodule("mid_block.attentions").named_parameters():
            parameter.requires_grad_(False)
            if ".proj." in name:
                nn.init.zeros_(parameter)


def initialise(transformer: WanTransformer3DModel) -> None:
    """Start as the identity: zero gates, cross attention and output (adaLN-Zero, arXiv:2212.09748)."""
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear):
            if name.endswith(("time_proj", "attn2.to_out.0")) or name == "proj_out":
                nn.init.zeros_(module.weight)
            else:
                nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for name, parameter in transformer.named_parameters():
        if name.endswith("scale_shift_table"):
            nn.init.zeros_(parameter)


def scale_of(vae: AutoencoderKLWan) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents by channel, `[C, 1, 1, 1]`, on the VAE's device."""
    config = vae.config
    mean, std = (
        torch.tensor(values, device=vae.device).view(-1, 1, 1, 1)
        for values in (config.latents_mean, config.latents_std)
    )
    return mean, std


def encode(vae: AutoencoderKLWan, videos: Tensor) -> Tensor:
    """Videos `[B, F, 3, H, W]` in 0..1 to normalised latents `[B, C, (F - 1) / 4 + 1, H / 8, W / 8]`."""
    latents = vae.encode((videos * 2 - 1).transpose(1, 2)).latent_dist.mode()
    mean, std = scale_of(vae)
    return (latents.float() - mean) / std


def decode(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """The inverse of `encode`."""
    mean, std = scale_of(vae)
    videos = vae.decode((latents * std + mean).to(vae.dtype)).sample
    return (videos.transpose(1, 2).float() / 2 + 0.5).clamp(0, 1)


def save(pipe: WanPipeline, folder: Path) -> None:
    """Write a loadable pipeline in half precision."""
    components = {
        name: copy.deepcopy(part).half() if isinstance(part, nn.Module) else part
        for name, part in pipe.components.items()
    }
    WanPipeline(**components).save_pretrained(folder)
    for path in folder.glob("*/config.json"):
        forget_origin(path)


def forget_origin(path: Path) -> None:
    """Take the folder that a component was read from out of its config.json: it tells nobody anything."""
    config = json.loads(path.read_text())
    config.pop("_name_or_path", None)
    path.write_text(json.dumps(config, indent=2) + "\n")

"""The parts of flux-micro: tokenizers, text encoders, VAE and transformer of a stock FluxPipeline.

Everything is built from configurations, nothing is downloaded. One token is 8x8 pixels: the VAE
shrinks by 4 (three block widths), FLUX packs 2x2 latents into a token.
"""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from visionfuse.pipelines.micro_text import CHARACTERS, word_tokenizer
from visionfuse.shapes import vocabulary

TEXT_WIDTH = 128
LATENT_CHANNELS = 8
TOKEN_PIXELS = 8


def build(
    *, width: int = 192, head_dim: int = 32, double: int = 2, single: int = 6
) -> FluxPipeline:
    """A complete pipeline with random weights in float32.

    Args:
        width: transformer width, a multiple of `head_dim`.
        head_dim: channels of an attention head, 32 or 64; both image axes get the same share of it.
        double: number of two-stream blocks.
        single: number of one-stream blocks.
    """
    tokenizer, tokenizer_2 = _clip_tokenizer(), word_tokenizer(vocabulary())
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            # Layouts are decided above t = 0.85: the first third of the steps at exp(1.0).
            base_shift=0.9,
            max_shift=1.1,
            base_image_seq_len=256,
            max_image_seq_len=4096,
        ),
        vae=_vae(),
        text_encoder=_clip(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=_t5(tokenizer_2),
        tokenizer_2=tokenizer_2,
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=4 * LATENT_CHANNELS,
            num_layers=double,
            num_single_layers=single,
            attention_head_dim=head_dim,
            num_attention_heads=width // head_dim,
            joint_attention_dim=TEXT_WIDTH,
            pooled_projection_dim=TEXT_WIDTH,
            guidance_embeds=False,
            axes_dims_rope=(head_dim // 8, head_dim * 7 // 16, head_dim * 7 // 16),
        ),
    )
    _initialise(pipe.transformer)
    return pipe


def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Images `[B, 3, H, W]` in 0..1 to normalised packed latents `[B, H/8 * W/8, 32]`."""
    latents = vae.encode(images * 2 - 1).latent_dist.mode()  # [B, C, H/4, W/4]
    latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    return FluxPipeline._pack_latents(latents, *latents.shape)


def decode(vae: AutoencoderKL, tokens: Tensor, side: int) -> Tensor:
    """The inverse of `encode` for square pictures: `[B, 3, side, side]` in 0..1."""
    latents = FluxPipeline._unpack_latents(tokens, side, side, vae_scale_factor=4)
    latents = latents / vae.config.scaling_factor + vae.config.shift_factor
    return (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)


def image_ids(side: int, device: torch.device | str) -> Tensor:
    """Position ids `[tokens, 3]` of a square picture, as FluxPipeline makes them."""
    tokens = side // TOKEN_PIXELS
    return FluxPipeline._prepare_latent_image_ids(1, tokens, tokens, device, torch.float32)


def _clip_tokenizer() -> CLIPTokenizer:
    """Byte-pair merges that spell each caption word from left to right."""
    merges: list[tuple[str, str]] = []
    for word in vocabulary():
        pieces = [*word[:-1], word[-1] + "</w>"]
        for end in range(1, len(pieces)):
            merges.append(("".join(pieces[:end]), pieces[end]))
    merges = list(dict.fromkeys(merges))
    symbols = ["<|startoftext|>", "<|endoftext|>", *CHARACTERS, *(c + "</w>" for c in CHARACTERS)]
    symbols += [left + right for left, right in merges]
    vocab = {symbol: index for index, symbol in enumerate(dict.fromkeys(symbols))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def _t5(tokenizer: T5Tokenizer) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=TEXT_WIDTH,
        d_kv=32,
        d_ff=256,
        num_layers=3,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config).eval()


def _clip(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=256,
        num_attention_heads=4,
        num_hidden_layers=2,
        projection_dim=TEXT_WIDTH,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config).eval()


def _vae() -> AutoencoderKL:
    widths = (16, 32, 48)
    stages = len(widths)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * stages,
        up_block_types=("UpDecoderBlock2D",) * stages,
        block_out_channels=widths,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=LATENT_CHANNELS,
        sample_size=256,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    ).eval()


def _initialise(transformer: FluxTransformer2DModel) -> None:
    """Start as the identity: zero modulation and output (adaLN-Zero, arXiv:2212.09748)."""
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear):
            zero = name.endswith(("norm.linear", "norm1.linear", "norm1_context.linear"))
            if zero or name in ("norm_out.linear", "proj_out"):
                nn.init.zeros_(module.weight)
            else:
                nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias) if module.bias is not None else None

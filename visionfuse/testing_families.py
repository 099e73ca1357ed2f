"""Tiny pipelines of the other families, with random weights and without text encoders: text comes as numbers.

tiny = TINY["qwen_image"]()
latents = tiny.run()
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers.guiders import ClassifierFreeGuidance
from torch import Tensor

from .testing_pipelines import lively, quiet, single_thread

WIDTH = 32  # of text embeddings
TINY: dict[str, Callable[[], Tiny]] = {}


@dataclass
class Tiny:
    """pipe: a pipeline. call: its arguments. layers: self-attention layers that its site names.
    grid: tokens of the finest attention. moves: whether a recipe may reorder its tokens."""

    pipe: Any
    call: dict[str, Any]
    layers: int
    grid: tuple[int, ...]
    moves: bool = False

    def run(self, **changes) -> Tensor:
        """The latents of one call with a fixed seed."""
        call = {**self.call, "num_inference_steps": 2, "output_type": "latent", **changes}
        with single_thread(), torch.no_grad():
            out = self.pipe(**call, generator=torch.Generator().manual_seed(0), return_dict=False)[
                0
            ]
        return out if isinstance(out, Tensor) else torch.stack(list(out))


def tiny(make: Callable[[], Tiny]) -> Callable[[], Tiny]:
    TINY[make.__name__] = make
    return make


def numbers(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def padding(lengths: list[int], size: int) -> Tensor:
    """A mask [B, size], 1 where a token is valid."""
    return (torch.arange(size) < torch.tensor(lengths)[:, None]).long()


def _build(cls: type, **config):
    torch.manual_seed(0)
    return lively(cls(**config))


def _pipe(cls: type, **components):
    """The pipeline of these components; all others it asks for are None."""
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    absent = {p.name: None for p in parameters if p.default is p.empty}
    return quiet(cls(**{**absent, **components}))


class Loop(diffusers.DiffusionPipeline):
    """A denoising loop and nothing else, for denoisers whose own pipelines ask for much more."""

    def __init__(self, transformer, scheduler):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    def __call__(
        self, latents, num_inference_steps, generator, output_type, return_dict, **arguments
    ):
        self.scheduler.set_timesteps(num_inference_steps)
        for time in self.scheduler.timesteps:
            step = time.expand(len(latents)).to(latents)
            noise = self.transformer(
                hidden_states=latents, timestep=step, return_dict=False, **arguments
            )
            latents = self.scheduler.step(noise[0], time, latents, return_dict=False)[0]
        return (latents,)


@tiny
def qwen_image() -> Tiny:
    transformer = _build(
        diffusers.QwenImageTransformer2DModel, patch_size=2, in_channels=16, out_channels=4, num_layers=2,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=WIDTH, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    pipe = _pipe(
        diffusers.QwenImagePipeline, transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip
    call = {
        "prompt_embeds": numbers(2, 12, WIDTH), "prompt_embeds_mask": padding([12, 7], 12),
        "negative_prompt_embeds": numbers(2, 5, WIDTH, seed=6),
        "negative_prompt_embeds_mask": padding([2, 5], 5),
        "true_cfg_scale": 2.0, "height": 128, "width": 192,
    }  # fmt: skip
    return Tiny(pipe, call, layers=2, grid=(8, 12), moves=True)


@tiny
def z_image() -> Tiny:
    transformer = _build(
        diffusers.ZImageTransformer2DModel, in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2,
        n_kv_heads=2, cap_feat_dim=WIDTH, axes_dims=[4, 6, 6], axes_lens=[256, 32, 32],
    )  # fmt: skip
    pipe = _pipe(
        diffusers.ZImagePipeline, transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip
    call = {
        "prompt_embeds": [numbers(40, WIDTH)], "negative_prompt_embeds": [numbers(7, WIDTH, seed=6)],
        "guidance_scale": 2.0, "height": 96, "width": 160,
    }  # fmt: skip
    return Tiny(pipe, call, layers=2, grid=(6, 10))


@tiny
def sd3() -> Tiny:
    transformer = _build(
        diffusers.SD3Transformer2DModel, sample_size=16, patch_size=2, in_channels=4, num_layers=2,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=WIDTH, caption_projection_dim=32,
        pooled_projection_dim=WIDTH, out_channels=4, pos_embed_max_size=16, dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )  # fmt: skip
    pipe = _pipe(
        diffusers.StableDiffusion3Pipeline, transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip
    call = {
        "prompt_embeds": numbers(1, 9, WIDTH), "negative_prompt_embeds": numbers(1, 9, WIDTH, seed=6),
        "pooled_prompt_embeds": numbers(1, WIDTH), "negative_pooled_prompt_embeds": numbers(1, WIDTH, seed=6),
        "height": 128, "width": 192,
    }  # fmt: skip
    return Tiny(pipe, call, layers=3, grid=(8, 12))


def _unet(**changes):
    config = {
        "block_out_channels": (32, 64), "layers_per_block": 1, "sample_size": 32, "in_channels": 4, "out_channels": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), "attention_head_dim": (2, 4),
        "cross_attention_dim": WIDTH, "norm_num_groups": 2,
    }  # fmt: skip
    return _build(diffusers.UNet2DConditionModel, **config, **changes)


@tiny
def stable_diffusion() -> Tiny:
    pipe = _pipe(
        diffusers.StableDiffusionPipeline,
        unet=_unet(),
        scheduler=diffusers.EulerDiscreteScheduler(),
    )
    call = {
        "prompt_embeds": numbers(1, 9, WIDTH), "negative_prompt_embeds": numbers(1, 9, WIDTH, seed=6),
        "height": 96, "width": 128,
    }  # fmt: skip
    return Tiny(pipe, call, layers=7, grid=(12, 16))


@tiny
def stable_diffusion_xl() -> Tiny:
    unet = _unet(
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=WIDTH + 6 * 8, transformer_layers_per_block=(1, 2),
    )  # fmt: skip
    pipe = _pipe(
        diffusers.StableDiffusionXLPipeline, unet=unet, scheduler=diffusers.EulerDiscreteScheduler()
    )
    call = {
        "prompt_embeds": numbers(1, 9, WIDTH), "negative_prompt_embeds": numbers(1, 9, WIDTH, seed=6),
        "pooled_prompt_embeds": numbers(1, WIDTH), "negative_pooled_prompt_embeds": numbers(1, WIDTH, seed=6),
        "height": 104, "width": 128,
    }  # fmt: skip
    return Tiny(pipe, call, layers=11, grid=(13, 16))


@tiny
def hunyuan_video() -> Tiny:
    transformer = _build(
        diffusers.HunyuanVideoTransformer3DModel, in_channels=4, out_channels=4, num_attention_heads=2,
        attention_head_dim=16, num_layers=1, num_single_layers=1, num_refiner_layers=1, patch_size=2,
        patch_size_t=1, guidance_embeds=True, text_embed_dim=WIDTH, pooled_projection_dim=WIDTH,
        rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    pipe = _pipe(
        diffusers.HunyuanVideoPipeline, transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip
    call = {
        "prompt_embeds": numbers(2, 10, WIDTH), "prompt_attention_mask": padding([10, 6], 10),
        "pooled_prompt_embeds": numbers(2, WIDTH), "height": 64, "width": 96, "num_frames": 9,
    }  # fmt: skip
    return Tiny(pipe, call, layers=2, grid=(3, 4, 6), moves=True)


@tiny
def hunyuan_video_15() -> Tiny:
    transformer = _build(
        diffusers.HunyuanVideo15Transformer3DModel, in_channels=9, out_channels=4, num_attention_heads=2,
        attention_head_dim=16, num_layers=2, num_refiner_layers=1, text_embed_dim=WIDTH, text_embed_2_dim=WIDTH,
        image_embed_dim=WIDTH, rope_axes_dim=(4, 6, 6), target_size=96, task_type="t2v",
    )  # fmt: skip
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(8, 8, 8, 8, 8), layers_per_block=1,
    )  # fmt: skip
    pipe = _pipe(
        diffusers.HunyuanVideo15Pipeline, transformer=transformer, vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        guider=ClassifierFreeGuidance(guidance_scale=2.0),
    )  # fmt: skip
    call = {
        "prompt_embeds": numbers(1, 10, WIDTH), "prompt_embeds_mask": padding([6], 10),
        "prompt_embeds_2": numbers(1, 4, WIDTH), "prompt_embeds_mask_2": padding([0], 4),
        "negative_prompt_embeds": numbers(1, 10, WIDTH, seed=6), "negative_prompt_embeds_mask": padding([3], 10),
        "negative_prompt_embeds_2": numbers(1, 4, WIDTH, seed=6),
        "negative_prompt_embeds_mask_2": padding([2], 4), "height": 64, "width": 96, "num_frames": 9,
    }  # fmt: skip
    return Tiny(pipe, call, layers=2, grid=(3, 4, 6), moves=True)


def _cogvideox(**changes) -> Tiny:
    transformer = _build(
        diffusers.CogVideoXTransformer3DModel, num_attention_heads=2, attention_head_dim=16, in_channels=4,
        out_channels=4, time_embed_dim=8, text_embed_dim=WIDTH, num_layers=2, sample_width=12, sample_height=8,
        sample_frames=9, patch_size=2, max_text_seq_length=10, **changes,
    )  # fmt: skip
    pipe = _pipe(
        diffusers.CogVideoXPipeline,
        transformer=transformer,
        scheduler=diffusers.CogVideoXDDIMScheduler(),
    )
    call = {
        "prompt_embeds": numbers(1, 10, WIDTH), "negative_prompt_embeds": numbers(1, 10, WIDTH, seed=6),
        "height": 64, "width": 96, "num_frames": 9,
    }  # fmt: skip
    return Tiny(pipe, call, layers=2, grid=(3, 4, 6))


@tiny
def cogvideox_2b() -> Tiny:
    return _cogvideox()


@tiny
def cogvideox_5b() -> Tiny:
    made = _cogvideox(use_rotary_positional_embeddings=True)
    made.moves = True
    return made


@tiny
def ltx() -> Tiny:
    transformer = _build(
        diffusers.LTXVideoTransformer3DModel, in_channels=8, out_channels=8, num_attention_heads=2,
        attention_head_dim=16, cross_attention_dim=32, num_layers=2, caption_channels=WIDTH,
    )  # fmt: skip
    pipe = _pipe(
        diffusers.LTXPipeline, transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip
    call = {
        "prompt_embeds": numbers(1, 10, WIDTH), "prompt_attention_mask": padding([6], 10),
        "negative_prompt_embeds": numbers(1, 10, WIDTH, seed=6), "negative_prompt_attention_mask": padding([4], 10),
        "height": 128, "width": 192, "num_frames": 17,
    }  # fmt: skip
    return Tiny(pipe, call, layers=2, grid=(3, 4, 6), moves=True)


@tiny
def pixart() -> Tiny:
    transformer = _build(
        diffusers.PixArtTransformer2DModel, num_attention_heads=2, attention_head_dim=16, in_channels=4,
        out_channels=8, num_layers=2, cross_attention_dim=32, sample_size=16, patch_size=2, caption_channels=WIDTH,
        use_additional_conditions=False, norm_num_groups=2,
    )  # fmt: skip
    pipe = _pipe(
        diffusers.PixArtSigmaPipeline, transformer=transformer,
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )  # fmt: skip
    call = {
        "prompt_embeds": numbers(1, 10, WIDTH), "prompt_attention_mask": padding([6], 10), "negative_prompt": None,
        "negative_prompt_embeds": numbers(1, 10, WIDTH, seed=6), "negative_prompt_attention_mask": padding([4], 10),
        "height": 128, "width": 192, "use_resolution_binning": False,
    }  # fmt: skip
    return Tiny(pipe, call, layers=2, grid=(8, 12))


@tiny
def flux2() -> Tiny:
    transformer = _build(
        diffusers.Flux2Transformer2DModel, in_channels=16, num_layers=1, num_single_layers=2,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=WIDTH, axes_dims_rope=(4, 4, 4, 4),
        timestep_guidance_channels=16, guidance_embeds=False,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8,), down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
        layers_per_block=1, latent_channels=4, norm_num_groups=1,
    )  # fmt: skip
    pipe = _pipe(
        diffusers.Flux2KleinPipeline, transformer=transformer, vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip
    call = {
        "prompt_embeds": numbers(1, 9, WIDTH), "negative_prompt_embeds": numbers(1, 9, WIDTH, seed=6),
        "height": 16, "width": 24,
    }  # fmt: skip
    return Tiny(pipe, call, layers=3, grid=(8, 12), moves=True)


@tiny
def cogview4() -> Tiny:
    transformer = _build(
        diffusers.CogView4Transformer2DModel, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, text_embed_dim=WIDTH, time_embed_dim=8, condition_dim=4, rope_axes_dim=(64, 64),
    )  # fmt: skip
    pipe = _pipe(
        diffusers.CogView4Pipeline, transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip
    call = {
        "prompt_embeds": numbers(1, 16, WIDTH), "negative_prompt_embeds": numbers(1, 16, WIDTH, seed=6),
        "height": 128, "width": 192,
    }  # fmt: skip
    return Tiny(pipe, call, layers=2, grid=(8, 12), moves=True)


@tiny
def lumina2() -> Tiny:
    transformer = _build(
        diffusers.Lumina2Transformer2DModel, sample_size=16, in_channels=4, hidden_size=48, num_layers=2,
        num_refiner_layers=1, num_attention_heads=3, num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 6, 6),
        axes_lens=(64, 32, 32), cap_feat_dim=WIDTH,
    )  # fmt: skip
    pipe = _pipe(
        diffusers.Lumina2Pipeline, transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip
    call = {
        "prompt_embeds": numbers(1, 10, WIDTH), "prompt_attention_mask": padding([6], 10),
        "negative_prompt_embeds": numbers(1, 10, WIDTH, seed=6), "negative_prompt_attention_mask": padding([4], 10),
        "height": 128, "width": 192,
    }  # fmt: skip
    return Tiny(pipe, call, layers=2, grid=(8, 12))


@tiny
def wan_vace() -> Tiny:
    transformer = _build(
        diffusers.WanVACETransformer3DModel, patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16,
        in_channels=4, out_channels=4, text_dim=WIDTH, freq_dim=16, ffn_dim=32, num_layers=2, vace_layers=[0],
        vace_in_channels=2 * 4 + 64, cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    pipe = _pipe(
        diffusers.WanVACEPipeline, transformer=transformer, vae=vae.eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip
    call = {
        "prompt_embeds": numbers(1, 10, WIDTH), "negative_prompt_embeds": numbers(1, 10, WIDTH, seed=6),
        "height": 64, "width": 96, "num_frames": 9,
    }  # fmt: skip
    return Tiny(pipe, call, layers=3, grid=(3, 4, 6), moves=True)


@tiny
def skyreels() -> Tiny:
    transformer = _build(
        diffusers.SkyReelsV2Transformer3DModel, patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16,
        in_channels=4, out_channels=4, text_dim=WIDTH, freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    pipe = _pipe(
        diffusers.SkyReelsV2Pipeline, transformer=transformer,
        scheduler=diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    )  # fmt: skip
    call = {
        "prompt_embeds": numbers(1, 10, WIDTH), "negative_prompt_embeds": numbers(1, 10, WIDTH, seed=6),
        "height": 64, "width": 96, "num_frames": 9,
    }  # fmt: skip
    return Tiny(pipe, call, layers=2, grid=(3, 4, 6))


@tiny
def hunyuan_image() -> Tiny:
    transformer = _build(
        diffusers.HunyuanImageTransformer2DModel, in_channels=4, out_channels=4, num_attention_heads=2,
        attention_head_dim=16, num_layers=1, num_single_layers=1, num_refiner_layers=1, patch_size=(1, 1),
        text_embed_dim=WIDTH, text_embed_2_dim=WIDTH, rope_axes_dim=(8, 8),
    )  # fmt: skip
    pipe = Loop(transformer, diffusers.FlowMatchEulerDiscreteScheduler())
    call = {
        "latents": numbers(2, 4, 8, 12), "encoder_hidden_states": numbers(2, 10, WIDTH),
        "encoder_attention_mask": padding([10, 6], 10), "encoder_hidden_states_2": numbers(2, 4, WIDTH),
        "encoder_attention_mask_2": padding([0, 2], 4),
    }  # fmt: skip
    return Tiny(pipe, call, layers=2, grid=(8, 12), moves=True)


@tiny
def cosmos() -> Tiny:
    transformer = _build(
        diffusers.CosmosTransformer3DModel, in_channels=4, out_channels=4, num_attention_heads=2,
        attention_head_dim=16, num_layers=2, text_embed_dim=WIDTH, adaln_lora_dim=4, max_size=(4, 32, 32),
        concat_padding_mask=False, extra_pos_embed_type="learnable",
    )  # fmt: skip
    pipe = Loop(transformer, diffusers.FlowMatchEulerDiscreteScheduler())
    call = {"latents": numbers(1, 4, 3, 8, 12), "encoder_hidden_states": numbers(1, 10, WIDTH)}
    return Tiny(pipe, call, layers=2, grid=(3, 4, 6))


@tiny
def ltx2() -> Tiny:
    sound = {
        "audio_in_channels": 4, "audio_out_channels": 4, "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 8, "audio_cross_attention_dim": 16,
    }  # fmt: skip
    transformer = _build(
        diffusers.LTX2VideoTransformer3DModel, in_channels=8, out_channels=8, num_attention_heads=2,
        attention_head_dim=16, cross_attention_dim=32, num_layers=2, caption_channels=WIDTH, **sound,
    )  # fmt: skip
    pipe = Loop(transformer, diffusers.FlowMatchEulerDiscreteScheduler())
    call = {
        "latents": numbers(1, 72, 8), "audio_hidden_states": numbers(1, 9, 4),
        "encoder_hidden_states": numbers(1, 10, WIDTH), "audio_encoder_hidden_states": numbers(1, 10, WIDTH, seed=6),
        "num_frames": 3, "height": 4, "width": 6, "audio_num_frames": 9,
    }  # fmt: skip
    return Tiny(pipe, call, layers=2, grid=(3, 4, 6))

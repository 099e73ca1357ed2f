"""Tiny pipelines with random weights, built offline: whole calls in well under a second on a CPU.

pipe = flux_pipeline()
image = run(pipe, height=32, width=48)   # a grid of 16 x 24 tokens, 48 tokens of text
"""

from __future__ import annotations

import string
from contextlib import contextmanager
from math import prod

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    FluxPipeline,
    FluxPriorReduxPipeline,
    FluxTransformer2DModel,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from .kernels.plan import Neighborhood, neighborhood_mask
from .sites import denoisers

TEXT_WIDTH = 32
FLUX_CONFIG = {
    "patch_size": 1,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": TEXT_WIDTH,
    "pooled_projection_dim": TEXT_WIDTH,
    "axes_dims_rope": (4, 4, 8),
}


def flux_transformer(**changes) -> FluxTransformer2DModel:
    """4 layers of 2 heads. Fill takes in_channels=12, out_channels=4."""
    torch.manual_seed(0)
    config = {"in_channels": 4, **FLUX_CONFIG, **changes}
    return lively(FluxTransformer2DModel(**config))


def flux_controlnet() -> FluxControlNetModel:
    torch.manual_seed(1)
    config = {**FLUX_CONFIG, "num_layers": 1, "num_single_layers": 1}
    return lively(FluxControlNetModel(in_channels=4, **config))


def flux_components(**transformer) -> dict:
    """What every FLUX pipeline is made of. The VAE keeps the resolution, so a token is 2 x 2 pixels."""
    transformer = flux_transformer(**transformer)
    torch.manual_seed(2)
    tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "vae": AutoencoderKL(
            sample_size=32,
            in_channels=3,
            out_channels=3,
            block_out_channels=(4,),
            layers_per_block=1,
            latent_channels=1,
            norm_num_groups=1,
            use_quant_conv=False,
            use_post_quant_conv=False,
            shift_factor=0.0609,
            scaling_factor=1.5035,
        ).eval(),
        "text_encoder": CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=TEXT_WIDTH,
                intermediate_size=37,
                num_attention_heads=4,
                num_hidden_layers=2,
                projection_dim=TEXT_WIDTH,
                max_position_embeddings=77,
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=1,
            )
        ).eval(),
        "tokenizer": tokenizer,
        "text_encoder_2": T5EncoderModel(T5Config(**_t5(tokenizer_2))).eval(),
        "tokenizer_2": tokenizer_2,
        "transformer": transformer,
    }


def flux_pipeline(cls: type = FluxPipeline, *, extra: dict | None = None, **transformer):
    """A FLUX pipeline of any class; `extra` holds components beyond the usual seven."""
    return quiet(cls(**flux_components(**transformer), **(extra or {})))


def wan_transformer(seed: int = 0, **changes) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    config = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": TEXT_WIDTH,
        "freq_dim": 256,
        "ffn_dim": 32,
        "num_layers": 2,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 32,
    }
    return lively(WanTransformer3DModel(**{**config, **changes}))


def wan_pipeline(
    cls: type = WanPipeline, *, two_stages: bool = False, scheduler=None, extra=None, **changes
):
    """Wan 2.1, or with `two_stages` Wan 2.2 with a second transformer for the low-noise steps.

    `extra` holds further arguments of the pipeline's class.
    """
    transformer = wan_transformer(**changes)
    torch.manual_seed(2)
    tokenizer = t5_tokenizer()
    return quiet(
        cls(
            tokenizer=tokenizer,
            text_encoder=UMT5EncoderModel(UMT5Config(**_t5(tokenizer))).eval(),
            vae=AutoencoderKLWan(
                base_dim=3,
                z_dim=16,
                dim_mult=[1, 1, 1, 1],
                num_res_blocks=1,
                temperal_downsample=[False, True, True],
            ).eval(),
            scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=7.0),
            transformer=transformer,
            transformer_2=wan_transformer(seed=1) if two_stages else None,
            boundary_ratio=0.875 if two_stages else None,
            **(extra or {}),
        )
    )


def run(pipe, *, steps: int = 3, seed: int = 0, **arguments) -> torch.Tensor:
    """One call with a fixed seed, returning the latents (the VAE would only hide differences)."""
    defaults = {"prompt": "a red cube", "output_type": "latent"}
    if "Flux" in type(pipe).__name__:
        defaults |= {"height": 32, "width": 48, "max_sequence_length": 48}
    else:
        defaults |= {"height": 64, "width": 96, "num_frames": 9, "max_sequence_length": 16}
    generator = torch.Generator().manual_seed(seed)
    arguments = {**defaults, **arguments, "generator": generator, "return_dict": False}
    with single_thread():
        return pipe(num_inference_steps=steps, **arguments)[0]


@contextmanager
def single_thread():
    """At this size threads mostly wait: 20 times slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def clip_tokenizer() -> CLIPTokenizer:
    letters = [*string.ascii_lowercase, *string.digits, ".", ","]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(c + "</w>" for c in letters)]
    return CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=77)


def t5_tokenizer() -> T5Tokenizer:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    pieces += [(c, -3.0) for c in string.ascii_letters + string.digits]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def _t5(tokenizer: T5Tokenizer) -> dict:
    return {
        "vocab_size": len(tokenizer),
        "d_model": TEXT_WIDTH,
        "d_kv": 8,
        "d_ff": 37,
        "num_layers": 2,
        "num_heads": 4,
    }


def lively(model):
    """Random weights of a size at which attention matters and nothing saturates: fresh modulations
    and output projections are so small that a wrong attention would hardly change the output."""
    for name, weight in model.named_parameters():
        if weight.ndim >= 2 and not name.endswith("scale_shift_table"):
            torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
        elif name.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.1)
    return model.eval()


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def explicit_mask(spec: Neighborhood, *, text: int = 0, grids: list[tuple[int, ...]]) -> Tensor:
    """The rule of a recipe pair by pair, bool [S, S] in the model's own order: everything is visible
    except what lies in a query's own grid and outside its window."""
    length = text + sum(prod(grid) for grid in grids)
    mask = torch.ones(length, length, dtype=torch.bool)
    start = text
    for grid in grids:
        end = start + prod(grid)
        mask[start:end, start:end] = neighborhood_mask(spec.resolve(grid))
        start = end
    return mask


@contextmanager
def masked_attention(pipe, mask: Tensor | None):
    """Run a stock pipeline with `mask` in all its self-attention layers, by PyTorch's own attention.

    This is what a recipe must equal: no plan, no order, no kernel of ours. Yields a function that
    replaces the mask, for schedules.
    """

    def replace(new: Tensor | None) -> None:
        nonlocal mask
        mask = new

    def add_mask(module, args, kwargs):
        if len(args) > 2:  # Wan passes (hidden states, text, mask, rotary tables)
            return (*args[:2], mask, *args[3:]), kwargs
        return args, {**kwargs, "attention_mask": mask}

    handles = [
        layer.register_forward_pre_hook(add_mask, with_kwargs=True)
        for denoiser in denoisers(pipe)
        for layer in denoiser.site.layers(denoiser.model)
    ]
    try:
        yield replace
    finally:
        for handle in handles:
            handle.remove()


def ip_adapter_weights(transformer: FluxTransformer2DModel) -> dict:
    """The state dict of an IP-Adapter for this transformer, with 4 image tokens."""
    torch.manual_seed(4)
    width, inner = transformer.config.joint_attention_dim, transformer.inner_dim
    layers = {}
    for i in range(len(transformer.transformer_blocks)):
        for name in ("to_k_ip", "to_v_ip"):
            layers[f"{i}.{name}.weight"] = torch.randn(inner, width) * width**-0.5
            layers[f"{i}.{name}.bias"] = torch.randn(inner) * 0.1
    projection = {
        "proj.weight": torch.randn(4 * width, TEXT_WIDTH) * TEXT_WIDTH**-0.5,
        "proj.bias": torch.zeros(4 * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    return {"image_proj": projection, "ip_adapter": layers}


def redux_pipeline() -> FluxPriorReduxPipeline:
    """Turns an image of 16 x 16 into 4 tokens after 512 tokens of text."""
    text = {k: v for k, v in flux_components().items() if "text" in k or "token" in k}
    torch.manual_seed(5)
    vision = SiglipVisionConfig(
        hidden_size=TEXT_WIDTH,
        intermediate_size=37,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
    )
    return FluxPriorReduxPipeline(
        image_encoder=SiglipVisionModel(vision).eval(),
        feature_extractor=SiglipImageProcessor(size={"height": 16, "width": 16}),
        image_embedder=ReduxImageEncoder(redux_dim=TEXT_WIDTH, txt_in_features=TEXT_WIDTH),
        **text,
    )


class Graphs:
    """A backend of `torch.compile` that runs graphs as they are and counts them."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return graph.forward

    def new(self) -> int:
        """How many there are since the last call."""
        count, self.count = self.count, 0
        return count

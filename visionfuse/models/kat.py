"""The Kolmogorov-Arnold Transformer (Yang & Wang, arXiv 2409.10594) for timm.

A vision transformer whose MLPs are GR-KAN layers with rational activations. State dicts are those of the
published checkpoints. `timm.create_model("kat_tiny_patch16_224", act_layer="gelu")` starts from another
activation than SiLU.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from .rational import GRKANMlp

__all__ = ["KAT"]

INITS = ("kat", "kat_mimetic", "kat_release")


class KAT(VisionTransformer):
    """timm's VisionTransformer with `GRKANMlp`.

    weight_init:
        "kat": the paper's section 4.4, variance-preserving MLPs; attention as in timm's ViT.
        "kat_mimetic": the same with the mimetic attention of the release (Trockman & Kolter, arXiv
            2305.09828), for which it computes a singular value decomposition for every head.
        "kat_release": what the published checkpoints started from: mimetic attention, and all other linear
            layers from a normal distribution of standard deviation 0.02, MLPs too.
        Anything else: as timm's VisionTransformer.
    decay_rationals: let timm's optimizers decay the coefficients, as the published training does.
    """

    def __init__(
        self, *args: Any, weight_init: str = "kat", decay_rationals: bool = False, **kwargs: Any
    ) -> None:
        self.decay_rationals = decay_rationals
        super().__init__(*args, weight_init="skip", **kwargs)
        if weight_init != "skip":
            self.weight_init_mode = weight_init
            self.init_weights(needs_reset=False)

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        mode = mode or self.weight_init_mode
        if mode not in INITS:
            super().init_weights(mode, needs_reset)
            return
        super().init_weights("reset", needs_reset)  # tokens and positions
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        blocks: Any = self.blocks
        for block in blocks:
            if mode != "kat":
                mimetic_attention(block.attn)
            if mode != "kat_release" and isinstance(block.mlp, GRKANMlp):
                block.mlp.preserve_variance()
        if self.fix_init:
            self.fix_init_weight()

    @torch.jit.ignore()
    def set_recompute(self, enable: bool = True) -> None:
        """Let the backward compute the outputs of activations again, see `GRKANMlp`."""
        for module in self.modules():
            if isinstance(module, GRKANMlp):
                module.recompute = enable

    @torch.jit.ignore()
    def no_weight_decay(self) -> set:
        names = set(super().no_weight_decay())
        return (
            names
            if self.decay_rationals
            else names | {"*.weight_numerator", "*.weight_denominator"}
        )


@torch.no_grad()
def mimetic_attention(attn: Any) -> None:
    """Weights whose products W_q W_k^T and W_v W_proj are a multiple of the identity plus noise."""
    dim, heads = attn.proj.weight.shape[0], attn.num_heads
    if attn.proj.weight.is_meta:
        return
    q, k, v = attn.qkv.weight.view(3, dim, dim)
    left, right = _halves(dim, heads, noise=0.7, identity=0.7)
    head_dim = dim // heads
    q.copy_(left[..., :head_dim].mT.reshape(dim, dim))
    k.copy_(right[:, :head_dim].reshape(dim, dim))
    left, right = _halves(dim, 1, noise=0.4, identity=-0.4)
    v.copy_(left[0])
    attn.proj.weight.copy_(right[0])


def _halves(dim: int, count: int, *, noise: float, identity: float) -> tuple[Tensor, Tensor]:
    """L and R [count, dim, dim] with L R = noise U + identity I, entries of U uniform of variance 1 / dim."""
    bound = (3 / dim) ** 0.5
    u = torch.empty(count, dim, dim).uniform_(-bound, bound)
    left, s, right = torch.linalg.svd(noise * u + identity * torch.eye(dim))
    root = s.sqrt()
    return left * root[:, None, :], root[..., None] * right


def _cfg(url: str, **kwargs: Any) -> dict[str, Any]:
    return {
        "url": url, "num_classes": 1000, "input_size": (3, 224, 224), "pool_size": None,
        "crop_pct": 0.875, "interpolation": "bicubic", "fixed_input_size": True,
        "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj", "classifier": "head", "license": "mit",
        "paper_ids": "arXiv:2409.10594", "paper_name": "Kolmogorov-Arnold Transformer",
        "origin_url": "https://github.com/Adamdad/kat", **kwargs,
    }  # fmt: skip


_HUB = "https://huggingface.co/adamdad/kat_pretained/resolve/main"
_RELEASES = "https://github.com/Adamdad/kat/releases/download/checkpoint"

default_cfgs = generate_default_cfgs({
    "kat_tiny_patch16_224.in1k": _cfg(
        url=f"{_HUB}/kat_tiny_patch16_224_"
        "1f3ad3b2e69821f3d412f2924cf159a0e266f142d739cb68f68f796f5a0fe289.pth",
        hf_hub_id="adamdad/kat_tiny_patch16_224",
    ),
    "kat_tiny_patch16_224.vitft": _cfg(
        url=f"{_RELEASES}/kat_tiny_patch16_224-finetune_"
        "64f124d003803e4a7e1aba1ba23500ace359b544e8a5f0110993f25052e402fb.pth",
        hf_hub_id="adamdad/kat_tiny_patch16_224.vitft",
    ),
    "kat_small_patch16_224.in1k": _cfg(
        url=f"{_HUB}/kat_small_patch16_224_"
        "32487885cf13d2c14e461c9016fac8ad43f7c769171f132530941e930aeb5fe2.pth",
        hf_hub_id="adamdad/kat_small_patch16_224",
    ),
    "kat_small_patch16_224.vitft": _cfg(
        url=f"{_RELEASES}/kat_small_patch_224-finetune_"
        "3ae087a4c28e2993468eb377d5151350c52c80b2a70cc48ceec63d1328ba58e0.pth",
        hf_hub_id="adamdad/kat_small_patch16_224.vitft",
    ),
    "kat_base_patch16_224.in1k": _cfg(
        url=f"{_HUB}/kat_base_patch16_224_"
        "abff874d925d756d15cde97303f772a3460ddbd44b9c53fb9ce5cf15be230fb6.pth",
        hf_hub_id="adamdad/kat_base_patch16_224",
    ),
    "kat_base_patch16_224.vitft": _cfg(
        url=f"{_HUB}/kat_base_patch16_224-finetune_"
        "440bf1ead9dd8ecab642078cfb60ae542f1fa33ca65517260501e02c011e38f2.pth",
        hf_hub_id="adamdad/kat_base_patch16_224.vitft",
    ),
})  # fmt: skip


def _create(variant: str, pretrained: bool, **kwargs: Any) -> KAT:
    model_args = {"patch_size": 16, "depth": 12, "mlp_layer": GRKANMlp, "act_layer": "silu"}
    out_indices = kwargs.pop("out_indices", 3)
    return build_model_with_cfg(
        KAT, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **{**model_args, **kwargs},
    )  # fmt: skip


@register_model
def kat_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> KAT:
    """KAT-Tiny: 5.7 M parameters, 74.6% top-1 on ImageNet-1k (published; .vitft 75.7%)."""
    sizes = {"embed_dim": 192, "num_heads": 3}
    return _create("kat_tiny_patch16_224", pretrained, **{**sizes, **kwargs})


@register_model
def kat_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> KAT:
    """KAT-Small: 22.1 M parameters, 81.2% top-1 on ImageNet-1k (published; .vitft 82.0%)."""
    sizes = {"embed_dim": 384, "num_heads": 6}
    return _create("kat_small_patch16_224", pretrained, **{**sizes, **kwargs})


@register_model
def kat_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> KAT:
    """KAT-Base: 86.6 M parameters, 82.3% top-1 on ImageNet-1k (published; .vitft 82.8%)."""
    sizes = {"embed_dim": 768, "num_heads": 12}
    return _create("kat_base_patch16_224", pretrained, **{**sizes, **kwargs})

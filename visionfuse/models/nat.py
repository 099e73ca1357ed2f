"""NAT and DiNAT, the (dilated) neighborhood attention transformers, for timm.

Hassani et al., "Neighborhood Attention Transformer" (CVPR 2023, arXiv 2204.07143); Hassani & Shi, "Dilated
Neighborhood Attention Transformer" (arXiv 2209.15001). State dicts are those of the published checkpoints;
those of transformers (shi-labs/dinat-mini-in1k-224 and others) are translated as they load.
"""

from __future__ import annotations

import re
from typing import Any, cast

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    DropPath,
    Mlp,
    SelectAdaptivePool2d,
    calculate_drop_path_rates,
    register_notrace_module,
    trunc_normal_,
)
from timm.models import (
    build_model_with_cfg,
    checkpoint_seq,
    generate_default_cfgs,
    register_model,
)
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn.functional import pad

from ..neighborhood import NeighborhoodAttention2D

__all__ = ["NAT"]


@register_notrace_module
class PaddedNeighborhoodAttention(NeighborhoodAttention2D):
    """Grids smaller than kernel times dilation are padded to it with zeros, as the checkpoints were trained."""

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1], x.shape[2]
        sides = [k * d for k, d in zip(self.kernel_size, self.dilation, strict=True)]
        below, right = max(0, sides[0] - height), max(0, sides[1] - width)
        x = pad(x, (0, 0, 0, right, 0, below))
        return self.proj_drop(self.proj(self._attend(x, self.qkv(x))[:, :height, :width]))


class NATLayer(nn.Module):
    def __init__(
        self, dim: int, num_heads: int, kernel_size: int, dilation: int, mlp_ratio: float,
        qkv_bias: bool, proj_drop: float, drop_path: float, layer_scale: float | None, impl: str,
        norm_layer: Any, act_layer: Any, dd: dict[str, Any],
    ) -> None:  # fmt: skip
        super().__init__()
        self.norm1 = norm_layer(dim, **dd)
        self.attn = PaddedNeighborhoodAttention(
            dim, num_heads, kernel_size, dilation=dilation, qkv_bias=qkv_bias, proj_drop=proj_drop,
            rel_pos_bias=True, impl=impl, **dd,
        )  # fmt: skip
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=proj_drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        for name in ("gamma1", "gamma2"):
            scale = (
                None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale, **dd))
            )
            self.register_parameter(name, scale)

    def forward(self, x: Tensor) -> Tensor:
        update = self.attn(self.norm1(x))
        x = x + self.drop_path(update if self.gamma1 is None else self.gamma1 * update)
        update = self.mlp(self.norm2(x))
        return x + self.drop_path(update if self.gamma2 is None else self.gamma2 * update)


class ConvTokenizer(nn.Module):
    """(B, C, H, W) -> (B, H / 4, W / 4, dim)."""

    def __init__(self, in_chans: int, dim: int, norm_layer: Any, dd: dict[str, Any]) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **dd),
            nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **dd),
        )
        self.norm = norm_layer(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class ConvDownsampler(nn.Module):
    """(B, H, W, dim) -> (B, H / 2, W / 2, 2 dim)."""

    def __init__(self, dim: int, norm_layer: Any, dd: dict[str, Any]) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, bias=False, **dd)
        self.norm = norm_layer(2 * dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class NATStage(nn.Module):
    def __init__(self, layers: list[NATLayer], downsample: nn.Module) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.blocks = nn.Sequential(*layers)
        self.downsample = downsample

    def transform(self, x: Tensor) -> Tensor:
        """All layers, before the downsampling: (B, H, W, dim)."""
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return cast(Tensor, checkpoint_seq(self.blocks, x))
        return self.blocks(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(self.transform(x))


class NAT(nn.Module):
    """Four stages of layers with neighborhood attention, at a quarter of the image and downwards.

    dilations: of every layer of every stage; None: 1 everywhere, which is NAT, others are DiNAT.
    layer_scale: what the residual branches are scaled by at first; None: not at all.
    impl: of `neighborhood_attention`.
    """

    def __init__(
        self, depths: tuple[int, ...], num_heads: tuple[int, ...], embed_dim: int = 64,
        mlp_ratio: float = 3.0, kernel_size: int = 7,
        dilations: tuple[tuple[int, ...], ...] | None = None, layer_scale: float | None = None,
        num_classes: int = 1000, in_chans: int = 3, global_pool: str = "avg", qkv_bias: bool = True,
        drop_rate: float = 0.0, proj_drop_rate: float = 0.0, drop_path_rate: float = 0.2,
        norm_layer: Any = nn.LayerNorm, act_layer: Any = nn.GELU, impl: str = "auto",
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.output_fmt = "NHWC"
        dims = [embed_dim << i for i in range(len(depths))]
        self.num_features = self.head_hidden_size = dims[-1]
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 << i, "module": f"levels.{i}"}
            for i, dim in enumerate(dims)
        ]
        self.patch_embed = ConvTokenizer(in_chans, embed_dim, norm_layer, dd)
        self.pos_drop = nn.Dropout(proj_drop_rate)
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, (dim, depth, heads) in enumerate(zip(dims, depths, num_heads, strict=True)):
            steps = (1,) * depth if dilations is None else dilations[i]
            layers = [
                NATLayer(dim, heads, kernel_size, dilation, mlp_ratio, qkv_bias, proj_drop_rate, rate,
                         layer_scale, impl, norm_layer, act_layer, dd)
                for dilation, rate in zip(steps, cast(Any, rates[i]), strict=True)
            ]  # fmt: skip
            last = i == len(depths) - 1
            stages.append(
                NATStage(layers, nn.Identity() if last else ConvDownsampler(dim, norm_layer, dd))
            )
        self.levels: Any = nn.Sequential(*stages)
        self.norm: Any = norm_layer(self.num_features, **dd)
        self.global_pool = _pooling(global_pool)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = self._classifier(dd)
        self.apply(_init_weights)

    def _classifier(self, dd: dict[str, Any]) -> nn.Module:
        if not self.num_classes:
            return nn.Identity()
        return nn.Linear(self.num_features * self.global_pool.feat_mult(), self.num_classes, **dd)

    @torch.jit.ignore()
    def no_weight_decay(self) -> set[str]:
        return {"*.rpb"}

    @torch.jit.ignore()
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        layers = r"^levels\.(\d+)" if coarse else [
            (r"^levels\.(\d+)\.downsample", (0,)),
            (r"^levels\.(\d+)\.blocks\.(\d+)", None),
            (r"^norm", (99999,)),
        ]  # fmt: skip
        return {"stem": r"^patch_embed", "blocks": layers}

    @torch.jit.ignore()
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self.levels:
            cast(NATStage, stage).grad_checkpointing = enable

    @torch.jit.ignore()
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = _pooling(global_pool).train(self.training)
        like = next(self.parameters())
        head = self._classifier({"device": like.device, "dtype": like.dtype})
        self.head = head.train(self.training)

    def forward_intermediates(
        self, x: Tensor, indices: int | list[int] | None = None, norm: bool = False,
        stop_early: bool = False, output_fmt: str = "NCHW", intermediates_only: bool = False,
    ) -> Any:  # fmt: skip
        """timm's: the last output and those of the stages in `indices`, each before it is downsampled."""
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NHWC', got {output_fmt!r}.")
        take, last = feature_take_indices(len(self.levels), indices)
        x = self.pos_drop(self.patch_embed(x))
        found, end = [], len(self.levels) - 1
        stop = last if stop_early else end
        for i, each in enumerate(self.levels[: stop + 1]):
            stage = cast(NATStage, each)
            x = stage.transform(x)
            if i in take:
                out = self.norm(x) if norm and i == end else x
                found.append(out.permute(0, 3, 1, 2) if output_fmt == "NCHW" else out)
            if i < stop:
                x = stage.downsample(x)
        return found if intermediates_only else (self.norm(x) if stop == end else x, found)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """timm's: drop the stages that no intermediate needs, and what only makes sense after all of them."""
        take, last = feature_take_indices(len(self.levels), indices)
        cut = last < len(self.levels) - 1
        self.levels = self.levels[: last + 1]
        if cut:
            self.levels[last].downsample = nn.Identity()
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_norm or cut:
            self.norm = nn.Identity()
        if prune_head or cut:
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, H / 32, W / 32, num_features)."""
        return self.norm(self.levels(self.pos_drop(self.patch_embed(x))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _pooling(kind: str) -> SelectAdaptivePool2d:
    return SelectAdaptivePool2d(pool_type=kind, flatten=bool(kind), input_fmt="NHWC")


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# -- checkpoints and the registry -------------------------------------------------------------------------

# In transformers' names, what stands before the last part of ours.
_FROM_TRANSFORMERS = (
    (r"^(?:nat|dinat)\.", ""),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^encoder\.levels\.(\d+)\.layers\.", r"levels.\1.blocks."),
    (r"^encoder\.", ""),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.self\.", ".attn."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """The published state dict, and transformers' with its names and its separate queries, keys and values."""
    for key in ("state_dict", "model"):
        state_dict = state_dict.get(key, state_dict)
    if not any(".layernorm_before." in name for name in state_dict):
        return state_dict
    found = {}
    for name, value in state_dict.items():
        for pattern, replacement in _FROM_TRANSFORMERS:
            name = re.sub(pattern, replacement, name)
        if name.endswith(".layer_scale_parameters"):
            stem = name.removesuffix("layer_scale_parameters")
            found[f"{stem}gamma1"], found[f"{stem}gamma2"] = value
        else:
            found[name] = value
    for name in [n for n in found if ".attn.query." in n]:
        parts = [
            found.pop(name.replace(".query.", f".{part}.")) for part in ("query", "key", "value")
        ]
        found[name.replace(".query.", ".qkv.")] = torch.cat(parts)
    return found


def _cfg(url: str, size: int = 224) -> dict[str, Any]:
    return {
        "url": url, "num_classes": 1000, "input_size": (3, size, size),
        "pool_size": (size // 32, size // 32), "crop_pct": 0.875 if size == 224 else 1.0,
        "interpolation": "bicubic", "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj.0", "classifier": "head", "license": "mit",
        "origin_url": "https://github.com/SHI-Labs/Neighborhood-Attention-Transformer",
    }  # fmt: skip


_NAT = "https://shi-labs.com/projects/nat/checkpoints/CLS"
_DINAT = "https://shilab.cs.uoregon.edu/projects/dinat/checkpoints/imagenet1k"
_PUBLISHED = ("mini", "tiny", "small", "base")

default_cfgs = generate_default_cfgs({
    **{f"nat_{size}.in1k": _cfg(f"{_NAT}/nat_{size}.pth") for size in _PUBLISHED},
    **{f"dinat_{size}.in1k": _cfg(f"{_DINAT}/dinat_{size}_in1k_224.pth") for size in _PUBLISHED},
    "dinat_large.in22k_ft_in1k": _cfg(f"{_DINAT}/dinat_large_in22k_in1k_224.pth"),
    "dinat_large_384.in22k_ft_in1k": _cfg(f"{_DINAT}/dinat_large_in22k_in1k_384.pth", 384),
    "dinat_large_384_11x11.in22k_ft_in1k": _cfg(
        f"{_DINAT}/dinat_large_in22k_in1k_384_11x11.pth", 384
    ),
})  # fmt: skip

_MINI = {"depths": (3, 4, 6, 5), "num_heads": (2, 4, 8, 16), "embed_dim": 64}
_TINY = {**_MINI, "depths": (3, 4, 18, 5)}
_SMALL = {"depths": (3, 4, 18, 5), "num_heads": (3, 6, 12, 24), "embed_dim": 96, "mlp_ratio": 2.0,
          "layer_scale": 1e-5, "drop_path_rate": 0.3}  # fmt: skip
_BASE = {**_SMALL, "num_heads": (4, 8, 16, 32), "embed_dim": 128, "drop_path_rate": 0.5}
_LARGE = {**_BASE, "embed_dim": 192, "drop_path_rate": 0.35}


def _create(variant: str, pretrained: bool, sizes: dict[str, Any], **kwargs: Any) -> NAT:
    out_indices = kwargs.pop("out_indices", (0, 1, 2, 3))
    return build_model_with_cfg(
        NAT, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"}, **{**sizes, **kwargs},
    )  # fmt: skip


def _dilated(sizes: dict[str, Any], rates: tuple[int, int, int] = (8, 4, 2)) -> dict[str, Any]:
    """Every other layer of the first three stages, as far as their grids allow, and no layer scale."""
    depths = sizes["depths"]
    dilations = tuple(
        tuple(rate if i % 2 else 1 for i in range(depth))
        for depth, rate in zip(depths, (*rates, 1), strict=True)
    )
    return {**sizes, "dilations": dilations, "layer_scale": None}


@register_model
def nat_mini(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT-Mini: 20 M parameters, 81.8% top-1 on ImageNet-1k (published)."""
    return _create("nat_mini", pretrained, _MINI, **kwargs)


@register_model
def nat_tiny(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT-Tiny: 28 M parameters, 83.2% top-1 on ImageNet-1k (published)."""
    return _create("nat_tiny", pretrained, _TINY, **kwargs)


@register_model
def nat_small(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT-Small: 51 M parameters, 83.7% top-1 on ImageNet-1k (published)."""
    return _create("nat_small", pretrained, _SMALL, **kwargs)


@register_model
def nat_base(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT-Base: 90 M parameters, 84.3% top-1 on ImageNet-1k (published)."""
    return _create("nat_base", pretrained, _BASE, **kwargs)


@register_model
def dinat_mini(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Mini: 20 M parameters, 81.8% top-1 on ImageNet-1k (published)."""
    return _create("dinat_mini", pretrained, _dilated(_MINI), **kwargs)


@register_model
def dinat_tiny(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Tiny: 28 M parameters, 82.7% top-1 on ImageNet-1k (published)."""
    return _create("dinat_tiny", pretrained, _dilated(_TINY), **kwargs)


@register_model
def dinat_small(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Small: 51 M parameters, 83.8% top-1 on ImageNet-1k (published)."""
    return _create("dinat_small", pretrained, _dilated(_SMALL), **kwargs)


@register_model
def dinat_base(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Base: 90 M parameters, 84.4% top-1 on ImageNet-1k (published)."""
    return _create("dinat_base", pretrained, _dilated(_BASE), **kwargs)


@register_model
def dinat_large(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Large: 200 M parameters, 86.5% top-1 on ImageNet-1k, pretrained on 22k (published)."""
    return _create("dinat_large", pretrained, _dilated(_LARGE), **kwargs)


@register_model
def dinat_large_384(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Large at 384x384, with dilations of its own: 87.2% top-1 (published)."""
    return _create("dinat_large_384", pretrained, _dilated(_LARGE, (13, 6, 3)), **kwargs)


@register_model
def dinat_large_384_11x11(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Large at 384x384 with windows of 11x11: 87.3% top-1 (published)."""
    sizes = {**_dilated(_LARGE), "kernel_size": 11}
    return _create("dinat_large_384_11x11", pretrained, sizes, **kwargs)

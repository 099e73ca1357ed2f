"""MedViTV2 (Manzari et al., arXiv 2502.13693) for timm: convolutions, neighborhood attention and KANs.

`timm.create_model("medvit_tiny", legacy_layout=True)` computes what the published weights were trained with;
`medvit_published` has their names.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, calculate_drop_path_rates
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models.nextvit import ConvNormAct, NextViT
from torch import Tensor, nn

from .medvit_blocks import GlobalBlock, LocalBlock
from .medvit_published import checkpoint_filter_fn
from .recompute import ConvSequence

__all__ = ["MedViT"]

STRIDES, SR_RATIOS = (1, 2, 2, 2), (8, 4, 2, 1)


class MedViT(NextViT):
    """MedViTV2; what it does as a timm model, features for one, it has from Next-ViT.

    depths: of the four stages; the third is a multiple of 3: two local blocks, then a global one.
    dims: channels of the stages.
    dilated: every second local block of a stage is dilated, as in DiNAT. The paper speaks of dilation; its
        code and weights have none.
    legacy_layout: as the published code, and so the published weights: around neighborhood attention and
        around KANs it reads NCHW memory as if it were NHWC, so that what counts as a pixel there is a mix
        of pixels and channels. Its images must be square.
    kan_impl: of the KANs' kernel, see `kernels.kan.rswaf_linear`.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        stem_chs: tuple[int, int, int] = (64, 32, 64),
        depths: tuple[int, int, int, int] = (2, 2, 6, 2),
        dims: tuple[int, int, int, int] = (64, 128, 256, 512),
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        dilated: bool = False,
        legacy_layout: bool = False,
        kan_impl: str = "auto",
        device=None,
        dtype=None,
    ) -> None:
        super(NextViT, self).__init__()  # the parts of Next-ViT are others
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_classes, self.in_chans = num_classes, in_chans
        self.grad_checkpointing = False
        wide, narrow, out = stem_chs
        conv = partial(ConvNormAct, act_layer=partial(nn.ReLU, inplace=True), **dd)
        self.stem = ConvSequence(
            conv(in_chans, wide, stride=2), conv(wide, narrow), conv(narrow, out), conv(out, out, stride=2)
        )  # fmt: skip
        local = partial(LocalBlock, legacy_layout=legacy_layout, **dd)
        whole = partial(
            GlobalBlock, attn_drop=attn_drop_rate, proj_drop=proj_drop_rate, kan_impl=kan_impl,
            legacy_layout=legacy_layout, **dd,
        )  # fmt: skip
        drop_paths: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for s, is_local in enumerate(block_types(depths)):
            blocks: list[nn.Module] = []
            for b, here in enumerate(is_local):
                ends = (out, dims[s])
                place = {"stride": STRIDES[s] if b == 0 else 1, "drop_path": drop_paths[s][b]}
                if here:
                    odd = sum(is_local[:b]) % 2 == 1
                    kernel_size = 7 if s == 0 else 3
                    blocks.append(
                        local(*ends, kernel_size=kernel_size, dilated=dilated and odd, **place)
                    )
                else:
                    blocks.append(whole(*ends, sr_ratio=SR_RATIOS[s], **place))
                out = dims[s]
            stages.append(MedViTStage(blocks))
        self.stages = nn.Sequential(*stages)
        self.feature_info = [
            {"num_chs": dims[s], "reduction": 2 ** (s + 2), "module": f"stages.{s}"} for s in range(4)
        ]  # fmt: skip
        self.num_features = dims[-1]
        self.norm = nn.BatchNorm2d(dims[-1], **dd)
        self.head = ClassifierHead(
            dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd
        )
        self.head_hidden_size = dims[-1] * self.head.global_pool.feat_mult()
        self._initialize_weights()

    @torch.jit.ignore()
    def set_recompute(self, enable: bool = True) -> None:
        """Whether the backward computes again what stands between convolutions, see `ConvSequence`."""
        for module in self.modules():
            if isinstance(module, ConvSequence):
                module.recompute = enable


class MedViTStage(nn.Module):
    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.blocks = nn.Sequential(*blocks)

    @torch.jit.ignore()
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def forward(self, x: Tensor) -> Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return cast(Tensor, checkpoint_seq(self.blocks, x))
        return self.blocks(x)


def block_types(depths: tuple[int, int, int, int]) -> list[list[bool]]:
    """Of every block of every stage: whether it is local."""
    first, second, third, fourth = depths
    if third % 3:
        raise ValueError(f"The third of depths must be a multiple of 3, got {depths=}.")
    return [
        [True] * first, [True] * (second - 1) + [False], [True, True, False] * (third // 3), [False] * fourth
    ]  # fmt: skip


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000, "input_size": (3, 224, 224), "pool_size": (7, 7), "crop_pct": 0.875,
        "interpolation": "bicubic", "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.0.conv", "classifier": "head.fc", "license": "mit",
        "paper_ids": "arXiv:2502.13693", "paper_name": "MedViTV2",
        "origin_url": "https://github.com/Omid-Nejati/MedViTV2", **kwargs,
    }  # fmt: skip


default_cfgs = generate_default_cfgs({
    "medvit_tiny": _cfg(), "medvit_small": _cfg(), "medvit_base": _cfg(), "medvit_large": _cfg(),
})  # fmt: skip


def _create(variant: str, pretrained: bool, model_args: dict, kwargs: dict) -> MedViT:
    out_indices = kwargs.pop("out_indices", (0, 1, 2, 3))
    return build_model_with_cfg(
        MedViT, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"flatten_sequential": True, "out_indices": out_indices},
        **{**model_args, **kwargs},
    )  # fmt: skip


@register_model
def medvit_tiny(pretrained: bool = False, **kwargs: Any) -> MedViT:
    """MedViTV2-Tiny: 10.7 M parameters."""
    sizes = {"depths": (2, 2, 6, 1), "dims": (64, 128, 192, 384)}
    return _create("medvit_tiny", pretrained, sizes, kwargs)


@register_model
def medvit_small(pretrained: bool = False, **kwargs: Any) -> MedViT:
    """MedViTV2-Small: 27.3 M parameters."""
    return _create("medvit_small", pretrained, {"dims": (64, 128, 256, 512)}, kwargs)


@register_model
def medvit_base(pretrained: bool = False, **kwargs: Any) -> MedViT:
    """MedViTV2-Base: 60.9 M parameters."""
    sizes = {"dims": (96, 192, 384, 768), "drop_path_rate": 0.2}
    return _create("medvit_base", pretrained, sizes, kwargs)


@register_model
def medvit_large(pretrained: bool = False, **kwargs: Any) -> MedViT:
    """MedViTV2-Large: 107.4 M parameters."""
    sizes = {"dims": (96, 256, 512, 1024), "drop_path_rate": 0.2}
    return _create("medvit_large", pretrained, sizes, kwargs)

"""timm models with visionfuse's kernels; importing this module puts them into timm's registry."""

from .kan import FasterKAN, SwitchKANLayer
from .kat import KAT, kat_base_patch16_224, kat_small_patch16_224, kat_tiny_patch16_224
from .medvit import MedViT, medvit_base, medvit_large, medvit_small, medvit_tiny
from .nat import NAT
from .rational import GRKANMlp, RationalActivation

__all__ = [
    "KAT",
    "NAT",
    "FasterKAN",
    "GRKANMlp",
    "MedViT",
    "RationalActivation",
    "SwitchKANLayer",
    "kat_base_patch16_224",
    "kat_small_patch16_224",
    "kat_tiny_patch16_224",
    "medvit_base",
    "medvit_large",
    "medvit_small",
    "medvit_tiny",
]

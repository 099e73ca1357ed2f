"""timm models with visionfuse's kernels; importing this module puts them into timm's registry."""

from .kat import KAT, kat_base_patch16_224, kat_small_patch16_224, kat_tiny_patch16_224
from .rational import GRKANMlp, RationalActivation

__all__ = [
    "KAT",
    "GRKANMlp",
    "RationalActivation",
    "kat_base_patch16_224",
    "kat_small_patch16_224",
    "kat_tiny_patch16_224",
]

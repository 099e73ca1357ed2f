"""Neighborhood attention: the function, NATTEN's modules, and a processor for the video decoder of LTX-2 (`ltx2`)."""

from .api import neighborhood_attention
from .layers import NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D

__all__ = [
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "neighborhood_attention",
]

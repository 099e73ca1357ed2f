"""Plans: which blocks of keys a block of queries visits."""

from .block_plan import BitMask, BlockPlan, Entries, IntervalMask
from .build import plan_blocks
from .compress import compress
from .layout import Segment, TokenLayout
from .local import Local
from .neighborhood import Dense, Neighborhood, NeighborhoodOnGrid, neighborhood_mask
from .planner import AttentionPlan, BlockShape, plan_attention
from .tile_window import TileWindow

__all__ = [
    "AttentionPlan",
    "BitMask",
    "BlockPlan",
    "BlockShape",
    "Dense",
    "Entries",
    "IntervalMask",
    "Local",
    "Neighborhood",
    "NeighborhoodOnGrid",
    "Segment",
    "TileWindow",
    "TokenLayout",
    "compress",
    "neighborhood_mask",
    "plan_attention",
    "plan_blocks",
]

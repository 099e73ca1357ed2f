"""Large images from FLUX: two stages, local attention, and the small image as guidance (Scale-DiT).

>>> from visionfuse.scale_dit import rounded
>>> rounded(3000, 2000, 64)
(3008, 1984)
"""

from .guidance import Guidance, guided
from .two_stage import Result, TwoStage, rounded, two_stages, unit_of

__all__ = ["Guidance", "Result", "TwoStage", "guided", "rounded", "two_stages", "unit_of"]

"""What a feature's dimensions are: batch, channels, and the positions that a mask counts."""

from ._axes import Side, check_axes
from ._masks import Masks

__all__ = ["Masks", "Side", "check_axes"]

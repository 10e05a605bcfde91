"""What a feature's dimensions are: batch, channels, and the positions that a mask counts."""

from ._axes import Side, check_axes
from ._channels import OF_SIGNALS
from ._masks import Masks

__all__ = ["OF_SIGNALS", "Masks", "Side", "check_axes"]

"""Features of named layers, read by forward hooks while a model runs."""

from ._hooks import Complete
from ._layers import unwrap
from .tap import FeatureTap

__all__ = ["Complete", "FeatureTap", "unwrap"]

"""Features of named layers, read by forward hooks while a model runs."""

from ._batches import Batch, batch_of
from ._hooks import UncopiedHook
from ._layers import unwrap
from .tap import FeatureTap

__all__ = ["Batch", "FeatureTap", "UncopiedHook", "batch_of", "unwrap"]

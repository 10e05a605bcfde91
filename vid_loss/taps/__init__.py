"""Features of named layers, read by forward hooks while a model runs."""

from ._causes import changed_in_place
from ._hooks import Given, UncopiedHook
from ._layers import items_of, unwrap
from ._recorder import Batch
from .tap import FeatureTap

__all__ = ["Batch", "FeatureTap", "Given", "UncopiedHook", "changed_in_place", "items_of", "unwrap"]

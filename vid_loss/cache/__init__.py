"""The teacher's features on disk, for inputs that do not change between epochs."""

from ._feature_cache import FeatureCache, checked_cache
from ._fixed_augmentations import SAMPLE_INDEX, FixedAugmentations

__all__ = ["SAMPLE_INDEX", "FeatureCache", "FixedAugmentations", "checked_cache"]

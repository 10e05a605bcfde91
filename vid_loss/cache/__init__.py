"""The teacher's features on disk, for inputs that do not change between epochs."""

from ._feature_cache import FeatureCache, checked_cache

__all__ = ["FeatureCache", "checked_cache"]

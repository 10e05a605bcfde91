"""The losses and lambdas of the pairs: equation (2) of the paper without its models."""

from ._features import Features
from ._pair_terms import PairTerms

__all__ = ["Features", "PairTerms"]

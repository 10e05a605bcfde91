"""Which layers a model has, and which of two models fit together."""

from ._grids import TokensToGrid
from ._match import match_layers
from ._matched import MatchedPairs
from ._table import Layer, LayerTable, list_layers

__all__ = ["Layer", "LayerTable", "MatchedPairs", "TokensToGrid", "list_layers", "match_layers"]

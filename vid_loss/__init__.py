"""Variational Information Distillation as a loss for existing PyTorch trainers."""

from .diagnostics import gradient_shares
from .distiller import Distiller
from .losses import ATLoss, FitNetLoss, KDLoss, LwFLoss, VIDLoss
from .matching import list_layers, match_layers
from .model import DistillationModel
from .pairs import Pair
from .taps import FeatureTap

__version__ = "0.2.0.dev0"

__all__ = [
    "ATLoss",
    "DistillationModel",
    "Distiller",
    "FeatureTap",
    "FitNetLoss",
    "KDLoss",
    "LwFLoss",
    "Pair",
    "VIDLoss",
    "gradient_shares",
    "list_layers",
    "match_layers",
]

"""Variational Information Distillation as a loss for existing PyTorch trainers."""

from .baselines import ATLoss, FitNetLoss, KDLoss, LwFLoss
from .diagnostics import PairDiagnostics, gradient_shares
from .distiller import Distiller
from .losses import VIDLoss
from .matching import match_layers
from .model import DistillationModel
from .pairs import Pair
from .tap import FeatureTap
from .trace import layers

__version__ = "0.1.0"

__all__ = [
    "ATLoss",
    "DistillationModel",
    "Distiller",
    "FeatureTap",
    "FitNetLoss",
    "KDLoss",
    "LwFLoss",
    "Pair",
    "PairDiagnostics",
    "VIDLoss",
    "gradient_shares",
    "layers",
    "match_layers",
]

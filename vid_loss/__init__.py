"""Variational Information Distillation as a loss for existing PyTorch trainers."""

from .baselines import ATLoss, FitNetLoss, KDLoss, LwFLoss
from .distiller import Distiller
from .losses import VIDLoss
from .model import DistillationModel
from .pairs import Pair
from .tap import FeatureTap

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
    "VIDLoss",
]

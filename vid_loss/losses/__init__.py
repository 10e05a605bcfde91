"""The losses of one pair of layers: VID, and what the paper compares it with."""

from .gaussian import gaussian_nll
from .hints import ATLoss, FitNetLoss
from .logits import KDLoss, LwFLoss
from .vid import VIDLoss

__all__ = ["ATLoss", "FitNetLoss", "KDLoss", "LwFLoss", "VIDLoss", "gaussian_nll"]

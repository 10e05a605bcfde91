"""The losses of one pair of layers: VID, and what the paper compares it with."""

from .baselines import ATLoss, FitNetLoss, KDLoss, LwFLoss
from .gaussian import gaussian_nll
from .vid import VIDLoss

__all__ = ["ATLoss", "FitNetLoss", "KDLoss", "LwFLoss", "VIDLoss", "gaussian_nll"]

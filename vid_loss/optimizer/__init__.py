"""The heads in the student's optimizer: at which rate, and whether they are trained rightly."""

from ._first_step import FirstStep
from ._loaded import Loaded
from ._rates import HEAD_LEARNING_RATE, SGD_HEAD_STEP, TrainedHeads, head_learning_rate

__all__ = [
    "HEAD_LEARNING_RATE",
    "SGD_HEAD_STEP",
    "FirstStep",
    "Loaded",
    "TrainedHeads",
    "head_learning_rate",
]

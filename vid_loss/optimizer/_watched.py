"""What is seen of a distiller by those that look at how its heads are trained."""

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor, nn


class Watched(Protocol):
    """A :class:`~vid_loss.Distiller`, which stands above this folder.

    Attributes:
        losses: the loss module of each pair.
        weights: lambda of each pair by name.
        terms: the last value of each pair's loss; empty before the first.
        own_rate: the learning rate that the heads were given; None if they were given none.
    """

    losses: nn.ModuleDict
    weights: dict[str, float]
    terms: dict[str, Tensor]
    own_rate: float | None

    @property
    def student(self) -> nn.Module:
        """The student, without any wrapper."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yields those of the heads."""

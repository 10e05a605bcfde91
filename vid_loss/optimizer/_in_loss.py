"""Whether a distiller's value is in the loss that backward() is called on."""

import warnings
from collections.abc import Mapping

from torch import Tensor
from torch.optim import Optimizer

from ._watched import Watched

_STEPS = 20  # it may begin some steps later, or have steps of its own between those of the student
_LEFT_OUT = (
    "Distiller: expected its value in the loss that backward() is called on; got no gradient of "
    f"its heads in {_STEPS} steps of the student, so that nothing is transferred. Add it as it is, "
    "without item(), detach() or torch.no_grad(): loss = criterion(student(images), labels) + "
    "distiller(images), unless it is added later."
)


class InLoss:
    """Counts steps on gradients of the student alone, each with another call of the distiller."""

    def __init__(self) -> None:
        self._steps = 0
        self._terms: Mapping[str, Tensor] | None = None

    def look(self, optimizer: Optimizer, distiller: Watched) -> None:
        """Warns once, of the last of some steps.

        Args:
            optimizer: what is about to step, where no head has a gradient.
            distiller: what was called.
        """
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        own = (p for p in distiller.student.parameters() if p.grad is not None)
        again = distiller.terms is self._terms  # a new dict in each call
        if again or not (_has_heads(distiller) and any(id(p) in held for p in own)):
            return
        self._terms = distiller.terms
        self._steps += 1
        if self._steps == _STEPS:
            warnings.warn(_LEFT_OUT, stacklevel=5)


def _has_heads(distiller: Watched) -> bool:
    """Whether a pair that weighs has something to be trained: a gradient would be seen there."""
    pairs = zip(distiller.weights.values(), distiller.losses.values(), strict=True)
    losses = [loss for weight, loss in pairs if weight]
    return any(p.requires_grad and p.numel() for loss in losses for p in loss.parameters())

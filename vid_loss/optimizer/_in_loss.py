"""Whether a distiller's value is in the loss that backward() is called on."""

import warnings
from collections.abc import Mapping

from torch import Tensor
from torch.optim import Optimizer

from ._watched import Watched

_STEPS = 3  # a part of the student may have an optimizer that steps before the transfer's backward
_LEFT_OUT = (
    "Distiller: expected its value in the loss that backward() is called on; got no gradient of "
    f"its heads in {_STEPS} steps of the student, so that nothing is transferred. Add it as it is, "
    "without item(), detach() or torch.no_grad(): loss = criterion(student(images), labels) + "
    "distiller(images)"
)


class InLoss:
    """Counts steps on gradients of the student alone, each with another call of the distiller."""

    def __init__(self) -> None:
        self._counted: list[Mapping[str, Tensor]] = []

    def is_left_out(self, optimizer: Optimizer, distiller: Watched) -> bool:
        """Returns whether that was once too often; warns then.

        Args:
            optimizer: what is about to step, where no head has a gradient.
            distiller: what was called.
        """
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        own = (p for p in distiller.student.parameters() if p.grad is not None)
        if not (_has_heads(distiller) and any(id(p) in held for p in own)):
            return False
        if not any(distiller.terms is terms for terms in self._counted):  # a new dict in each call
            self._counted.append(distiller.terms)
        if len(self._counted) < _STEPS:
            return False
        warnings.warn(_LEFT_OUT, stacklevel=5)
        return True


def _has_heads(distiller: Watched) -> bool:
    """Whether a pair that weighs has something to be trained: a gradient would be seen there."""
    pairs = zip(distiller.weights.values(), distiller.losses.values(), strict=True)
    return any(p.requires_grad for weight, loss in pairs if weight for p in loss.parameters())

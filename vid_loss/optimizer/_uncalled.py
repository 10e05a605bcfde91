"""Whether a distiller is called at all, once an optimizer has its heads."""

import warnings

from torch.optim import Optimizer

from ._watched import Watched

STEPS = 300  # a transfer may begin some epochs after the training
_NEVER_CALLED = (
    "Distiller: expected to be called in each step; got {} steps of an optimizer that has its "
    "heads, and no call. Write loss = criterion(student(images), labels) + distiller(images), "
    "unless it begins later."
)


class Uncalled:
    """Counts steps of the student by an optimizer that has the heads, until the first call."""

    def __init__(self) -> None:
        self._steps = 0

    def count(self, optimizer: Optimizer, distiller: Watched) -> None:
        """Warns once, of many steps.

        Args:
            optimizer: what is about to step.
            distiller: what has not been called yet.
        """
        if self._steps == STEPS:
            return
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        own = (p for p in distiller.student.parameters() if p.grad is not None)
        if all(any(id(p) in held for p in x) for x in (own, distiller.losses.parameters())):
            self._steps += 1
            if self._steps == STEPS:
                warnings.warn(_NEVER_CALLED.format(STEPS), stacklevel=5)

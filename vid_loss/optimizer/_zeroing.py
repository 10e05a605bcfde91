"""Whether the heads' gradients are zeroed together with the student's."""

import warnings
import weakref

from torch import Tensor, nn
from torch.optim import Optimizer

from ._watched import Watched

_PILE_UP = (
    "Distiller: expected the gradients of its heads to be zeroed with the student's; got ones that "
    "pile up from step to step. Call optimizer.zero_grad(), or distiller.zero_grad() beside "
    "student.zero_grad()."
)


class Zeroing:
    """Looks at gradients in two calls of a distiller, each after a step.

    Where one optimizer steps on both, that is: one of the heads' own may zero them more rarely.
    Zeroed, a gradient is another object afterwards, or none for a while; accumulated, it is the
    same. Neither reads a value.
    """

    def __init__(self, distiller: weakref.ref[Watched]) -> None:
        self._distiller = distiller
        self._together = False
        self._seen: tuple[weakref.ref[Tensor], weakref.ref[Tensor]] | None = None

    def note(self, optimizer: Optimizer) -> None:
        """Notes whether an optimizer that steps on heads steps on the student, too."""
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if (distiller := self._distiller()) is not None:
            own = (p for p in distiller.student.parameters() if p.grad is not None)
            self._together = self._together or any(id(p) in held for p in own)

    def look(self) -> bool:
        """Returns whether there is nothing more to look at; warns if the heads' alone are kept."""
        distiller = self._distiller()
        if distiller is None or not self._together:
            return True
        of_heads, of_student = map(_gradient, (distiller.losses, distiller.student))
        if of_heads is None:
            return True
        if self._seen is not None:
            before = [seen() for seen in self._seen]
            if before[0] is of_heads and before[1] is not of_student:
                warnings.warn(_PILE_UP, stacklevel=5)
            return True
        if of_student is None:
            warnings.warn(_PILE_UP, stacklevel=5)
            return True
        self._seen = weakref.ref(of_heads), weakref.ref(of_student)
        return False


def _gradient(module: nn.Module) -> Tensor | None:
    return next((p.grad for p in module.parameters() if p.grad is not None), None)

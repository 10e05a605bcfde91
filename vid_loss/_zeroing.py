"""Whether the heads' gradients are zeroed together with the student's."""

import warnings
import weakref
from collections.abc import Iterable

from torch import Tensor, nn

_PILE_UP = (
    "Distiller: expected the gradients of its heads to be zeroed with the student's; got ones that "
    "pile up from step to step. Call optimizer.zero_grad(), or distiller.zero_grad() beside "
    "student.zero_grad()."
)


class Zeroing:
    """Looks at gradients in two calls of a distiller, each after a step.

    Zeroed, a gradient is another object afterwards, or none for a while; accumulated, it is the
    same. Neither reads a value.
    """

    def __init__(self) -> None:
        self._seen: tuple[weakref.ref[Tensor], weakref.ref[Tensor]] | None = None

    def look(self, student: nn.Module, heads: nn.Module) -> bool:
        """Returns whether there is nothing more to look at; warns if the heads' alone are kept."""
        of_heads, of_student = _gradient(heads.parameters()), _gradient(student.parameters())
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


def _gradient(parameters: Iterable[nn.Parameter]) -> Tensor | None:
    return next((p.grad for p in parameters if p.grad is not None), None)

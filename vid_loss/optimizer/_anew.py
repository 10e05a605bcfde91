"""Whether the heads of a transfer begin anew in an optimizer that has had others of it."""

import warnings
import weakref

from torch import nn
from torch.optim import Optimizer

from ._watched import Watched

_BUILT_AGAIN = (
    "Distiller: expected to be built once, before the training loop; got another one for the same "
    "student, teacher, pairs and optimizer, whose heads begin at random while those of the first "
    "stay in the optimizer. Build it before the loop; if it has to be built again, go on with the "
    "heads there were: distiller.load_state_dict(earlier.state_dict())."
)
_Known = list[tuple[weakref.ref[nn.Module], weakref.ref[nn.Module] | None, set[str]]]
_TRANSFERS: "weakref.WeakKeyDictionary[Optimizer, _Known]" = weakref.WeakKeyDictionary()


def warn_if_again(optimizer: Optimizer, distiller: Watched, teacher: nn.Module | None) -> None:
    """Warns at the first step on new heads of a pair that an optimizer has had heads of before."""
    known = _TRANSFERS.setdefault(optimizer, [])
    student, names = distiller.student, set(distiller.weights)
    for of_student, of_teacher, others in known:
        taught = None if of_teacher is None else of_teacher()
        if of_student() is student and taught is teacher and names & others:
            warnings.warn(_BUILT_AGAIN, stacklevel=6)
            break
    by = None if teacher is None else weakref.ref(teacher)
    known.append((weakref.ref(student), by, names))

"""Whether a distiller was made a part of its student."""

import warnings

from ._watched import Watched

_INSIDE = (
    "Distiller: expected to stand beside the student; got it as the student's {name!r}, so that "
    "student.state_dict() and each average of the student have its heads. Keep it in a variable, "
    "or in an object that is no part of the student, and add them by distiller.add_to(optimizer)."
)


def warn_if_inside(distiller: Watched) -> None:
    """Warns if it is found among the student's modules.

    Its losses alone may be there: ``VIDTrainer`` puts them where engines find them, and keeps them
    out of the student's state.
    """
    for name, module in distiller.student.named_modules():
        if module is distiller:
            warnings.warn(_INSIDE.format(name=name), stacklevel=6)
            return

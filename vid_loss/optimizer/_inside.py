"""Whether a distiller was made a part of its student."""

import warnings

from ._watched import Watched

_INSIDE = (
    "Distiller: expected to stand beside the student; got it as the student's {name!r}, so that "
    "student.state_dict() and each average of the student have its heads. Keep it in a variable, "
    "or in an object that is no part of the student, and add them by distiller.add_to(optimizer)."
)


def warn_if_inside(distiller: Watched) -> None:
    """Warns if the heads are found among the student's modules."""
    for name, module in distiller.student.named_modules():
        if module is distiller:  # VIDTrainer puts the losses there, and takes them out again
            warnings.warn(_INSIDE.format(name=name), stacklevel=6)
            return

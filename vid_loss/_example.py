"""What is found out from the example that a Distiller is built with."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from ._axes import Side, check_axes
from ._masks import Masks
from .pairs import Pair
from .taps import FeatureTap, Given
from .teacher import Teacher


class Example(NamedTuple):
    """The features of both models by layer, and the masks of the pairs."""

    student: Mapping[str, Tensor]
    teacher: Mapping[str, Tensor]
    masks: Masks
    mask_of: Mapping[str, Tensor]  # of the example, by pair


def read_example(
    pairs: Mapping[str, Pair], tap: FeatureTap, teacher: Teacher, given: Given
) -> Example:
    """Runs both models on the example, and looks at the axes and the masks of their features.

    Raises:
        ValueError: if a pair's feature has another order of axes than its loss expects.
    """
    args, kwargs = given.args, given.kwargs
    student, taught = tap.read(*args, **kwargs), teacher.features(given)
    masks = Masks(pairs, student, taught)
    of_student = Side("student", tap.model, student, tap.read)

    def read_teacher(*args: Any, **kwargs: Any) -> Mapping[str, Tensor]:
        return teacher.features(Given(args, kwargs))

    of_teacher = Side("teacher", teacher.tap.model, taught, read_teacher)
    for side in (of_student, of_teacher):
        check_axes(pairs, side, args, dict(kwargs))
    masks.compare(student, tap.read, args, kwargs)
    return Example(student, taught, masks, masks.of(None, args, kwargs))

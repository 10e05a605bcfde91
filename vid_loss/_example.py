"""What is found out from the example that a Distiller is built with."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor

from ._offline import Offline
from ._repeats import read_twice_if_random
from .calls import explained, positional
from .dimensions import Masks, Side, check_axes
from .pairs import Pair
from .taps import FeatureTap, Given, changed_in_place
from .teacher import Teacher

_EXAMPLE = (
    "Give what student(...) is called with in training, without the labels: a tensor, a tuple of "
    "positional or a dict of keyword arguments."
)


class Example(NamedTuple):
    """The features of both models by layer, and the masks of the pairs."""

    student: Mapping[str, Tensor]
    teacher: Mapping[str, Tensor]
    masks: Masks
    mask_of: Mapping[str, Tensor]  # of the example, by pair


def read_example(
    pairs: Mapping[str, Pair], tap: FeatureTap, teacher: Teacher | Offline, given: Given
) -> Example:
    """Runs both models on the example, and looks at the axes and the masks of their features.

    Raises:
        RuntimeError: if a model changes the example in place.
        ValueError: if a pair's feature has another order of axes than its loss expects.
    """
    args, kwargs = given.args, given.kwargs
    try:
        student: Mapping[str, Tensor] = tap.read(*args, **kwargs)
    except Exception as error:
        found = explained(error, "Distiller, example", "student", tap.model, args, kwargs, _EXAMPLE)
        if found is None:
            raise
        raise found from error
    if given.numbers_changed() and not isinstance(teacher, Offline):
        raise RuntimeError(changed_in_place("student"))
    check = [Side("student", tap.model, student, tap.read)]
    if isinstance(teacher, Offline):
        taught = teacher.take_example()
        check.append(Side("teacher", None, taught, lambda *_, **__: taught))
    else:
        reads, model = _reader(teacher), teacher.tap.model
        taught = read_twice_if_random(lambda: reads(*args, **kwargs), model)
        check.append(Side("teacher", model, taught, reads))
    masks = Masks(pairs, student, taught, positional(tap.model))
    for side in check:
        check_axes(pairs, side, args, dict(kwargs))
    masks.compare(student, tap.read, args, kwargs)
    return Example(student, taught, masks, masks.of(None, args, kwargs))


def _reader(teacher: Teacher) -> Callable[..., Mapping[str, Tensor]]:
    return lambda *args, **kwargs: teacher.features(Given(args, kwargs))

"""What stands in a teacher's place where its features come from elsewhere."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ._arguments import checked_features
from .pairs import Pair
from .teacher import Inputs, Teacher


class Offline:
    """A teacher that is not run: each call is given its features.

    Args:
        example: its features of the example, by the layers' names in the pairs.

    Attributes:
        specs: the layers; as those of a tap, in whose place it stands as well.
    """

    closed = True
    beside: torch.device | None = None

    def __init__(self, example: Mapping[str, Tensor]) -> None:
        self._example: Mapping[str, Tensor] | None = example
        self.specs = dict.fromkeys(example)
        self.lock = nullcontext()

    @property
    def tap(self) -> "Offline":
        """There are no hooks."""
        return self

    def take_example(self) -> Mapping[str, Tensor]:
        """Returns the example's features, and keeps them no longer."""
        example, self._example = self._example or {}, None
        return example

    def features(self, _: Any) -> dict[str, Tensor]:
        """Raises the RuntimeError that says what a call must be given."""
        layers = ", ".join(f"{name!r}: ..." for name in self.specs)
        raise RuntimeError(
            "Distiller, teacher_features: expected those of the batch, as there is no teacher; got "
            f"none. Call distiller(teacher_features={{{layers}}})."
        )

    def stop_early(self) -> None:
        """There is nothing to stop."""

    def close(self) -> None:
        """There is nothing to close."""

    def clear(self) -> None:
        """There is nothing to forget."""

    def move(self, _: Any) -> None:
        """There is nothing to move: features go where the student is."""

    def follow(self, *_: Any) -> None:
        """There is nothing that follows."""

    def stay_beside(self, _: Any) -> None:
        """There is nothing that stays."""


def source_of(
    teacher: nn.Module | None,
    pairs: Mapping[str, Pair],
    features: Mapping[str, Tensor] | None,
    inputs: Callable[..., Inputs] | None,
    dtype: torch.dtype | None,
) -> Teacher | Offline:
    """Returns what gives the teacher's features: the tapped teacher, or whoever calls.

    Raises:
        TypeError, ValueError: as :class:`Teacher`, or if the features are not of these pairs.
    """
    if teacher is None:
        return Offline(checked_features(features, pairs.values()))
    if features is not None:
        raise ValueError(
            "Distiller, teacher_features: expected none beside a teacher, which runs on the "
            "example; got some. Drop one: Distiller(student, None, ..., teacher_features=...)."
        )
    return Teacher(teacher, [pair.teacher for pair in pairs.values()], inputs, dtype)

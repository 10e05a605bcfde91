"""What all losses of two features have in common: one check of what they are given."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .layouts import KINDS, Kind, channels_of, kind_of, to_common_size


class FeatureLoss(nn.Module):
    """Base of the losses of a student's and a teacher's feature.

    Attributes:
        kinds: the layouts that the loss is for.
        default_weight: lambda of a :class:`~vid_loss.Pair` that has none of its own.
        student_channels: how many the loss was built for; None takes any number.
        teacher_channels: the same of the teacher's feature.
    """

    kinds: tuple[Kind, ...] = ("vector", "tokens", "map")
    default_weight = 1.0
    student_channels: int | None = None
    teacher_channels: int | None = None

    def build_for(self, student_shape: Sequence[int], teacher_shape: Sequence[int]) -> Kind:
        """Takes the numbers of channels from two shapes, and returns the layout that they share.

        Raises:
            ValueError: if the shapes are of different layouts, or of one that the loss is not for.
        """
        kind = self._common_kind(student_shape, teacher_shape)
        self.student_channels = channels_of(student_shape)
        self.teacher_channels = channels_of(teacher_shape)
        return kind

    def matched(
        self, student: Tensor, teacher: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Checks that two features are of the same samples and positions; pools maps to one size.

        Args:
            student: ``(N, C_s)``, ``(N, L, C_s)`` or ``(N, C_s, H, W)``.
            teacher: the same layout with ``C_t`` channels.
            mask: ``(N, L)`` for tokens, ``(N, H, W)`` of any size for maps.

        Returns:
            The two features, with equal shapes but for the channels.

        Raises:
            TypeError: if a feature is no floating-point tensor.
            ValueError: if they do not fit together, or not this loss.
        """
        if isinstance(student, Tensor) and isinstance(teacher, Tensor) and student.ndim <= 4:
            shape, other = student.shape, teacher.shape
            channel = 1 if len(shape) == 4 else -1
            positions = shape[2:] == other[2:] if channel == 1 else shape[:-1] == other[:-1]
            if (
                positions
                and shape[0] == other[0]
                and len(shape) == len(other)
                and KINDS.get(len(shape)) in self.kinds
                and self.student_channels in (None, shape[channel])
                and self.teacher_channels in (None, other[channel])
                and (mask is None or (len(shape) == 3 and mask.shape == shape[:2]))
                and student.is_floating_point()
                and teacher.is_floating_point()
            ):
                return student, teacher  # nothing to do, as in nearly all steps
        return self._made_to_match(student, teacher, mask)

    def _made_to_match(
        self, student: Tensor, teacher: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        for owner, feature in (("student", student), ("teacher", teacher)):
            if not isinstance(feature, Tensor) or not feature.is_floating_point():
                got = feature.dtype if isinstance(feature, Tensor) else type(feature).__name__
                raise TypeError(
                    f"{self._name}: expected a floating-point tensor as the {owner}'s feature; "
                    f"got {got}. Take a layer after the embedding or the quantization."
                )
        kind = self._common_kind(student.shape, teacher.shape)
        shapes = tuple(student.shape), tuple(teacher.shape)
        if student.shape[0] != teacher.shape[0]:
            raise ValueError(f"{self._name}: expected one batch size; got {_both(*shapes)}.")
        if kind == "tokens" and shapes[0][1] != shapes[1][1]:
            raise ValueError(
                f"{self._name}: expected as many tokens of each; got {_both(*shapes)}."
            )
        if student.ndim != teacher.ndim:
            raise ValueError(
                f"{self._name}: expected maps with as many dimensions; got {_both(*shapes)}."
            )
        if mask is not None:
            self._check_mask(mask, kind, student, teacher)
        for owner, feature, channels in (
            ("student", student, self.student_channels),
            ("teacher", teacher, self.teacher_channels),
        ):
            if channels is not None and feature.shape[1 if kind == "map" else -1] != channels:
                raise ValueError(
                    f"{self._name}: expected {channels} {owner} channels, for which it was built; "
                    f"got shape {tuple(feature.shape)}. Build the loss anew for that."
                )
        return to_common_size(student, teacher, mask) if kind == "map" else (student, teacher)

    def _check_mask(self, mask: Tensor, kind: Kind, student: Tensor, teacher: Tensor) -> None:
        shape = tuple(student.shape)
        if kind == "map":
            fits = mask.ndim == student.ndim - 1 and len(mask) == len(student)
            expected = f"a mask of shape ({shape[0]}, {'D, ' if student.ndim == 5 else ''}H, W)"
        else:
            fits = kind == "tokens" and mask.shape == student.shape[:2]
            expected = f"a mask of shape {shape[:2]}" if kind == "tokens" else "none for a vector"
        if not fits:
            raise ValueError(
                f"{self._name}, mask: expected {expected}; got shape {tuple(mask.shape)} "
                f"for features of shapes {_both(shape, tuple(teacher.shape))}."
            )

    def _common_kind(self, student_shape: Sequence[int], teacher_shape: Sequence[int]) -> Kind:
        kinds = kind_of(student_shape), kind_of(teacher_shape)
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"{self._name}: expected two features of one layout; got "
                f"{_both(tuple(student_shape), tuple(teacher_shape))}, {_a(kinds[0])} and "
                f"{_a(kinds[1])}."
            )
        if kinds[0] not in self.kinds:
            raise ValueError(
                f"{self._name}: expected {' or '.join(map(_a, self.kinds))}; got {_a(kinds[0])} of "
                f"shape {tuple(student_shape)}."
            )
        return kinds[0]

    @property
    def _name(self) -> str:
        return type(self).__name__


def for_head(feature: Tensor, head: nn.Module, valid: Tensor | None = None) -> Tensor:
    """Returns a feature as a head takes it: in its parameters' dtype, 0 where nothing counts.

    An engine may run the student in bfloat16 and this loss outside its autocast, which chooses
    itself. In padding may be anything, and in the gradient of a weight 0 times NaN is NaN.

    Args:
        feature: the student's.
        head: what is called with it.
        valid: which positions count, boolean; None if all do.
    """
    if valid is not None:
        feature = without_padding(feature, valid)
    if torch.is_autocast_enabled(feature.device.type):
        return feature
    for parameter in head.parameters():  # next() with a default is not known to dynamo before 2.9
        return feature.to(parameter.dtype)
    return feature


def without_padding(feature: Tensor, valid: Tensor) -> Tensor:
    """Returns a feature with 0 at the positions that do not count."""
    return feature.masked_fill(~valid.unsqueeze(1 if feature.ndim == 4 else -1), 0)


def mean_of_valid(values: Tensor, mask: Tensor) -> Tensor:
    """Averages ``(N, L)`` over the valid tokens; 0 if there are none."""
    valid = mask.bool()
    return values.masked_fill(~valid, 0).sum() / valid.sum().clamp(min=1)


def _both(student_shape: tuple[int, ...], teacher_shape: tuple[int, ...]) -> str:
    return f"{student_shape} from the student and {teacher_shape} from the teacher"


def _a(kind: Kind) -> str:
    """Names a layout with its shape, for a message."""
    return {
        "vector": "a vector (N, C)",
        "tokens": "tokens (N, L, C)",
        "map": "a map (N, C, H, W)",
    }[kind]

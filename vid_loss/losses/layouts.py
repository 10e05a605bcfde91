"""The three layouts a loss may be given, and how two features are brought to one of them.

A *vector* is ``(N, C)``, *tokens* are ``(N, L, C)``, a *map* is ``(N, C, H, W)``. Everything
else (NHWC maps, signals, volumes) is turned into one of these before a loss sees it, so that a
loss never asks where the channels live.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Kind = Literal["vector", "tokens", "map"]

_POOL: dict[int, Callable[..., Tensor]] = {4: F.adaptive_avg_pool2d, 5: F.adaptive_avg_pool3d}
_ADVICE = {
    ("map", "vector"): "Tap the student where it is a vector ('fc:input', a pooling layer) "
    "or pool it: student_transform=lambda x: x.mean((2, 3)).",
    ("map", "tokens"): "Turn the map into tokens: student_transform=lambda x: x.flatten(2).mT.",
    ("tokens", "map"): "Turn the tokens into a grid: "
    "student_transform=lambda x: x.mT.unflatten(2, (height, width)).",
    ("tokens", "vector"): "Pick or pool the tokens: student_transform=lambda x: x[:, 0].",
    ("vector", "map"): "Tap a student layer that has a resolution, or pool the teacher: "
    "teacher_transform=lambda x: x.mean((2, 3)).",
    ("vector", "tokens"): "Tap a student layer that keeps its tokens, or pick one of the "
    "teacher's: teacher_transform=lambda x: x[:, 0].",
}


def kind_of(shape: Sequence[int]) -> Kind:
    """Names the layout of a feature of this shape.

    Args:
        shape: shape of a feature, the batch first.

    Raises:
        ValueError: if no layout has so many dimensions.

    Example:
        >>> kind_of((8, 64, 14, 14))
        'map'
    """
    if len(shape) == 2:
        return "vector"
    if len(shape) == 3:
        return "tokens"
    if len(shape) in _POOL:
        return "map"
    raise ValueError(
        f"expected a feature (N, C), (N, L, C) or (N, C, H, W); got shape {tuple(shape)}. "
        "Reshape it with student_transform or teacher_transform."
    )


def channels_of(shape: Sequence[int]) -> int:
    """Returns the number of channels of a feature of this shape, in one of the three layouts."""
    return shape[1] if kind_of(shape) == "map" else shape[-1]


def to_layout(feature: Tensor, channel_dim: int | None) -> Tensor:
    """Brings a feature to the layout that the losses expect, without copying it.

    Args:
        feature: ``(N, C)``, ``(N, L, C)``, ``(N, C, H, W)``, ``(N, C, D, H, W)``, or one of them
            with its channels elsewhere.
        channel_dim: where the channels are. None means the last dimension of two or three,
            the second of four or five. 1 with three dimensions says that the feature is a signal
            ``(N, C, L)``, which becomes a map of height 1.

    Returns:
        A view of shape ``(N, C)``, ``(N, L, C)``, ``(N, C, H, W)`` or ``(N, C, D, H, W)``.

    Raises:
        ValueError: if the shape fits no layout or has no such dimension.
    """
    kind = kind_of(feature.shape)
    if channel_dim is None:
        return feature
    if not (-feature.ndim < channel_dim < feature.ndim and channel_dim != 0):
        raise ValueError(
            f"expected channel_dim to name a dimension after the batch; got {channel_dim} "
            f"for shape {tuple(feature.shape)}. Use 1 (channels first) or -1 (channels last)."
        )
    if kind == "map":
        return feature.movedim(channel_dim, 1)
    if kind == "tokens" and channel_dim % 3 == 1:
        return feature.unsqueeze(2)
    return feature


def refuse_unmarked_nhwc(shape: Sequence[int], channel_dim: int | None) -> None:
    """A head of width H on an NHWC map would train without an error, and learn nothing.

    Raises:
        ValueError: if a shape looks like NHWC and nothing says where its channels are.
    """
    if len(shape) == 4 and channel_dim is None and shape[1] == shape[2] != shape[3]:
        raise ValueError(
            f"expected to know where the channels of shape {tuple(shape)} are: it looks like "
            "(N, H, W, C). Pass channel_dim=-1 for that, or channel_dim=1 for (N, C, H, W)."
        )


def align(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Checks that two features describe the same samples and positions; pools maps to match.

    Height and width are average-pooled each on its own to the smaller of the two; a depth is
    pooled likewise and then folded into the height, because every loss is pointwise in space.

    Args:
        student: feature of the student, ``(N, C_s)``, ``(N, L, C_s)`` or ``(N, C_s, H, W)``.
        teacher: feature of the teacher in the same layout, ``C_t`` channels.
        mask: ``(N, L)``, nonzero at the tokens that count; tokens only.

    Returns:
        The two features, with equal shapes but for the channels.

    Raises:
        TypeError: if a feature is not floating point.
        ValueError: if layouts, batch sizes, numbers of tokens or the mask's shape disagree.
    """
    check_floating_point(student, teacher)
    kind = check_same_kind(student.shape, teacher.shape)
    shapes = _both(student.shape, teacher.shape)
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(
            f"expected one batch size; got {shapes}. Give the distiller the batch that the "
            "student has just seen."
        )
    if kind == "tokens" and student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"expected the same number of tokens; got {shapes}. Drop a class token or resample: "
            "teacher_transform=lambda x: x[:, 1:]. If these are signals (N, C, L): channel_dim=1."
        )
    if mask is not None:
        _check_mask(mask, student.shape)
    return _match_resolution(student, teacher) if kind == "map" else (student, teacher)


def check_same_kind(student_shape: Sequence[int], teacher_shape: Sequence[int]) -> Kind:
    """Returns the kind that two features share.

    Raises:
        ValueError: if they are of different kinds, with a transform that makes them one.
    """
    kinds = kind_of(student_shape), kind_of(teacher_shape)
    if kinds[0] != kinds[1]:
        shapes = _both(student_shape, teacher_shape)
        raise ValueError(f"expected two features of one kind; got {shapes}. {_ADVICE[kinds]}")
    return kinds[0]


def check_floating_point(student: Tensor, teacher: Tensor) -> None:
    """Raises a TypeError if one of two features is no tensor, or of integers or booleans."""
    for owner, feature in (("student", student), ("teacher", teacher)):
        if not isinstance(feature, Tensor):
            raise TypeError(
                f"expected a tensor as the {owner} feature; got {type(feature).__name__}. "
                f"Return one from {owner}_transform."
            )
        if not feature.is_floating_point():
            raise TypeError(
                f"expected a floating-point {owner} feature; got {feature.dtype}. "
                "Tap a layer after the embedding or the quantisation."
            )


def _both(student_shape: Sequence[int], teacher_shape: Sequence[int]) -> str:
    return f"{tuple(student_shape)} from the student and {tuple(teacher_shape)} from the teacher"


def _check_mask(mask: Tensor, shape: Sequence[int]) -> None:
    if kind_of(shape) != "tokens":
        raise ValueError(f"expected no mask for a {kind_of(shape)} of shape {tuple(shape)}.")
    if tuple(mask.shape) != tuple(shape[:2]):
        raise ValueError(
            f"expected a mask of shape {tuple(shape[:2])}, one entry a token; got shape "
            f"{tuple(mask.shape)}. Pass the padding mask of this batch."
        )


def _match_resolution(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    if student.ndim != teacher.ndim:
        raise ValueError(
            f"expected maps of one rank; got {_both(student.shape, teacher.shape)}. "
            "Pool the depth with a transform."
        )
    size = [min(pair) for pair in zip(student.shape[2:], teacher.shape[2:], strict=True)]
    pooled = [
        x if list(x.shape[2:]) == size else _POOL[x.ndim](x, size) for x in (student, teacher)
    ]
    student, teacher = (x.flatten(2, -2) for x in pooled)
    return student, teacher


def check_channels(owner: str, feature: Tensor, expected: int) -> None:
    """Raises the ValueError that names what a head was built for and what reached it."""
    if channels_of(feature.shape) != expected:
        raise ValueError(
            f"expected {expected} {owner} channels; got shape {tuple(feature.shape)}. "
            "Tap another layer or rebuild the heads."
        )


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """Returns the widest of the tensors' dtypes, float32 at least."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype

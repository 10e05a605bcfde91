"""The three layouts a loss may be given, and how a feature is brought to one of them.

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

KINDS: dict[int, Kind] = {2: "vector", 3: "tokens", 4: "map", 5: "map"}
_POOL: dict[int, Callable[..., Tensor]] = {4: F.adaptive_avg_pool2d, 5: F.adaptive_avg_pool3d}


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
    if not isinstance(shape, Sequence) or not all(isinstance(x, int) for x in shape):
        raise TypeError(
            f"expected the shape of a feature, the batch first; got {shape!r}. For example (8, 64, "
            "14, 14), or feature.shape."
        )
    if len(shape) not in KINDS:
        raise ValueError(
            "expected a feature (N, C), (N, L, C), (N, C, H, W) or (N, C, D, H, W); got shape "
            f"{tuple(shape)}. Reshape it to one of these."
        )
    return KINDS[len(shape)]


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


def to_common_size(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Average-pools two maps to the smaller of the two, height and width each on its own.

    A depth is pooled likewise and then folded into the height: every loss is pointwise in space.

    Args:
        student: ``(N, C_s, H, W)`` or ``(N, C_s, D, H, W)``.
        teacher: the same with ``C_t`` channels and a size of its own.
        mask: ``(N, H, W)`` or ``(N, D, H, W)``, of any size; averages are of what counts alone.

    Returns:
        ``(N, C_s, H, W)`` and ``(N, C_t, H, W)``, of one size.
    """
    if student.ndim == 4 and student.shape[2:] == teacher.shape[2:]:
        return student, teacher
    size = _common_size(student, teacher)
    pooled = [
        x if list(x.shape[2:]) == size else _pooled(x, size, mask) for x in (student, teacher)
    ]
    student, teacher = (x.flatten(2, -2) for x in pooled)
    return student, teacher


def valid_positions(mask: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
    """Returns which positions of two features count, boolean, at the size that they are pooled to.

    Args:
        mask: ``(N, L)`` for tokens; ``(N, H, W)`` or ``(N, D, H, W)`` for maps, of any size:
            a position counts if half of what the mask says of its area does. Nonzero counts.
        student: the student's feature.
        teacher: the teacher's.

    Returns:
        ``(N, L)`` or ``(N, H, W)``.

    Raises:
        ValueError: if it is a mask to be added to attention's logits: 0 for what counts, and less.
    """
    if not isinstance(mask, Tensor):
        raise TypeError(
            f"mask: expected a tensor; got {type(mask).__name__}. Pass torch.as_tensor(...)."
        )
    # Only of floats, and in training on the CPU alone, because the host waits for a value. The
    # heads are sized without gradients.
    looks = mask.is_floating_point() and (mask.is_cpu or not torch.is_grad_enabled())
    if looks and not torch.compiler.is_compiling() and bool((mask < 0).any()):
        raise ValueError(
            "mask: expected it to be nonzero at what counts; got one with values below 0, to be "
            "added to attention's logits, where 0 is what counts. Pass mask == 0."
        )
    mask = mask.bool()
    if kind_of(student.shape) != "map" or mask.ndim != student.ndim - 1:
        return mask
    return resized(mask, _common_size(student, teacher)).flatten(1, -2)


def resized(mask: Tensor, size: Sequence[int]) -> Tensor:
    """Returns a mask ``(N, H, W)`` at another size, boolean, as :func:`valid_positions` says."""
    mask = mask.bool()
    if list(mask.shape[1:]) == list(size):
        return mask
    shares: Tensor = _POOL[mask.ndim + 1](mask.float().unsqueeze(1), size).squeeze(1)
    return shares >= 0.5


def as_tokens(feature: Tensor) -> Tensor:
    """Returns a map ``(N, C, H, W)`` as tokens ``(N, H * W, C)``, a view."""
    return feature.flatten(2).mT


def _common_size(student: Tensor, teacher: Tensor) -> list[int]:
    return [min(pair) for pair in zip(student.shape[2:], teacher.shape[2:], strict=True)]


def _pooled(feature: Tensor, size: Sequence[int], mask: Tensor | None) -> Tensor:
    pool = _POOL[feature.ndim]
    if mask is None:
        return pool(feature, size)
    valid = resized(mask, feature.shape[2:]).unsqueeze(1)
    share = pool(valid.to(feature.dtype), size)
    return pool(feature.masked_fill(~valid, 0), size) / share.masked_fill(share == 0, 1)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """Returns the widest of the tensors' dtypes, float32 at least."""
    dtype = torch.float32
    for tensor in tensors:
        if tensor.dtype != dtype:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype

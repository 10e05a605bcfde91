"""A batch as samples: their indices, some of their rows, and what tells inputs apart."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Index = Tensor | Sequence[int] | None


def checked_index(
    sample_index: Index, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[list[int], torch.device]:
    """Returns the samples' indices, and the device of the inputs that they are of.

    Raises:
        ValueError: if the index is none, or of another batch, or inputs are in containers.
    """
    index = torch.as_tensor([] if sample_index is None else sample_index)
    if sample_index is None or index.ndim != 1 or index.is_floating_point():
        got = None if sample_index is None else f"shape {tuple(index.shape)} of {index.dtype}"
        raise ValueError(
            "FeatureCache, sample_index: expected integers (N,), each sample's place in its data "
            f"set; got {got}. Call distiller(images, sample_index=index)."
        )
    values = (*args, *kwargs.values())
    tensors = [x for x in values if isinstance(x, Tensor) and x.ndim]
    if not tensors or any(isinstance(x, list | tuple | Mapping) for x in values):
        raise ValueError(
            "FeatureCache: expected tensors with the batch first as the student's inputs; got "
            f"{[type(x).__name__ for x in values]}. Train without a cache."
        )
    if len(tensors[0]) != len(index):
        raise ValueError(
            f"FeatureCache, sample_index: expected an index for each of {len(tensors[0])} samples; "
            f"got {len(index)}."
        )
    return index.tolist(), tensors[0].device


def rows_of(value: Any, rows: Sequence[int], count: int) -> Any:
    """Returns some samples of a tensor that has ``count``; anything else as it is."""
    if len(rows) < count and isinstance(value, Tensor) and value.ndim and len(value) == count:
        return value[list(rows)]
    return value


def checksums(args: tuple[Any, ...], kwargs: Mapping[str, Any], count: int) -> Tensor:
    """A number for each sample's inputs, ``(N,)`` in float64, which a flip or a crop changes."""
    total = torch.zeros(count, dtype=torch.float64)
    for value in (*args, *(kwargs[name] for name in sorted(kwargs))):
        if isinstance(value, Tensor) and value.ndim and len(value) == count:
            flat = value.detach().cpu().reshape(count, -1).double()
            total += flat @ torch.arange(flat.shape[1], dtype=torch.float64).cos()
    return total

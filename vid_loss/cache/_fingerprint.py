"""Which teacher it is, and how it is run: what decides about its features but its inputs."""

import hashlib
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from vid_loss.teacher import Teacher


def fingerprint_of(teacher: Teacher, dtype: torch.dtype) -> str:
    """Returns a digest of a teacher's modules, weights, tapped layers and precision.

    Args:
        teacher: the teacher.
        dtype: what its features are kept in.
    """
    from safetensors.torch import save

    # Some modules show a function, with its address.
    modules = re.sub(r" at 0x[0-9a-f]+", "", repr(teacher.tap.model))
    facts = modules, sorted(teacher.tap.specs), _autocast_dtype(teacher), dtype
    digest = hashlib.sha256(repr(facts).encode())
    for name, tensor in _tensors(teacher):
        digest.update(save({name: tensor.detach().cpu().contiguous()}))
    return digest.hexdigest()


def state_of(teacher: Teacher) -> Any:
    """Returns what is cheap to compare, and changes whenever torch knows of a change."""
    tensors = [
        (x.data_ptr(), None if x.is_inference() else x._version) for _, x in _tensors(teacher)
    ]
    return tensors, _autocast_dtype(teacher)


def _tensors(teacher: Teacher) -> Iterator[tuple[str, Tensor]]:
    model = teacher.tap.model
    yield from model.named_parameters()
    for name, buffer in model.named_buffers():
        if buffer.ndim or buffer.is_floating_point():  # no counters, as batch norm has one
            yield name, buffer


def _autocast_dtype(teacher: Teacher) -> torch.dtype | None:
    """The precision that the teacher's forward runs in; None is that of its weights."""
    if teacher.dtype is not None:
        return teacher.dtype
    parameter = next(teacher.tap.model.parameters(), None)
    kind = "cpu" if parameter is None else parameter.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None

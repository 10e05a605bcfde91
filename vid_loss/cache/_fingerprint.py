"""Which teacher it is, and how it is run."""

import hashlib
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from vid_loss.teacher import Teacher

from ._bytes import bytes_of

_FORMAT = 2  # of the files
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint_of(teacher: Teacher, dtype: torch.dtype) -> str:
    """Returns a digest of a teacher's modules, weights, tapped layers and precision.

    What its code does is not in there, nor its plain attributes: they are compared by running it.

    Args:
        teacher: the teacher.
        dtype: what its features are kept in.

    Raises:
        ValueError: if weights are not in memory.
    """
    # Some modules show a function, with its address.
    modules = re.sub(r" at 0x[0-9a-f]+", "", repr(teacher.tap.model))
    facts = _FORMAT, modules, sorted(teacher.tap.specs), autocast_dtype(teacher), dtype
    digest = hashlib.sha256(repr(facts).encode())
    for name, tensor in _tensors(teacher):
        if tensor.is_meta:
            raise ValueError(
                f"FeatureCache, teacher: expected its weights in memory; got {name!r} on the meta "
                "device, as offloading leaves it. Train without a cache."
            )
        digest.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()


def state_of(teacher: Teacher) -> Any:
    """Returns what is cheap to compare, and changes whenever torch knows of a change."""
    tensors = [
        (x.data_ptr(), None if x.is_inference() else x._version) for _, x in _tensors(teacher)
    ]
    return tensors, autocast_dtype(teacher)


def sums_of(teacher: Teacher) -> list[int]:
    """Returns the sum of each tensor's bits, read as integers.

    Writing to a parameter's ``.data``, as many an EMA does, leaves no trace but the values.
    """
    tensors = [x.detach() for _, x in _tensors(teacher)]
    reals = [torch.view_as_real(x.resolve_conj()) if x.is_complex() else x for x in tensors]
    sums = [x.view(_INTEGERS[x.itemsize]).sum() for x in reals]
    return torch.stack([x.to(sums[0].device) for x in sums]).tolist() if sums else []


def autocast_dtype(teacher: Teacher) -> torch.dtype | None:
    """The precision that the teacher's forward runs in; None is that of its weights."""
    if teacher.dtype is not None:
        return teacher.dtype
    parameter = next(teacher.tap.model.parameters(), None)
    kind = "cpu" if parameter is None or parameter.is_meta else parameter.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _tensors(teacher: Teacher) -> Iterator[tuple[str, Tensor]]:
    model = teacher.tap.model
    yield from model.named_parameters()
    for name, buffer in model.named_buffers():
        if buffer.ndim or buffer.is_floating_point():  # no counters, as batch norm has one
            yield name, buffer

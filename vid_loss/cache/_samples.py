"""A batch as samples: their indices, some of their rows, and what tells inputs apart."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import combinations
from numbers import Number
from typing import Any

import torch
from torch import Tensor

from ._bytes import bytes_of

Index = Tensor | Sequence[int] | None
Key = int | str  # of an argument: its position or its name
_PLAIN = (Number, str, bytes, Enum, torch.dtype, torch.device, type(None))


@dataclass(frozen=True)
class Batch:
    """The student's arguments.

    Which of the tensors hold samples is not to be seen from one shape alone: positions ``(L,)``
    look like it when ``L`` happens to be the number of samples.

    Attributes:
        args: the positional arguments.
        kwargs: the keyword arguments.
        count: how many samples there are.
        shared: arguments that are the same for all samples, whatever their shape.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    count: int
    shared: frozenset[Key] = frozenset()

    def items(self) -> Iterator[tuple[Key, Any]]:
        """Yields all arguments, those by name in the order of their names."""
        yield from enumerate(self.args)
        yield from sorted(self.kwargs.items())

    @property
    def by_sample(self) -> list[Key]:
        """The arguments that hold one row for each sample."""
        return [
            key
            for key, value in self.items()
            if isinstance(value, Tensor)
            and value.shape[:1] == (self.count,)
            and key not in self.shared
        ]

    @property
    def device(self) -> torch.device:
        """Where the first of the samples' inputs is."""
        value: Tensor = dict(self.items())[self.by_sample[0]]
        return value.device

    def readings(self, settled: frozenset[Key]) -> Iterator["Batch"]:
        """Yields this batch, then others that share more of the arguments that are not settled."""
        open_to_doubt = [key for key in self.by_sample if key not in settled]
        for number in range(min(len(open_to_doubt), len(self.by_sample) - 1) + 1):
            for shared in combinations(open_to_doubt, number):
                yield replace(self, shared=self.shared | frozenset(shared))

    def rows(self, rows: Sequence[int]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the arguments of some of the samples."""
        chosen = dict(self.items())
        if len(rows) < self.count:
            chosen |= {key: chosen[key][list(rows)] for key in self.by_sample}
        return tuple(chosen[i] for i in range(len(self.args))), {k: chosen[k] for k in self.kwargs}

    def common(self) -> dict[Key, bytes]:
        """Returns a digest of each argument that all samples share.

        A tensor among them that is on a GPU is waited for.
        """
        by_sample = set(self.by_sample)
        return {
            key: _digest(bytes_of(value)) if isinstance(value, Tensor) else repr(value).encode()
            for key, value in self.items()
            if key not in by_sample
        }

    def digests(self, rows: Sequence[int], common: Mapping[Key, bytes]) -> Tensor:
        """Returns a number for each of some samples' inputs, ``(len(rows),)``, exact to the bit."""
        args, kwargs = self.rows(rows)
        chosen = dict(replace(self, args=args, kwargs=kwargs).items())
        inputs = {key: chosen[key].detach().cpu() for key in self.by_sample}
        digests = []
        for row in range(len(rows)):
            parts = [
                f"{key!r} {getattr(value, 'dtype', None)} ".encode()
                + (common[key] if key in common else _digest(bytes_of(inputs[key][row])))
                for key, value in chosen.items()
            ]
            digests.append(int.from_bytes(_digest(b"".join(parts))[:8], "little", signed=True))
        return torch.tensor(digests, device="cpu")


def batch_of(
    sample_index: Index, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[list[int], Batch]:
    """Returns the samples' indices, and the arguments that they are in.

    Raises:
        ValueError: if the index is none, or of another batch, or inputs are in containers.
    """
    index = _checked(sample_index)
    values = (*args, *kwargs.values())
    tensors = [x for x in values if isinstance(x, Tensor) and x.ndim]
    if not tensors or not all(isinstance(x, (Tensor, *_PLAIN)) for x in values):
        raise ValueError(
            "FeatureCache: expected tensors with the batch first, and plain values, as the "
            f"student's inputs; got {[type(x).__name__ for x in values]}. Train without a cache."
        )
    if not any(len(x) == len(index) for x in tensors):
        raise ValueError(
            f"FeatureCache, sample_index: expected an index for each of {len(tensors[0])} samples; "
            f"got {len(index)}."
        )
    return index, Batch(args, kwargs, len(index))


def _checked(sample_index: Index) -> list[int]:
    try:
        given = [] if sample_index is None else sample_index
        index = given if isinstance(given, Tensor) else torch.as_tensor(given, device="cpu")
        got = f"shape {tuple(index.shape)} of {index.dtype}"
    except (TypeError, ValueError, RuntimeError):
        index, got = torch.zeros(()), repr(sample_index)
    whole = not (index.is_floating_point() or index.is_complex() or index.dtype == torch.bool)
    samples: list[int] = index.tolist() if index.ndim == 1 and whole else []
    if not samples or min(samples) < 0:
        got = "None" if sample_index is None else got
        got += f" with {min(samples)}" if samples else ""
        raise ValueError(
            "FeatureCache, sample_index: expected integers (N,), each sample's place in its data "
            f"set; got {got}. Call distiller(images, sample_index=index)."
        )
    return samples


def _digest(data: bytes | memoryview) -> bytes:
    return hashlib.sha256(data).digest()

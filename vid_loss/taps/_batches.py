"""Which batches a model has run on."""

import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

_MOST = 8  # forwards that are remembered
_Key = tuple[Any, ...]
Batch = Mapping[_Key, weakref.ref[Tensor]]  # which tensors, by where they are in memory


class Batches:
    """Remembers which tensors the last forwards were given; keeps none of them alive."""

    def __init__(self) -> None:
        self._forwards: deque[Batch] = deque(maxlen=_MOST)

    def add(self, batch: Batch) -> None:
        """Notes what a forward is given."""
        self._forwards.append(batch)

    def refuse_passed(self, batch: Batch, owner: str) -> None:
        """Refuses a batch with a tensor that a forward before the last was given, and not the last.

        Tensors that were given to none, such as those of other inputs for the teacher, tell
        nothing.

        Raises:
            RuntimeError: if it is such a batch.
        """
        if len(self._forwards) < 2:
            return
        *earlier, last = self._forwards
        given = batch.keys() - last.keys()
        if any(key in given and tensor() is not None for b in earlier for key, tensor in b.items()):
            raise RuntimeError(
                f"The {owner} has run forward on another batch since it ran on this one, whose "
                f"features are gone. Call distiller(...) right after each {owner}(...), or run the "
                f"{owner} once on torch.cat of the batches. If the teacher is to see this one all "
                "the same, give it a clone."
            )


def batch_of(args: Iterable[Any], kwargs: Mapping[str, Any]) -> Batch:
    """Returns which tensors a model is called with."""
    keys = {}
    for tensor in _tensors([*args, *kwargs.values()]):
        base = tensor if tensor._base is None else tensor._base  # of a slice, a new one each time
        where = (id(base), tensor.storage_offset(), tensor.shape, tensor.stride())
        keys[where] = weakref.ref(base)
    return keys


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor) and not (value.is_inference() or value.is_nested):
            if value.layout is torch.strided:
                yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
        elif isinstance(value, Mapping):
            yield from _tensors(value.values())

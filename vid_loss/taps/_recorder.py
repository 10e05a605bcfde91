"""What the hooks of a tap write to."""

import weakref
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from torch import Tensor

Mode = Literal["always", "training", "read"]
# Which tensors a model is called with, by where they are in memory and, last, how often they were
# written to; keeps none of them alive.
Batch = Mapping[tuple[Any, ...], weakref.ref[Tensor]]
_MOST = 8  # forwards whose batches are remembered


class Capture(NamedTuple):
    """A feature, and what must still hold when it is used."""

    tensor: Tensor
    version: int | None  # None where torch keeps no version: compiled, or in inference mode
    without_grad: Literal["", "no_grad", "checkpoint"]  # what turned them off in training
    calls: int


class StopForward(Exception):
    """Raised out of a model's forward when its last tapped layer has been read."""


@dataclass
class Forward:
    """What is recorded of one forward of a model.

    Attributes:
        armed: whether it is being recorded.
        ran: whether it has ended.
        passed: why a later one was not recorded, in words.
        outside: a tapped layer that ran while the model did not.
        captures: the features by layer.
    """

    armed: bool = False
    ran: bool = False
    passed: str = ""
    outside: str = ""
    captures: dict[str, Capture] = field(default_factory=dict)


class Recorder:
    """What the hooks write to.

    It knows no module, so that hooks keep neither a tap nor a model alive.

    Attributes:
        mode: which forwards are recorded.
        thread: which thread's; None for any. What others run on the same model meanwhile is theirs.
        stop_after: end the forward with :class:`StopForward` when so many layers have been read.
        copied: whether the model has been deep-copied since it was tapped.
        compiled: whether the last forward was a compiled one.
        inside: whether the model is running, recorded or not.
        last: the last recorded forward. Who takes its features puts a new one in its place.
        batches: what the last recorded forwards were given.
    """

    def __init__(self, mode: Mode) -> None:
        self.mode = mode
        self.thread: int | None = None
        self.stop_after: int | None = None
        self.copied = False
        self.compiled = False
        self.inside = False
        self.last = Forward()
        self.batches: deque[Batch] = deque(maxlen=_MOST)

    def has_passed(self, batch: Batch) -> bool:
        """Whether a tensor of a batch was given to a forward before the last, and not to the last.

        Tensors that were given to none, such as those of other inputs for the teacher, tell
        nothing.
        """
        *earlier, last = ({key[:-1]: x for key, x in b.items()} for b in self.batches)
        given = {key[:-1] for key in batch} - last.keys()
        return any(
            key in given and tensor() is not None for b in earlier for key, tensor in b.items()
        )

    def has_changed(self, batch: Batch) -> bool:
        """Whether numbers of a batch are not what the last forward was given in their place.

        Indices and labels are let alone: a model that marks some of them has them changed too.
        """
        # Of one that is gone, another tensor may have the identity by now.
        last = {key[:-1]: key[-1] for key, x in self.batches[-1].items() if x() is not None}
        return any(
            last.get(key[:-1], key[-1]) != key[-1] and tensor.is_floating_point()
            for key, reference in batch.items()
            if (tensor := reference()) is not None
        )

"""The teacher's own units: mean and variance of each of its channels, estimated from batches."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_RESOLUTION = 1e-12  # a variance below this share of the squared mean is float32's rounding
LEAST_SHARE = 1e-3  # what a batch counts for at least, when many came before it


class Estimates(nn.Module):
    """Base of running estimates: buffers in float32, saved and loaded with the model.

    They stay in float32 when the model that they are in is cast to half precision: a running mean
    that moves by some percent a step stands still in bfloat16, whose numbers are half a percent
    apart.

    For torch they are not persistent, because engines that build a model on the meta device take
    all that is in its state for a shard of a parameter, and put back only other buffers.
    """

    def register_estimate(self, name: str, value: Tensor) -> None:
        """Adds a buffer."""
        self.register_buffer(name, value, persistent=False)

    @contextmanager
    def _persistent(self) -> Iterator[None]:
        hidden = self._non_persistent_buffers_set
        if not any(buffer is None or buffer.is_meta for buffer in self._buffers.values()):
            self._non_persistent_buffers_set = set()
        try:
            yield
        finally:
            self._non_persistent_buffers_set = hidden

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with self._persistent():
            super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with self._persistent():
            super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]  # as torch leaves it
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        for name, buffer in before.items():
            cast = self._buffers[name]
            if buffer is not None and cast is not None and cast.itemsize < buffer.itemsize:
                self._buffers[name] = buffer.to(cast.device)
        return self


class TeacherScale(Estimates):
    """Mean and variance of each channel of the teacher's feature, over all batches so far.

    Positions count equally, whichever batch, sample or process they came from; each batch counts
    for at least a thousandth, should the features drift. With ``torch.distributed``, all processes
    see the joined batch. Estimates shift and scale exactly as the features do.

    Args:
        channels: number of channels C.

    Attributes:
        positions: how many positions have been seen, ``(C,)``; those of a batch in which a channel
            was not finite do not count for it.
        mean: ``(C,)``.
        var: ``(C,)``; 0 for a channel that never changes.
    """

    positions: Tensor
    mean: Tensor
    var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_estimate("positions", torch.zeros(channels))
        self.register_estimate("mean", torch.zeros(channels))
        self.register_estimate("var", torch.ones(channels))

    def constant(self) -> Tensor:
        """Returns which channels do not change, beyond rounding: ``(C,)``, boolean."""
        return is_constant(self.mean, self.var)


def is_constant(mean: Tensor, var: Tensor) -> Tensor:
    """Returns which channels do not change, beyond rounding: boolean, as the estimates."""
    return torch.addcmul(var, mean, mean, value=-_RESOLUTION) <= 0


def standardized_away(prediction: Tensor, feature: Tensor, mean: Tensor, unit: Tensor) -> Tensor:
    """Returns a prediction of the standardized feature, less that feature.

    Args:
        prediction: in the layout of the feature, in float32 or wider.
        feature: as the teacher gave it.
        mean: of its channels, ``(C,)``.
        unit: one over its standard deviations, ``(C,)``; 0 of those that do not change.
    """
    if feature.ndim == 4:
        mean, unit = mean.view(-1, 1, 1), unit.view(-1, 1, 1)
    return torch.addcmul(prediction, mean - feature, unit)

"""The teacher's own units: mean and variance of each of its channels, estimated from batches."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ._base import without_padding
from ._end_to_end import Counts, EndToEnd

_RESOLUTION = 1e-12  # a variance below this share of the squared mean is float32's rounding
_LEAST_SHARE = 1e-3  # what a batch counts for at least, when many came before it


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


def take_in(
    scales: Sequence[TeacherScale],
    features: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    counts: Counts,
    *,
    joined: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Counts]:
    """Takes a batch of several features into the estimates of each.

    Args:
        scales: of each feature, on one device.
        features: ``(N, C)``, ``(N, L, C)`` or ``(N, C, H, W)``, in float32 or wider.
        masks: of each, ``(N, L)``, boolean, set at the tokens that count; or None.
        counts: of each, how many positions count.
        joined: whether the batch is that of all processes, each of which makes this call.

    Returns:
        Mean and variance by now, and which share of all positions so far the batch is, 0 where it
        was not taken: of all channels, end to end. Then the counts, of all processes if joined.
    """
    means, variances = [x.mean for x in scales], [x.var for x in scales]
    positions = [x.positions for x in scales]
    channels = EndToEnd([len(x) for x in means])
    with torch.no_grad():
        mean, var = _moments(channels, features, masks, counts)
        if joined:
            counts, mean, var = _joined(channels, counts, mean, var)
        old_mean, old_var = channels.join(means), channels.join(variances)
        mean, var = mean.to(old_mean.dtype), var.to(old_var.dtype)
        # One operation where isfinite() is four; what is not finite would stay for ever.
        taken = var < torch.inf
        counted = channels.times(taken, counts)
        if any(isinstance(count, Tensor) or not count for count in counts):  # it may be 0
            taken = counted > 0
        seen = channels.join(positions) + counted
        share = (counted / seen.clamp(min=1)).clamp_(min=_LEAST_SHARE).mul_(taken)
        mean, var = torch.where(taken, mean, old_mean), torch.where(taken, var, old_var)
        away = mean - old_mean
        new_mean = old_mean.lerp(mean, share)  # exact where the share is 1: nothing was before
        new_var = old_var.lerp(torch.addcmul(var, away, mean - new_mean), share)
        channels.store(seen, new_mean, new_var, into=[*positions, *means, *variances])
        return new_mean, new_var, share, counts


def is_constant(mean: Tensor, var: Tensor) -> Tensor:
    """Returns which channels do not change, beyond rounding: boolean, as the estimates."""
    return torch.addcmul(var, mean, mean, value=-_RESOLUTION) <= 0


def unit_of(var: Tensor, constant: Tensor) -> Tensor:
    """Returns what standardizes each channel; 0 for those that do not change."""
    return var.rsqrt().masked_fill_(constant, 0)


def standardized_away(prediction: Tensor, feature: Tensor, mean: Tensor, unit: Tensor) -> Tensor:
    """Returns a prediction of the standardized feature, less that feature.

    Args:
        prediction: in the layout and the dtype of the feature.
        feature: as the teacher gave it.
        mean: of its channels, ``(C,)``.
        unit: what standardizes them, ``(C,)``, see :func:`unit_of`.
    """
    if feature.ndim == 4:
        mean, unit = mean.view(-1, 1, 1), unit.view(-1, 1, 1)
    return torch.addcmul(prediction, mean - feature, unit)


def _moments(
    channels: EndToEnd,
    features: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    counts: Counts,
) -> tuple[Tensor, Tensor]:
    """Returns mean and variance of each channel, end to end; the latter in two passes.

    In one, sums of squares would lose the variance of a channel whose mean is large.
    """
    means, squares = [], []
    for feature, mask, count in zip(features, masks, counts, strict=True):
        is_map = feature.ndim == 4
        dims = (0, 2, 3) if is_map else tuple(range(feature.ndim - 1))
        if mask is None:
            mean = feature.mean(dims) if feature.numel() else feature.sum(dims)
        else:
            feature = without_padding(feature, mask)  # it may be NaN there
            mean = feature.sum(dims) / count.clamp(min=1)
        centered = feature - (mean.view(-1, 1, 1) if is_map else mean)
        if mask is not None:
            centered.masked_fill_(~mask.unsqueeze(-1), 0)
        if is_map:
            squared = torch.linalg.vector_norm(centered, dim=(2, 3)).square_().sum(0)
        else:
            squared = centered.square_().sum(dims)
        means.append(mean)
        squares.append(squared)
    return channels.join(means), channels.over(squares, counts)


def _joined(
    channels: EndToEnd, counts: Counts, mean: Tensor, var: Tensor
) -> tuple[Counts, Tensor, Tensor]:
    """Returns the moments of all processes' batches together."""
    # In float64, which has digits enough for the squared means.
    mean64, var64 = mean.double(), var.double()
    weight = channels.times(torch.ones_like(mean64), counts)
    sums = torch.stack([weight, weight * mean64, weight * (var64 + mean64.square())])
    torch.distributed.all_reduce(sums)
    weight, first, second = sums.unbind()
    divisor = weight.clamp(min=1)
    joined_mean = first / divisor
    joined_var = (second / divisor - joined_mean.square()).clamp(min=0)
    of_all = [x[0] for x in channels.split(weight.to(mean))]
    return of_all, joined_mean.to(mean), joined_var.to(var)

"""The teacher's own units: mean and variance of each of its channels, estimated from batches."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vid_loss.guards import several_processes

from .layouts import kind_of, per_channel

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

    @torch.no_grad()
    def update(self, feature: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Takes a batch into the estimates.

        Args:
            feature: ``(N, C)``, ``(N, L, C)`` or ``(N, C, H, W)``, in float32 or wider.
            mask: ``(N, L)`` for tokens, nonzero at those that count.

        Returns:
            How many positions the batch had in all processes, ``()``, and which share of all that
            were seen they are, ``(C,)``.
        """
        count, mean, var = moments(feature, mask, self.mean, self.positions)
        finite = torch.isfinite(mean + var)  # what is not would stay for ever
        mean, var = torch.where(finite, mean, self.mean), torch.where(finite, var, self.var)
        counted = torch.where(finite, count, 0)
        total = self.positions + counted
        share = (counted / total.clamp(min=1)).clamp(min=_LEAST_SHARE)
        share = torch.where(counted > 0, share, 0)
        difference = mean - self.mean
        spread = self.var + share * difference.square()
        var = torch.where(self.positions > 0, spread + share * (var - spread), var)
        self.var.copy_(torch.where(share > 0, var, self.var))
        self.mean.add_(share * difference)
        self.positions.copy_(total)
        return count, share

    def alive(self) -> Tensor:
        """Returns which channels change, beyond rounding: ``(C,)``, boolean."""
        return self.var > _RESOLUTION * self.mean.square()


def moments(
    feature: Tensor, mask: Tensor | None, mean: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns count ``()``, mean and variance ``(C,)`` of a batch, all processes' together.

    Args:
        feature: the batch.
        mask: which tokens count.
        mean: an estimate of the mean to sum around: sums of squares around 0 would lose the
            variance of a channel whose mean is large.
        positions: 0 where there is no estimate yet; then the first sample, or the first token that
            counts, gives one.
    """
    kind = kind_of(feature.shape)
    dims = (0, 2, 3) if kind == "map" else tuple(range(feature.ndim - 1))
    if mask is not None:
        padded = ~mask.bool().unsqueeze(-1)
        feature = feature.masked_fill(padded, 0)  # it may be NaN there
    if not feature.numel():
        sample = mean
    elif mask is None:
        sample = feature[:1].mean(dims)
    else:
        valid = mask.bool().int().argmax().view(1)  # an index tensor: nobody waits for the device
        sample = feature.flatten(0, 1).index_select(0, valid).squeeze(0)
    center = torch.where(positions > 0, mean, sample)
    centered = feature - per_channel(center, feature.ndim)
    if mask is None:
        count = positions.new_full((), feature.numel() // max(len(mean), 1))
    else:
        centered = centered.masked_fill_(padded, 0)
        count = (~padded).sum().to(positions)
    first = centered.sum(dims)
    if kind == "map":
        second = torch.linalg.vector_norm(centered.flatten(2), dim=2).square_().sum(0)
    else:
        second = centered.square_().sum(dims)
    divisor = count.clamp(min=1)
    mean, var = center + first / divisor, second / divisor - (first / divisor).square()
    if not several_processes():
        return count, mean, var.clamp_(min=0)
    # In float64, which has digits enough for the squared means.
    mean, var, weight = mean.double(), var.double(), count.double()
    joined = torch.stack([weight.expand_as(mean), weight * mean, weight * (var + mean.square())])
    weight, first, second = sum_over_processes(joined).unbind()
    mean = first / weight.clamp(min=1)
    var = (second / weight.clamp(min=1) - mean.square()).clamp(min=0)
    return weight[0].to(count), mean.to(center), var.to(center)


def sum_over_processes(values: Tensor) -> Tensor:
    """Sums a tensor over all processes; every one of them must call this."""
    if several_processes():
        torch.distributed.all_reduce(values)
    return values

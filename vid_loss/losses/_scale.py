"""The teacher's own units: mean and variance of each of its channels, estimated from batches."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

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

    def update(
        self, feature: Tensor, mask: Tensor | None, *, joined: bool = False
    ) -> tuple[int | Tensor, Tensor]:
        """Takes a batch into the estimates.

        Args:
            feature: ``(N, C)``, ``(N, L, C)`` or ``(N, C, H, W)``, in float32 or wider.
            mask: ``(N, L)`` for tokens, boolean, set at those that count.
            joined: whether the batch is that of all processes, each of which makes this call.

        Returns:
            How many positions the batch had, and which share of all that were seen they are,
            ``(C,)``.
        """
        positions, mean_so_far, var_so_far = self.positions, self.mean, self.var
        count, mean, var = _moments(feature.detach(), mask, mean_so_far.shape[0])
        if joined:
            count, mean, var = _joined(count, mean, var)
        if mean.dtype != mean_so_far.dtype:
            mean, var = mean.to(mean_so_far), var.to(var_so_far)
        # One operation where isfinite() is four; what is not finite would stay for ever.
        taken = var < torch.inf
        if isinstance(count, Tensor) or not count:
            taken = taken & (count > 0)
        counted = taken * count
        positions.add_(counted)
        share = (counted / positions.clamp(min=1)).clamp_(min=_LEAST_SHARE).mul_(taken)
        mean, var = torch.where(taken, mean, mean_so_far), torch.where(taken, var, var_so_far)
        away = mean - mean_so_far
        mean_so_far.lerp_(mean, share)  # exact where the share is 1: there was nothing before
        var_so_far.lerp_(var, share).addcmul_(share * away, mean - mean_so_far)
        return count, share

    def constant(self) -> Tensor:
        """Returns which channels do not change, beyond rounding: ``(C,)``, boolean."""
        mean = self.mean
        return torch.addcmul(self.var, mean, mean, value=-_RESOLUTION) <= 0

    def away(self, prediction: Tensor, feature: Tensor, constant: Tensor) -> Tensor:
        """Returns a prediction of the standardized feature, less that feature.

        Args:
            prediction: in the layout and the dtype of the feature.
            feature: as the teacher gave it.
            constant: channels that do not change: they become 0, their mean.
        """
        factor, mean = self.var.rsqrt().masked_fill_(constant, 0), self.mean
        if feature.ndim == 4:
            factor, mean = factor.view(-1, 1, 1), mean.view(-1, 1, 1)
        return torch.addcmul(prediction, mean - feature, factor)


def _moments(
    feature: Tensor, mask: Tensor | None, channels: int
) -> tuple[int | Tensor, Tensor, Tensor]:
    """Returns how many positions a batch has, mean and variance ``(C,)``; the latter in two passes.

    In one, sums of squares would lose the variance of a channel whose mean is large.
    """
    is_map = feature.ndim == 4
    dims = (0, 2, 3) if is_map else tuple(range(feature.ndim - 1))
    count: int | Tensor = feature.numel() // max(channels, 1)
    divisor: int | Tensor = max(count, 1)
    if mask is not None:
        count = mask.sum()
        divisor = count.clamp(min=1)
        padded = ~mask.unsqueeze(-1)
        feature = feature.masked_fill(padded, 0)  # it may be NaN there
    mean = feature.sum(dims) / divisor  # 0 of no positions, where mean() would be NaN
    centered = feature - (mean.view(-1, 1, 1) if is_map else mean)
    if mask is not None:
        centered.masked_fill_(padded, 0)
    if is_map:
        squares = torch.linalg.vector_norm(centered.flatten(2), dim=2).square_().sum(0)
    else:
        squares = centered.square_().sum(dims)
    return count, mean, squares / divisor


def _joined(count: int | Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the moments of all processes' batches together."""
    # In float64, which has digits enough for the squared means.
    mean64, var64 = mean.double(), var.double()
    weight = torch.ones_like(mean64) * count
    sums = torch.stack([weight, weight * mean64, weight * (var64 + mean64.square())])
    torch.distributed.all_reduce(sums)
    weight, first, second = sums.unbind()
    divisor = weight.clamp(min=1)
    joined_mean = first / divisor
    joined_var = (second / divisor - joined_mean.square()).clamp(min=0)
    return weight[0].to(mean), joined_mean.to(mean), joined_var.to(var)

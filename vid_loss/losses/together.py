"""The losses of several pairs at once: numbers per channel are computed for all pairs in one go.

On a GPU each operation on some hundred numbers is a launch, and among processes each sum of them
is a wait. The channels of all pairs, one behind the other, take as many as those of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from vid_loss.guards import no_autocast, several_processes

from ._end_to_end import EndToEnd
from ._scale import is_constant, standardized_away, take_in, unit_of
from ._variance import sum_of_squares, take_in_squares
from .gaussian import nll_per_channel
from .layouts import compute_dtype

if TYPE_CHECKING:
    from .vid import VIDLoss

_ESTIMATES = ("mean", "var")  # of the teacher's scale


class Prediction(NamedTuple):
    """What a head says of a batch, and what it is compared with."""

    mean: Tensor  # (N, C), (N, L, C) or (N, C, H, W), as the head returns it
    target: Tensor  # the teacher's feature, of the same shape
    mask: Tensor | None  # (N, L), boolean: what counts
    left_out: float  # how many positions there are for each that was taken


def nll_of_pairs(
    losses: Sequence[VIDLoss],
    predictions: list[Prediction],
    finite: Sequence[Tensor | None] | None = None,
) -> list[Tensor]:
    """Returns ``-log q(t|s)`` of each pair; in train mode the running estimates take the batch in.

    Args:
        losses: one for each pair.
        predictions: what :meth:`VIDLoss.predict` returned for each. The list is emptied, so that
            each map can be freed when its residual is there.
        finite: whether the teacher's feature is, where no host has looked; its gradient is 0 if it
            is not. Estimates take what is finite in any case.
    """
    groups: dict[object, _Group] = {}
    places: dict[object, list[int]] = {}
    known = [None] * len(losses) if finite is None else finite
    for place, loss in enumerate(losses):
        prediction = predictions.pop(0)
        kind = _kind(loss, prediction)
        groups.setdefault(kind, _Group(loss)).add(loss, prediction, known[place])
        places.setdefault(kind, []).append(place)
    values: dict[int, Tensor] = {}
    for kind, group in groups.items():
        values.update(zip(places[kind], group.nll(), strict=True))
    return [values[place] for place in range(len(losses))]


def _kind(loss: VIDLoss, prediction: Prediction) -> object:
    """Pairs of which this is equal are computed together; in all processes the same ones."""
    variance = loss.running_var
    joined = loss.training and several_processes()
    return (
        *(loss.training, loss.standardize, loss.trained_var is None, loss.scale.mean.device),
        *(variance.momentum, variance.floor, prediction.mean.dtype, prediction.target.dtype),
        *(loss.reduction, joined or prediction.mask is None),
    )


class _Group:
    """Pairs that differ in nothing but their features; their channels lie end to end."""

    def __init__(self, one: VIDLoss) -> None:
        self.training, self.standardize = one.training, one.standardize
        self.reduction, self.floor = one.reduction, one.running_var.floor
        self.joined = one.training and several_processes()
        self.losses: list[VIDLoss] = []
        self.means: list[Tensor] = []  # what the heads say
        self.targets: list[Tensor] = []
        self.masks: list[Tensor | None] = []
        self.counts: list[Any] = []  # of positions that count, all of them numbers or tensors
        self.left_out: list[float] = []
        self.finite: list[Tensor | None] = []

    def add(self, loss: VIDLoss, prediction: Prediction, finite: Tensor | None) -> None:
        """Takes one more pair."""
        mean, target, mask, left_out = prediction
        if not mean.dtype == target.dtype == torch.float32:
            dtype = compute_dtype(mean, target)
            mean, target = mean.to(dtype), target.to(dtype)
        positions = mean.numel() // max(len(loss.scale.mean), 1)
        count: int | Tensor = positions if mask is None else mask.sum()
        if mask is None and self.joined:  # in other processes it may be one that a mask decides
            count = torch.full((), positions, device=mean.device)
        self.losses.append(loss)
        self.means.append(mean)
        self.targets.append(target)
        self.masks.append(mask)
        self.counts.append(count)
        self.left_out.append(left_out)
        self.finite.append(finite)

    def nll(self) -> list[Tensor]:
        """Returns the losses of the pairs, in nats."""
        scales = [loss.scale for loss in self.losses]
        channels = EndToEnd([len(scale.mean) for scale in scales])
        with no_autocast(self.means[0]):
            if self.training:
                mean, var, share, of_all = take_in(
                    scales, self.targets, self.masks, self.counts, joined=self.joined
                )
            else:
                mean, var = (channels.join([getattr(x, k) for x in scales]) for k in _ESTIMATES)
            constant = is_constant(mean, var) if self.standardize else None
            squares = self._squares(channels, mean, var, constant)
            mean_squares = channels.over([x.sum(0) for x in squares], self.counts)
            if constant is not None:  # a channel that never changes teaches nothing
                mean_squares = mean_squares.masked_fill(constant, 0)
            if self.training:
                share = share if constant is None else share.masked_fill_(constant, 0)
                variances = [loss.running_var for loss in self.losses]
                counts = (self.counts, of_all) if self.joined else None
                take_in_squares(variances, mean_squares.detach(), share, counts)
            q_var = self._q_var(channels, constant)
            if self.reduction == "none":
                return self._of_samples(channels, squares, q_var, constant)
            nll = channels.split(nll_per_channel(mean_squares, q_var))
            sizes = [len(x) for x in squares]
            each = zip(nll, self.counts, sizes, self.left_out, strict=True)
            return [self._reduced(*x) for x in each]

    def _squares(
        self, channels: EndToEnd, mean: Tensor, var: Tensor, constant: Tensor | None
    ) -> list[Tensor]:
        """Returns each sample's sum of squared residuals, ``(N, C)`` of each pair."""
        units = None if constant is None else channels.split(unit_of(var, constant))
        squares = []
        for place, (center, mask) in enumerate(zip(channels.split(mean), self.masks, strict=True)):
            prediction, target = self.means.pop(0), self.targets.pop(0)
            if units is None:
                residual = prediction - target
            else:
                residual = standardized_away(prediction, target, center, units[place])
            if mask is not None:
                residual = residual.masked_fill_(~mask.unsqueeze(-1), 0)
            if (finite := self.finite[place]) is not None:
                residual = residual.masked_fill_(~finite, 0)
            squares.append(sum_of_squares(residual))
        return squares

    def _q_var(self, channels: EndToEnd, constant: Tensor | None) -> Tensor:
        trained = [x.trained_var() for x in self.losses if x.trained_var is not None]
        if trained:
            var = channels.join(trained)
        else:  # a copy, which no update changes
            var = channels.join([x.running_var.var for x in self.losses]).clamp(min=self.floor)
        return var if constant is None else var.masked_fill(constant, 1)

    def _reduced(self, nll: Tensor, count: int | Tensor, size: int, left_out: float) -> Tensor:
        """Returns the loss of a pair from that of one position of each channel."""
        if self.reduction == "mean":
            value = nll.mean()
            return value if isinstance(count, int) and count else value * (count > 0)
        divisor = max(size, 1) if self.reduction == "batchmean" else 1
        return nll.sum() * (count * left_out / divisor)

    def _of_samples(
        self, channels: EndToEnd, squares: Sequence[Tensor], var: Tensor, constant: Tensor | None
    ) -> list[Tensor]:
        """Returns the loss of each sample, ``(N,)``, of each pair."""
        dead = None if constant is None else channels.split(constant)
        values = []
        for place, (squared, of) in enumerate(zip(squares, channels.split(var), strict=True)):
            squared = squared if dead is None else squared.masked_fill(dead[place], 0)
            mask = self.masks[place]
            count = self.counts[place] // max(len(squared), 1) if mask is None else mask.sum(1)
            nll = 0.5 * (count * of.log().sum() + (squared / of).sum(1))
            values.append(self.left_out[place] * nll)
        return values

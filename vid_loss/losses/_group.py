"""Pairs that are computed together: what is one number per channel, for all of them in one go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from vid_loss.guards import no_autocast

from ._base import without_padding
from ._scale import LEAST_SHARE, is_constant, standardized_away
from ._variance import sum_of_squares
from .layouts import as_tokens, compute_dtype

if TYPE_CHECKING:
    from .vid import VIDLoss

_OF_INPUTS = (TypeError, ValueError, RuntimeError)  # and not that a device is out of memory, say


class Selected(NamedTuple):
    """Of a pair's features, what the loss takes."""

    student: Tensor  # as the head takes it
    head_mask: Tensor | None  # (N, L) or (N, H, W), boolean, for a head that takes one
    target: Tensor  # the teacher's; a map with a mask is tokens (N, L, C)
    mask: Tensor | None  # (N, L), boolean: what counts
    left_out: float  # how many positions there are for each that was taken


class Group:
    """Pairs that differ in nothing but their features; vectors have all their channels.

    Args:
        one: the loss of any of them.
        joined: whether the batch is that of all processes.
    """

    def __init__(self, one: VIDLoss, joined: bool) -> None:
        self.training, self.standardize = one.training, one.standardize
        self.reduction, self.joined = one.reduction, joined
        self.momentum, self.floor = one.running_var.momentum, one.running_var.floor
        self.may_be_empty = False
        self.pairs: list[tuple[nn.Module, Selected, Tensor | None, Any]] = []
        self.names: list[str] = []
        self.counts: list[Any] = []  # of positions: all numbers, or all tensors that are not read
        self.totals: list[Any] = []  # the same, of all processes
        self.divisors: list[Any] = []  # the counts, 1 at least
        self.per_sample: list[Any] = []  # the counts of each sample, if they are needed
        self.left_out: list[float] = []
        self.sizes: list[int] = []  # channels
        self.positions: list[Tensor] = []  # the pairs' buffers
        self.means: list[Tensor] = []
        self.variances: list[Tensor] = []
        self.residuals: list[Tensor] = []
        self.trained: list[Tensor] = []

    def nll(self) -> dict[str, Tensor]:
        """Returns the losses of the pairs, by name."""
        self.join: Callable[..., Tensor] = torch.cat if len(self.sizes) > 1 else itemgetter(0)
        self.total = sum(self.sizes)
        exact = no_autocast(self.means[0])
        with exact:
            estimates = [*self.positions, *self.means, *self.variances, *self.residuals]
            joined = torch.cat(estimates).split_with_sizes([self.total] * 4)
            positions, mean, var, residual = joined
            taken = share = None
            if self.training:
                mean, var, taken, share = self._take_in(positions, mean, var)
            constant = is_constant(mean, var) if self.standardize else None
            unit = None if constant is None else var.rsqrt().masked_fill_(constant, 0)
        squares, sums = self._squares(exact, mean, unit)
        with exact:
            mean_squares = self.join(torch._foreach_div(sums, self.divisors))
            if taken is not None and share is not None:
                idle = ~taken if constant is None else constant >= taken  # or not taken
                weight = share.clamp(min=self.momentum).masked_fill_(idle, 0)
                residual = self._take_in_squares(residual, mean_squares.detach(), weight)
            q_var = self.join(self.trained) if self.trained else residual.clamp(min=self.floor)
            # Equation (4), per position. A channel that never changes teaches nothing.
            nll = torch.addcdiv(0.5 * q_var.log(), mean_squares, q_var, value=0.5)
            nll = nll if constant is None else nll.masked_fill(constant, 0)
            return self._by_name(nll, squares, q_var, constant)

    def _by_name(
        self, nll: Tensor, squares: Sequence[Tensor], var: Tensor, constant: Tensor | None
    ) -> dict[str, Tensor]:
        """Returns the loss of each pair from that of a position of each channel."""
        values = {}
        for i, (name, part) in enumerate(
            zip(self.names, nll.split_with_sizes(self.sizes), strict=True)
        ):
            if self.reduction == "none":
                value = self._of_samples(i, squares[i], var, constant)
            elif self.reduction == "mean":
                value = part.mean() * (self.counts[i] > 0) if self.may_be_empty else part.mean()
            else:
                samples = max(len(squares[i]), 1) if self.reduction == "batchmean" else 1
                value = part.sum() * (self.counts[i] * self.left_out[i] / samples)
            values[name] = value
        return values

    def _take_in(
        self, positions: Tensor, old_mean: Tensor, old_var: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Has the teachers' scales take the batch in.

        Returns:
            Mean and variance by now, whether the batch was taken, and which share of all positions
            so far it is.
        """
        with torch.no_grad():
            mean, var = self._moments()
            if self.joined:
                mean, var = self._of_all(mean, var)
            mean, var = mean.to(old_mean.dtype), var.to(old_var.dtype)
            # One operation where isfinite() is four; what is not finite would stay for ever.
            taken = var < torch.inf
            counted = self._times(taken, self.totals or self.counts)
            taken = counted > 0 if self.may_be_empty else taken
            positions = positions + counted
            share = (counted / positions.clamp(min=1)).clamp_(min=LEAST_SHARE)
            mean, var = torch.where(taken, mean, old_mean), torch.where(taken, var, old_var)
            away = mean - old_mean
            new_mean = old_mean.lerp(mean, share)  # exact where the share is 1, of the first batch
            new_var = old_var.lerp(torch.addcmul(var, away, mean - new_mean), share)
            new = torch.cat((positions, new_mean, new_var))
            self._store(new, [*self.positions, *self.means, *self.variances])
        return new_mean, new_var, taken, share

    def _moments(self) -> tuple[Tensor, Tensor]:
        """Returns the batch's mean and variance of each channel; the latter in two passes.

        In one, sums of squares would lose the variance of a channel whose mean is large.
        """
        means, squares = [], []
        for (_, selected, _, _), divisor in zip(self.pairs, self.divisors, strict=True):
            target, mask = selected.target, selected.mask
            dims = (0, 2, 3) if target.ndim == 4 else tuple(range(target.ndim - 1))
            if mask is not None:
                target = without_padding(target, mask)  # it may be NaN there
            wide = None if target.dtype == torch.float32 else compute_dtype(target)
            if mask is None and target.numel():
                mean = target.mean(dims, dtype=wide)
            else:  # of none 0, where mean() would be NaN
                mean = target.sum(dims, dtype=wide) / divisor
            centered = target - (mean.view(-1, 1, 1) if target.ndim == 4 else mean)
            if mask is not None:
                centered.masked_fill_(~mask.unsqueeze(-1), 0)
            if target.ndim == 4:
                squares.append(torch.linalg.vector_norm(centered, dim=(2, 3)).square_().sum(0))
            else:
                squares.append(centered.square_().sum(dims))
            means.append(mean)
        variances = torch._foreach_div(squares, self.divisors)
        mean, var = torch.cat([*means, *variances]).split_with_sizes([self.total] * 2)
        return mean, var

    def _of_all(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the moments of all processes' batches together, and notes how many they had."""
        # In float64, which has digits enough for the squared means.
        mean64, var64 = mean.double(), var.double()
        weight = self._times(torch.ones_like(mean64), self.counts)
        sums = torch.stack([weight, weight * mean64, weight * (var64 + mean64.square())])
        torch.distributed.all_reduce(sums)
        weight, first, second = sums.unbind()
        self.totals = [x[0].to(mean) for x in weight.split_with_sizes(self.sizes)]
        divisor = weight.clamp(min=1)
        joined_mean = first / divisor
        return joined_mean, (second / divisor - joined_mean.square()).clamp(min=0)

    def _squares(
        self, exact: AbstractContextManager[Any], mean: Tensor, unit: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Returns each sample's sum of squared residuals, ``(N, C)`` by pair, and all samples'.

        Heads speak one after the other: what one says, and what it was given, is freed when its
        residual is there.
        """
        means = mean.split_with_sizes(self.sizes)
        units = None if unit is None else unit.split_with_sizes(self.sizes)
        squares, sums = [], []
        for i in range(len(self.sizes)):
            head, (student, head_mask, target, mask, _), finite, named = self.pairs.pop(0)
            try:
                said = head(student) if head_mask is None else head(student, head_mask)
            except _OF_INPUTS as error:
                if named is None or type(error) not in _OF_INPUTS:
                    raise
                raise named(error) from error
            with exact:
                said = as_tokens(said) if mask is not None and said.ndim == 4 else said
                if not said.dtype == target.dtype == torch.float32:
                    said = said.to(compute_dtype(said, target))
                if units is None:
                    residual = said - target
                else:
                    residual = standardized_away(said, target, means[i], units[i])
                del said, target
                if mask is not None:
                    residual = residual.masked_fill_(~mask.unsqueeze(-1), 0)
                if finite is not None:
                    residual = residual.masked_fill_(~finite, 0)
                squares.append(sum_of_squares(residual))
                sums.append(squares[-1].sum(0))
        return squares, sums

    def _of_samples(
        self, place: int, squares: Tensor, var: Tensor, constant: Tensor | None
    ) -> Tensor:
        """Returns the loss of each sample of a pair, ``(N,)``."""
        var = var.split_with_sizes(self.sizes)[place]
        count = torch.as_tensor(self.per_sample[place], device=var.device).view(-1, 1)
        nll = 0.5 * (count * var.log() + squares / var)
        if constant is not None:
            nll = nll.masked_fill(constant.split_with_sizes(self.sizes)[place], 0)
        return self.left_out[place] * nll.sum(1)

    def _take_in_squares(self, old: Tensor, squares: Tensor, weight: Tensor) -> Tensor:
        """Has the variances take the batch in.

        Args:
            old: the running means of squared residuals.
            squares: the batch's, averaged over samples and positions.
            weight: what it counts for.
        """
        with torch.no_grad():
            if self.joined:
                sums = self._times(squares, self.counts)
                torch.distributed.all_reduce(sums)
                squares = sums / self._times(torch.ones_like(sums), self.totals).clamp(min=1)
            squares = squares.to(old.dtype)
            new = old.lerp(torch.where(squares < torch.inf, squares, old), weight)
            self._store(new, self.residuals)
        return new

    def _times(self, vector: Tensor, factors: Sequence[Any]) -> Tensor:
        """Returns a vector whose parts are multiplied by a number each."""
        parts = list(vector.split_with_sizes(self.sizes))
        return self.join(torch._foreach_mul(parts, list(factors)))

    def _store(self, vector: Tensor, into: list[Tensor]) -> None:
        """Copies the parts of a vector into the buffers that they came from."""
        sizes = self.sizes * (len(into) // len(self.sizes))
        torch._foreach_copy_(into, list(vector.split_with_sizes(sizes)))

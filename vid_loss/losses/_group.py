"""Pairs that are computed together: what is one number per channel, for all of them in one go."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from vid_loss.guards import no_autocast

from ._base import without_padding
from ._scale import LEAST_SHARE, is_constant, standardized_away
from ._variance import sum_of_squares
from .gaussian import log_and_scale
from .layouts import as_tokens, compute_dtype

if TYPE_CHECKING:
    from .vid import VIDLoss


class Selected(NamedTuple):
    """Of a pair's features, what the loss takes."""

    student: Tensor  # as the head takes it
    head_mask: Tensor | None  # (N, L) or (N, H, W), boolean, for a head that takes one
    target: Tensor  # the teacher's; a map with a mask is tokens (N, L, C)
    mask: Tensor | None  # (N, L), boolean: what counts
    left_out: float  # how many positions there are for each that was taken


class Group:
    """Pairs whose losses have the same options. Tensors over channels have those of all in a row.

    Args:
        one: the loss of any of them.
        joined: whether the batch is that of all processes.
    """

    def __init__(self, one: VIDLoss, joined: bool) -> None:
        self.training, self.standardize = one.training, one.standardize
        self.reduction, self.joined = one.reduction, joined
        self.momentum, self.floor = one.running_var.momentum, one.running_var.floor
        self.may_be_empty = False
        self.pairs: list[tuple[nn.Module, Selected, Any]] = []
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

    def nll(self, infinite: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the losses of the pairs, by name.

        In train mode the estimates take the batch in, all of them, after the last head has spoken.

        Args:
            infinite: whether a pair's teacher's feature is not finite, ``()``; of all or of none.
        """
        self.infinite = infinite if self.names[0] in infinite else {}
        self.join: Callable[..., Tensor] = torch.cat if len(self.sizes) > 1 else itemgetter(0)
        self.total = sum(self.sizes)
        buffers = [*self.positions, *self.means, *self.variances, *self.residuals]
        exact = no_autocast(self.means[0])
        with exact, torch.no_grad():
            estimates = torch.cat(buffers).split_with_sizes([self.total] * 4)
            positions, mean, var, residual = estimates
            if self.training:
                positions, mean, var, taken, share = self._taken_in(positions, mean, var)
            constant = is_constant(mean, var) if self.standardize else None
            unit = None if constant is None else var.rsqrt().masked_fill_(constant, 0)
        squares, sums = self._squares(exact, mean, unit)
        with exact, torch.no_grad():
            if self.training:
                idle = ~taken if constant is None else constant >= taken  # or not taken
                weight = share.clamp(min=self.momentum).masked_fill_(idle, 0)
                residual = self._squares_taken_in(residual, sums, weight)
                new = torch.cat((positions, mean, var, residual))
                torch._foreach_copy_(buffers, list(new.split_with_sizes(self.sizes * 4)))
            of_pairs = None if constant is None else constant.split_with_sizes(self.sizes)
            if not self.trained:
                var = residual.clamp(min=self.floor)
                half_log, scale = log_and_scale(var, self._times(var, self.divisors), constant)
                half_logs = half_log.split_with_sizes(self.sizes)
                scales = scale.split_with_sizes(self.sizes)
        values = {}
        with exact:
            # Each pair has a graph of its own, so that NaN in one is not in the others.
            for i, name in enumerate(self.names):
                if self.trained:
                    var, dead = self.trained[i], None if of_pairs is None else of_pairs[i]
                    half_log, scale = log_and_scale(var, var * self.divisors[i], dead)
                else:
                    half_log, scale = half_logs[i], scales[i]
                values[name] = self._value(i, half_log, scale, squares[i], sums[i])
        return values

    def _value(
        self, i: int, half_log: Tensor, scale: Tensor, squares: Tensor, sums: Tensor
    ) -> Tensor:
        """Returns the loss of a pair: equation (4).

        Args:
            i: its place.
            half_log: log of q's standard deviations, ``(C,)``.
            scale: q's variances times the number of positions.
            squares: each sample's sum of squared residuals, ``(N, C)``.
            sums: that of all samples.
        """
        if self.reduction == "none":
            count = torch.as_tensor(self.per_sample[i], device=scale.device).view(-1, 1)
            of_samples: Tensor = count * half_log + 0.5 * squares / (scale / self.divisors[i])
            return of_samples.sum(1).mul(self.left_out[i])
        nll = torch.addcdiv(half_log, sums, scale, value=0.5)  # per position
        if self.reduction == "mean":
            return nll.mean().mul(self.counts[i] > 0) if self.may_be_empty else nll.mean()
        samples = max(len(squares), 1) if self.reduction == "batchmean" else 1
        return nll.sum().mul(self.counts[i] * self.left_out[i] / samples)

    def _taken_in(self, positions: Tensor, old_mean: Tensor, old_var: Tensor) -> tuple[Tensor, ...]:
        """Returns the estimates with the batch: positions, mean, variance.

        Then whether a channel's batch was taken, and which share of all positions so far it is.
        """
        mean, var = self._moments()
        lost = None
        if self.infinite:
            of_pairs = zip(self.names, self.sizes, strict=True)
            lost = self.join([self.infinite[name].expand(size) for name, size in of_pairs])
        if self.joined:
            mean, var = self._of_all(mean, var, lost)
        mean, var = mean.to(old_mean.dtype), var.to(old_var.dtype)
        # One operation where isfinite() is four; what is not finite would stay for ever.
        taken = var < torch.inf
        taken = taken if lost is None or self.joined else taken.masked_fill_(lost, False)
        counted = self._times(taken.to(var.dtype), self.totals or self.counts)
        taken = counted > 0 if self.may_be_empty else taken
        positions = positions + counted
        share = (counted / positions.clamp(min=1)).clamp_(min=LEAST_SHARE)
        mean, var = torch.where(taken, mean, old_mean), torch.where(taken, var, old_var)
        away = mean - old_mean
        new_mean = old_mean.lerp(mean, share)  # exact where the share is 1, of the first batch
        new_var = old_var.lerp(var, share).addcmul_(share * away, mean - new_mean)
        return positions, new_mean, new_var, taken, share

    def _moments(self) -> tuple[Tensor, Tensor]:
        """Returns the batch's mean and variance of each channel; the latter in two passes.

        In one, sums of squares would lose the variance of a channel whose mean is large.
        """
        means, squares = [], []
        for (_, selected, _), divisor in zip(self.pairs, self.divisors, strict=True):
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

    def _of_all(self, mean: Tensor, var: Tensor, lost: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns the moments of all processes' batches together, and notes how many they had."""
        # In float64, which has digits enough for the squared means.
        ones = mean.new_ones(self.total, dtype=torch.float64)
        weight = self._times(ones if lost is None else ones.masked_fill_(lost, 0), self.counts)
        mean, var = (torch.where(weight > 0, x.double(), 0) for x in (mean, var))
        sums = torch.stack([weight, weight * mean, weight * (var + mean.square())])
        torch.distributed.all_reduce(sums)
        weight, first, second = sums.unbind()
        self.totals = [x[0].float() for x in weight.split_with_sizes(self.sizes)]
        divisor = weight.clamp(min=1)
        mean = first / divisor
        return mean, (second / divisor - mean.square()).clamp(min=0)

    def _squares(
        self, exact: AbstractContextManager[Any], mean: Tensor, unit: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Returns each sample's sum of squared residuals, ``(N, C)`` by pair, and all samples'.

        Heads run one at a time, so that each one's input and output are freed once its residual
        exists.
        """
        means = mean.split_with_sizes(self.sizes)
        units = None if unit is None else unit.split_with_sizes(self.sizes)
        squares, sums = [], []
        for i, name in enumerate(self.names):
            head, (student, head_mask, target, mask, _), named = self.pairs.pop(0)
            try:
                said = head(student) if head_mask is None else head(student, head_mask)
                with exact:
                    said = as_tokens(said) if mask is not None and said.ndim == 4 else said
                    if not said.dtype == target.dtype == torch.float32:
                        said = said.to(compute_dtype(said, target))
                    if units is None:
                        residual = said - target
                    else:
                        residual = standardized_away(said, target, means[i], units[i])
            except (TypeError, ValueError, RuntimeError) as error:
                found = error if named is None else named(error, student, target)
                if found is error:
                    raise
                raise found from error
            del said, student, target
            with exact:
                if mask is not None:
                    residual = residual.masked_fill_(~mask.unsqueeze(-1), 0)
                if self.infinite:
                    residual = residual.masked_fill_(self.infinite[name], 0)
                squares.append(sum_of_squares(residual))
                sums.append(squares[-1].sum(0))
        return squares, sums

    def _squares_taken_in(self, old: Tensor, sums: list[Tensor], weight: Tensor) -> Tensor:
        """Returns the running means of squared residuals with the batch, of a certain weight."""
        if self.joined:
            of_all = self.join(sums).double()
            torch.distributed.all_reduce(of_all)
            squares = of_all / self._times(torch.ones_like(of_all), self.totals).clamp(min=1)
        else:
            squares = self.join(torch._foreach_div(sums, self.divisors))
        squares = squares.to(old.dtype)
        return old.lerp(torch.where(squares < torch.inf, squares, old), weight)

    def _times(self, vector: Tensor, factors: Sequence[Any]) -> Tensor:
        """Returns a vector whose parts are multiplied by a number each."""
        parts = list(vector.split_with_sizes(self.sizes))
        return self.join(torch._foreach_mul(parts, list(factors)))

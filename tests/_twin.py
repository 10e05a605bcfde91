"""VIDLoss's default form, slow and readable: from all batches so far, in float64."""

import copy

import torch
from torch import Tensor


class Twin:
    """Keeps every batch, and computes mean, variance and loss from them element by element.

    Args:
        head: the mean network; copied, so that a batch norm counts its own steps.
        momentum: share of the newest batch in the variance of q.
        floor: the least variance.
    """

    def __init__(self, head: torch.nn.Module, momentum: float = 0.05, floor: float = 1e-4) -> None:
        self.head = copy.deepcopy(head).double()
        self.momentum, self.floor = momentum, floor
        self.seen: list[Tensor] = []
        self.var: Tensor | None = None

    def __call__(
        self, student: Tensor, teacher: Tensor, mask: Tensor | None = None, reduction: str = "mean"
    ) -> Tensor:
        """Returns the loss of the next batch; maps must be of one size."""
        valid = torch.ones(self._last(teacher).shape[:-1], dtype=torch.bool)
        if mask is not None:
            valid = mask.bool()
        target = self._last(teacher.double())
        mean = self.head(student.double()) if mask is None else self.head(student.double(), mask)
        mean = self._last(mean)
        self.seen.append(target[valid].detach())
        positions = torch.cat(self.seen)
        if not len(positions):  # and so nothing in this batch counts either
            zeros = 0 * mean.flatten(1).sum(1)
            return zeros if reduction == "none" else zeros.sum()
        var = positions.var(0, correction=0)
        alive = var > 1e-12 * positions.mean(0).square()
        # Not 0 where it is not used: 0 / 0 is NaN.
        deviation = torch.where(alive, var, 1).sqrt()
        residual = (target - positions.mean(0)) / deviation - mean
        self._take(residual[valid].detach().square(), len(positions), alive)
        q_var = torch.where(alive, self.var.clamp(min=self.floor), 1)
        nll = q_var.sqrt().log() + residual.square() / (2 * q_var)
        nll = torch.where(valid.unsqueeze(-1) & alive, nll, 0).flatten(1)
        if reduction == "mean":
            return nll.sum() / max(int(valid.sum()) * target.shape[-1], 1)
        samples = nll.sum(1)
        return {"sum": samples.sum(), "batchmean": samples.mean(), "none": samples}[reduction]

    def _take(self, squares: Tensor, total: int, alive: Tensor) -> None:
        if self.var is None:
            self.var = torch.ones(squares.shape[-1], dtype=torch.float64)
        if len(squares):
            weight = max(len(squares) / total, self.momentum)
            moved = self.var + weight * (squares.mean(0) - self.var)
            self.var = torch.where(alive, moved, self.var)

    @staticmethod
    def _last(feature: Tensor) -> Tensor:
        """Moves the channels of a map to the end."""
        return feature.movedim(1, -1) if feature.ndim == 4 else feature

"""The Gaussian q(t|s) of the paper, equations (3) and (4)."""

import math
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layouts import channels_of, compute_dtype

Reduction = Literal["mean", "batchmean", "sum", "none"]


def gaussian_nll(
    mean: Tensor,
    target: Tensor,
    var: Tensor,
    *,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Negative log-likelihood of the teacher's feature, ``-log q(t|s)``.

    Equations (3) and (4) of the paper, with :math:`\mu = \mu(s)`:

    .. math:: \sum_c \sum_{hw} \Big[\log\sigma_c + \frac{(t_{chw} - \mu_{chw})^2}{2\sigma_c^2}\Big]

    The constant ``log(2 * pi) / 2`` an element is left out, as in the paper. Only each channel's
    sum of squared residuals is needed, so the residual is the one map that is formed and kept
    for backward. Everything is computed in float32 or wider, whatever the inputs and autocast.

    Args:
        mean: ``(N, C)``, tokens ``(N, L, C)`` or maps ``(N, C, H, W)``: what the head predicts.
        target: the teacher's feature, of the same shape.
        var: ``(C,)``, the variance of each channel, positive.
        mask: ``(N, L)`` for tokens, nonzero at those that count. The others change nothing,
            not even if they are NaN.
        reduction: ``'mean'`` is per element, so that a weight means the same for every layer.
            ``'batchmean'`` is the paper's: summed over the feature, averaged over the batch.
            ``'none'`` has one value a sample, summed over its feature. For N samples of E
            elements each, ``sum = none.sum() = N * batchmean`` and ``batchmean = E * mean``.
            With a mask, ``mean`` counts only the elements of valid tokens, all the batch's
            together; it is 0 when there are none.

    Returns:
        The value in nats: a scalar, or ``(N,)`` for ``'none'``.

    Raises:
        ValueError: if the shapes disagree or the reduction is unknown.

    Example:
        >>> gaussian_nll(torch.zeros(1, 2), torch.tensor([[1.0, 2.0]]), torch.ones(2))
        tensor(1.2500)
    """
    return nll_and_residuals(mean, target, var, mask=mask, reduction=reduction)[0]


def nll_and_residuals(
    mean: Tensor, target: Tensor, var: Tensor, *, mask: Tensor | None, reduction: Reduction
) -> tuple[Tensor, Tensor]:
    """Returns :func:`gaussian_nll`, and the sums of squared residuals it is made of, ``(N, C)``."""
    _check_arguments(mean, target, var, mask, reduction)
    dtype = compute_dtype(mean, target)
    with torch.autocast(mean.device.type, enabled=False):
        residual = mean.to(dtype) - target
        if mask is not None:
            mask = mask.bool()
            residual = residual.masked_fill_(~mask.unsqueeze(-1), 0)
        squared = _sum_of_squares(residual)
        var = var.to(dtype)
        positions = math.prod(residual.shape[1:]) // len(var)
        count = positions if mask is None else mask.sum(dim=1)
        nll = 0.5 * (count * var.log().sum() + (squared / var).sum(dim=1))
        return _reduce(nll, residual, mask, reduction), squared


def _sum_of_squares(residual: Tensor) -> Tensor:
    """Sums ``residual ** 2`` over positions, to ``(N, C)``."""
    if residual.ndim == 2:
        return residual.square()
    if residual.ndim == 3:
        squared: Tensor = _SumOfSquares.apply(residual, 1)
    else:
        squared = _SumOfSquares.apply(residual.flatten(2), 2)
    return squared


class _SumOfSquares(torch.autograd.Function):
    """Reads the map once in forward and once in backward, and keeps it alone.

    ``(r * r).sum()`` would write a second map of the same size. The norm has no such map, but its
    own backward passes three times over the residual; and a norm over batch and positions at once
    accumulates its rounding (1e-5 on 128 x 32 x 32 x 32, against 1e-7).
    """

    @staticmethod
    def forward(residual: Tensor, dim: int) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(residual, dim=dim)
        return norm.square_()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        residual, ctx.dim = inputs
        ctx.save_for_backward(residual)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (residual,) = ctx.saved_tensors
        return residual * (2 * gradient).unsqueeze(ctx.dim), None


def _reduce(nll: Tensor, residual: Tensor, mask: Tensor | None, reduction: Reduction) -> Tensor:
    if reduction == "none":
        return nll
    total: Tensor = nll.sum()
    if reduction == "sum":
        return total
    divisor: int | Tensor = len(nll) if reduction == "batchmean" else residual.numel()
    if reduction == "mean" and mask is not None:
        divisor = mask.sum() * residual.shape[-1]
    # A tensor where a mask decides: reading it would make the host wait for the device.
    return total / (divisor.clamp(min=1) if isinstance(divisor, Tensor) else max(divisor, 1))


def _check_arguments(
    mean: Tensor, target: Tensor, var: Tensor, mask: Tensor | None, reduction: str
) -> None:
    if reduction not in get_args(Reduction):
        raise ValueError(
            f"gaussian_nll, reduction: expected one of {get_args(Reduction)}; got {reduction!r}."
        )
    if mean.shape != target.shape:
        raise ValueError(
            "gaussian_nll: expected mean and target of one shape; got "
            f"{tuple(mean.shape)} and {tuple(target.shape)}. Nothing is broadcast."
        )
    channels = channels_of(mean.shape)
    if var.shape != (channels,):
        raise ValueError(
            f"gaussian_nll, var: expected one variance a channel, shape ({channels},); got "
            f"{tuple(var.shape)} for features of shape {tuple(mean.shape)}."
        )
    if mask is not None and (mean.ndim != 3 or mask.shape != mean.shape[:2]):
        raise ValueError(
            "gaussian_nll, mask: expected tokens (N, L, C) and a mask (N, L); got "
            f"{tuple(mean.shape)} and {tuple(mask.shape)}."
        )


class ChannelVariance(nn.Module):
    """One trained variance a channel, ``softplus(raw_var) + floor``.

    The floor bounds what a channel that the teacher never uses can do to the gradient.

    Args:
        channels: number of channels C of the teacher's feature.
        init_var: the variance to start from, above ``floor``.
        floor: the least variance, above 0.

    Raises:
        ValueError: if ``init_var`` or ``floor`` is out of range.

    Example:
        >>> ChannelVariance(2, init_var=5.0)()
        tensor([5.0000, 5.0000], grad_fn=<AddBackward0>)
    """

    def __init__(self, channels: int, *, init_var: float = 5.0, floor: float = 1e-5) -> None:
        super().__init__()
        if not 0 < floor < math.inf:
            raise ValueError(f"var_floor: expected a positive number; got {floor}.")
        if not floor < init_var < math.inf:
            raise ValueError(
                f"init_var: expected a number above the floor {floor}; got {init_var}."
            )
        start = init_var - floor
        # The inverse of softplus, in the form that overflows for no start.
        raw = start + math.log(-math.expm1(-start))
        self.raw_var = nn.Parameter(torch.full((channels,), raw))
        self.floor = floor

    def forward(self) -> Tensor:
        """Returns the variances, ``(C,)``, in float32 or wider."""
        raw_var = self.raw_var.to(compute_dtype(self.raw_var))
        return F.softplus(raw_var) + self.floor

    def extra_repr(self) -> str:
        """Shows the width and the floor in ``print(model)``."""
        return f"{self.raw_var.numel()}, floor={self.floor}"

"""The Gaussian q(t|s) of the paper, equations (3) and (4)."""

import math
from collections.abc import Sequence
from typing import Literal, get_args

from torch import Tensor

from vid_loss.guards import no_autocast

from ._variance import sum_of_squares
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
        TypeError: if one of them is no tensor.
        ValueError: if the shapes disagree or the reduction is unknown.

    Example:
        >>> import torch
        >>> gaussian_nll(torch.zeros(1, 2), torch.tensor([[1.0, 2.0]]), torch.ones(2))
        tensor(1.2500)
    """
    _check_arguments(mean, target, var, mask, reduction)
    dtype = compute_dtype(mean, target)
    with no_autocast(mean):
        residual = mean.to(dtype) - target
        if mask is not None:
            mask = mask.bool()
            residual = residual.masked_fill_(~mask.unsqueeze(-1), 0)
        squared = sum_of_squares(residual)
        squared = squared if reduction == "none" else squared.sum(0)
        return _nll_of_squares(squared, var.to(dtype), residual.shape, mask, reduction)


def _nll_of_squares(
    squared: Tensor, var: Tensor, shape: Sequence[int], mask: Tensor | None, reduction: Reduction
) -> Tensor:
    """Returns :func:`gaussian_nll` from sums of squared residuals over the positions that count.

    Args:
        squared: ``(C,)``, of the whole batch; with reduction ``'none'`` of each sample, ``(N, C)``.
        var: ``(C,)``.
        shape: of the feature.
        mask: ``(N, L)`` for tokens, boolean.
        reduction: as in :func:`gaussian_nll`.
    """
    channels = var.shape[0]
    if reduction == "none":
        of_sample = math.prod(shape) // max(squared.numel(), 1)
        positions = of_sample if mask is None else mask.sum(dim=1)
        return 0.5 * (positions * var.log().sum() + (squared / var).sum(dim=1))
    count: int | Tensor = math.prod(shape) // max(channels, 1) if mask is None else mask.sum()
    divisor: int | Tensor = {"sum": 1, "batchmean": shape[0]}.get(reduction, count * channels)
    total: Tensor = (squared / var + count * var.log()).sum()
    # A tensor where a mask decides: reading it would make the host wait for the device.
    least = divisor.clamp(min=1) if isinstance(divisor, Tensor) else max(divisor, 1)
    return total * (0.5 / least)


def log_and_scale(var: Tensor, scale: Tensor, constant: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns equation (4)'s logarithm and divisor; a channel that never changes adds nothing."""
    half_log = 0.5 * var.log()
    if constant is None:
        return half_log, scale
    return half_log.masked_fill(constant, 0), scale.masked_fill(constant, math.inf)


def _check_arguments(
    mean: Tensor, target: Tensor, var: Tensor, mask: Tensor | None, reduction: str
) -> None:
    if reduction not in get_args(Reduction):
        raise ValueError(
            f"gaussian_nll, reduction: expected one of {get_args(Reduction)}; got {reduction!r}."
        )
    for argument, given in (("mean", mean), ("target", target), ("var", var), ("mask", mask)):
        if not isinstance(given, Tensor) and (given is not None or argument != "mask"):
            raise TypeError(
                f"gaussian_nll, {argument}: expected a tensor; got {given!r}. A variance of 1: "
                "var=torch.ones(channels)."
            )
    if mean.shape != target.shape:
        raise ValueError(
            "gaussian_nll: expected mean and target of one shape; got "
            f"{tuple(mean.shape)} and {tuple(target.shape)}. Nothing is broadcast."
        )
    channels = channels_of(mean.shape)
    if var.shape != (channels,):
        raise ValueError(
            f"gaussian_nll, var: expected one variance per channel, shape ({channels},); got "
            f"{tuple(var.shape)} for features of shape {tuple(mean.shape)}."
        )
    if mask is not None and (mean.ndim != 3 or mask.shape != mean.shape[:2]):
        raise ValueError(
            "gaussian_nll, mask: expected tokens (N, L, C) and a mask (N, L); got "
            f"{tuple(mean.shape)} and {tuple(mask.shape)}."
        )

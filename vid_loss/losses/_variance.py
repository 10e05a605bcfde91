"""Squared residuals, and the variance of q(t|s): fitted to them in closed form, or trained."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._scale import Estimates
from .layouts import compute_dtype


def sum_of_squares(residual: Tensor) -> Tensor:
    """Returns the sum of ``residual ** 2`` over positions, ``(N, C)``."""
    if residual.ndim == 2:
        return residual.square()
    dims = (1,) if residual.ndim == 3 else tuple(range(2, residual.ndim))
    # A compiler writes no second map, and that of torch 2.11 has once made the Function's gradient
    # 0; torch.func differentiates what it can see.
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return residual.square().sum(dims)
    squared: Tensor = _SumOfSquares.apply(residual, dims)
    return squared


class _SumOfSquares(torch.autograd.Function):
    """Reads the map once in forward and once in backward, and keeps it alone.

    ``(r * r).sum()`` would write a second map of the same size. The norm has no such map, but its
    own backward passes three times over the residual; and a norm over batch and positions at once
    accumulates its rounding (1e-5 on 128 x 32 x 32 x 32, against 1e-7).
    """

    @staticmethod
    def forward(ctx: Any, residual: Tensor, dims: tuple[int, ...]) -> Tensor:
        # With a setup_context() of its own, torch would look up the signature in every call.
        ctx.dims = dims
        ctx.save_for_backward(residual)
        norm: Tensor = torch.linalg.vector_norm(residual, dim=dims)
        return norm.square()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (residual,) = ctx.saved_tensors
        gradient = 2 * gradient
        for dim in ctx.dims:
            gradient = gradient.unsqueeze(dim)
        return residual * gradient, None


class RunningVariance(Estimates):
    r"""Mean squared residual of each channel: the variance that maximizes the likelihood.

    The inner maximization of the paper's bound over q's variance, done exactly instead of by
    gradient: :math:`\\partial / \\partial \\sigma_c^2` of equation (4) is 0 where
    :math:`\\sigma_c^2` is the mean of :math:`(t_c - \\mu_c)^2`. Running, because a batch alone is
    noisy. It needs no start value, no learning rate and no optimizer's state; the first batches
    count equally.

    Args:
        channels: number of channels C.
        momentum: share of the newest batch, above 0 and at most 1.
        floor: the least variance, above 0.

    Attributes:
        var: the estimate, ``(C,)``.
    """

    var: Tensor

    def __init__(self, channels: int, *, momentum: float, floor: float) -> None:
        super().__init__()
        if not isinstance(momentum, int | float) or not 0 < momentum <= 1:
            raise ValueError(
                f"VIDLoss, momentum: expected a number above 0, at most 1; got {momentum!r}."
            )
        if not isinstance(floor, int | float) or not 0 < floor < math.inf:
            raise ValueError(f"VIDLoss, var_floor: expected a positive number; got {floor!r}.")
        self.momentum = momentum
        self.floor = floor
        self.register_estimate("var", torch.ones(channels))

    def forward(self) -> Tensor:
        """Returns the variances, ``(C,)``, in float32 or wider: a copy, which no update changes."""
        return self.var.clamp(min=self.floor)

    def extra_repr(self) -> str:
        """Shows the settings in ``print(model)``."""
        return f"{len(self.var)}, momentum={self.momentum}, floor={self.floor}"


class TrainedVariance(nn.Module):
    """The paper's: one trained number per channel, ``softplus(raw_var) + floor``.

    The floor bounds what a channel that the teacher never uses can do to the gradient.

    Args:
        channels: number of channels C of the teacher's feature.
        init_var: the variance to start from, above ``floor``.
        floor: the least variance, above 0.

    Raises:
        ValueError: if ``init_var`` is out of range.

    Example:
        >>> TrainedVariance(2, init_var=5.0, floor=1e-5)()
        tensor([5.0000, 5.0000], grad_fn=<AddBackward0>)
    """

    def __init__(self, channels: int, *, init_var: float, floor: float) -> None:
        super().__init__()
        if not isinstance(init_var, int | float) or not floor < init_var < math.inf:
            raise ValueError(
                f"VIDLoss, init_var: expected a number above the floor {floor}; got {init_var!r}."
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

"""The VID loss of one pair of layers."""

from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor, nn

from .gaussian import ChannelVariance, Reduction, nll_and_residuals
from .heads import Norm, TokenHead, mean_head
from .layouts import align, channels_of, check_channels, check_same_kind, kind_of
from .stats import Observation, observe


class VIDLoss(nn.Module):
    r"""Variational Information Distillation for one pair: :math:`-\log q(t|s)`.

    One term of equation (2) of `Variational Information Distillation for Knowledge Transfer
    <https://arxiv.org/abs/1904.05835>`_: a Gaussian whose mean is a small network of the
    student's feature and whose variance is one trained number a channel. Minimising it raises a
    lower bound on the mutual information of the two features.

    Its parameters must be trained together with the student's.

    Args:
        student_shape: shape of the student's feature, the batch first: ``(N, C)``,
            ``(N, L, C)`` or ``(N, C, H, W)``. Only the layout and C matter.
        teacher_shape: shape of the teacher's feature, in the same layout.
        head: a mean network of your own, from the student's feature to the teacher's number of
            channels, instead of
            :func:`~vid_loss.losses.heads.mean_head`. Called with the feature alone.
        hidden_channels: width of the built-in head; the teacher's channels if None.
        norm: norm of the built-in head: ``'batch'``, ``'layer'``, ``'group'``, ``'none'``.
            None is batch norm for maps and layer norm for tokens.
        init_var: the variance to start from.
        var_floor: the least variance.
        reduction: see :func:`~vid_loss.losses.gaussian.gaussian_nll`.

    Attributes:
        observes: whether a forward leaves what :mod:`~vid_loss.losses.stats` needs; set it by
            ``Distiller(..., diagnose=)``.
        observation: what the last one left.

    Raises:
        ValueError: if the shapes are of different kinds or an option is out of range.

    Example:
        >>> loss = VIDLoss((8, 16, 4, 4), (8, 32, 4, 4))
        >>> value = loss(torch.randn(8, 16, 4, 4), torch.randn(8, 32, 4, 4))
        >>> value.shape
        torch.Size([])
    """

    # Measured in tests of lambda on Fashion-MNIST with 10 images a class (WRN-16-2 -> WRN-10-1,
    # reduction 'mean'): 0.1, 1, 10, 100 gave 68.1, 72.2, 82.4, 82.1 %. A variance started at 1
    # instead of 5 made no difference beyond the seeds' spread (83.0 and 82.7 %).
    default_weight = 10.0

    def __init__(
        self,
        student_shape: Sequence[int],
        teacher_shape: Sequence[int],
        *,
        head: nn.Module | None = None,
        hidden_channels: int | None = None,
        norm: Norm | None = None,
        init_var: float = 5.0,
        var_floor: float = 1e-5,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        if reduction not in get_args(Reduction):
            raise ValueError(
                f"reduction: expected one of {get_args(Reduction)}; got {reduction!r}."
            )
        check_same_kind(student_shape, teacher_shape)
        self.student_channels = channels_of(student_shape)
        self.teacher_channels = channels_of(teacher_shape)
        if head is not None and (hidden_channels is not None or norm is not None):
            raise ValueError(
                "hidden_channels and norm: expected None beside a head of your own; got "
                f"{hidden_channels} and {norm!r}."
            )
        self.head = head or mean_head(
            student_shape, teacher_shape, hidden_channels=hidden_channels, norm=norm
        )
        self.variance = ChannelVariance(self.teacher_channels, init_var=init_var, floor=var_floor)
        self.reduction: Reduction = reduction
        # Plain attributes and no buffers: nothing to save, shard or broadcast.
        self.observes = False
        self.observation: Observation | None = None

    def forward(
        self, student_feature: Tensor, teacher_feature: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Returns ``-log q(t|s)`` in nats, without its constant.

        Args:
            student_feature: ``(N, C_s)``, ``(N, L, C_s)`` or ``(N, C_s, H, W)``.
            teacher_feature: the same layout with ``C_t`` channels; resolutions of maps may differ.
            mask: ``(N, L)`` for tokens, nonzero at those that count.

        Raises:
            TypeError: if a feature is not floating point.
            ValueError: if a shape is not the one that this loss was built for.
        """
        student_feature, teacher_feature = align(student_feature, teacher_feature, mask)
        check_channels("student", student_feature, self.student_channels)
        check_channels("teacher", teacher_feature, self.teacher_channels)
        mean, var = self._mean(student_feature, mask), self.variance()
        nll, residuals = nll_and_residuals(
            mean, teacher_feature, var, mask=mask, reduction=self.reduction
        )
        if self.observes:
            self.observation = observe(residuals, teacher_feature, var, mask, self.variance.floor)
        return nll

    @torch.no_grad()
    def log_likelihood(self, student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
        """Returns ``log q(t|s)`` at each position, averaged over channels, without its constant.

        Args:
            student_feature: as in :meth:`forward`.
            teacher_feature: as in :meth:`forward`.

        Returns:
            ``(N,)``, ``(N, L)`` or ``(N, H, W)``, in nats per element. In eval mode, the mean of
            all is the negative of :meth:`forward` with reduction ``'mean'``.
        """
        student_feature, teacher_feature = align(student_feature, teacher_feature)
        residual = self._mean(student_feature, None).float() - teacher_feature.float()
        channel = 1 if kind_of(residual.shape) == "map" else -1
        var = self.variance().float()
        nll = residual.movedim(channel, -1).square() / var + var.log()
        mean: Tensor = -0.5 * nll.mean(dim=-1)
        return mean

    def _mean(self, student_feature: Tensor, mask: Tensor | None) -> Tensor:
        student_feature = match_dtype(student_feature, self.variance.raw_var)
        if isinstance(self.head, TokenHead):
            mean: Tensor = self.head(student_feature, mask)
        else:
            mean = self.head(student_feature)
        return mean


def match_dtype(feature: Tensor, parameter: Tensor) -> Tensor:
    """Casts a feature to a head's dtype, unless autocast is there to choose.

    An engine may run the student in bfloat16 and this loss outside its autocast.
    """
    if torch.is_autocast_enabled(feature.device.type):
        return feature
    return feature.to(parameter.dtype)

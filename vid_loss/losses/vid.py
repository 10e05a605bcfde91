"""The VID loss of one pair of layers."""

from collections.abc import Sequence
from typing import Literal, TypeGuard, get_args

import torch
from torch import Tensor, nn

from ._base import FeatureLoss, for_head
from ._group import Selected
from ._scale import TeacherScale, standardized_away
from ._variance import RunningVariance, TrainedVariance
from .gaussian import Reduction
from .heads import MapHead, Norm, TokenHead, mean_head, own_head
from .layouts import as_tokens, channels_of, compute_dtype, valid_positions
from .positions import Whole, checked_positions, some_positions
from .stats import PairStats
from .together import Together

Variance = Literal["running", "trained"]


class VIDLoss(FeatureLoss):
    r"""Variational Information Distillation for one pair: :math:`-\log q(t|s)`.

    One term of equation (2) of `Variational Information Distillation for Knowledge Transfer
    <https://arxiv.org/abs/1904.05835>`_: a Gaussian whose mean is a small network of the
    student's feature, with one variance per channel. Minimizing it raises a lower bound on the
    mutual information of the two features.

    It works in the teacher's own units: each channel :math:`t_c` is standardized by a running
    mean and variance of its own, so that whatever multiplies or shifts the teacher's channels
    changes nothing, and lambda does not depend on a teacher's units. In nats that leaves out the
    constant :math:`\log` of the channels' standard deviations; the value is 1/2 for a head that
    knows nothing.

    The head's parameters must be trained together with the student's. The variance is the mean
    squared residual itself: the inner maximization of the bound over it done exactly.

    Args:
        student_shape: shape of the student's feature, the batch first: ``(N, C)``,
            ``(N, L, C)`` or ``(N, C, H, W)``. Only the layout and C matter.
        teacher_shape: shape of the teacher's feature, in the same layout.
        head: a mean network of your own, from the student's feature to the teacher's number of
            channels, instead of :func:`~vid_loss.losses.heads.mean_head`; of the standardized
            feature. Called with the feature alone.
        hidden_channels: width of the built-in head, see :func:`~vid_loss.losses.heads.mean_head`.
        norm: norm of the built-in head: ``'batch'``, ``'layer'``, ``'group'``, ``'none'``.
            None is batch norm for maps and layer norm for tokens; vectors have none.
        variance: ``'running'``, a running mean of the squared residuals; ``'trained'``, the
            paper's parameter, which moves at the optimizer's learning rate.
        momentum: what the newest batch counts for in the running mean.
        init_var: what a trained variance starts from; None is 1.
        var_floor: the least variance.
        standardize: False takes the teacher's channels as they are, as the paper does. The paper's
            loss is ``VIDLoss(..., variance="trained", standardize=False, init_var=5.0)``.
        positions: share of a map's or a text's positions that a training step takes, at random:
            an unbiased estimate of the loss on all. The head, whose work on every position of large
            maps is most of the loss's cost, sees no others. In eval mode all are taken.
        reduction: see :func:`~vid_loss.gaussian_nll`.

    Raises:
        ValueError: if the shapes are of different layouts or an option is out of range.

    Example:
        >>> loss = VIDLoss((8, 16, 4, 4), (8, 32, 4, 4))
        >>> value = loss(torch.randn(8, 16, 4, 4), torch.randn(8, 32, 4, 4))
        >>> value.shape
        torch.Size([])
    """

    # Between what images want at SGD's rates (10) and at Adam's (1 to 3): examples/paper/q_fit, by
    # validation data, one seed. While the task's own loss has not moved, as in few steps at 5e-5,
    # more steps or a larger rate help, not a smaller lambda: README.md beside this file, lambda.
    default_weight = 3.0

    def __init__(
        self,
        student_shape: Sequence[int],
        teacher_shape: Sequence[int],
        *,
        head: nn.Module | None = None,
        hidden_channels: int | None = None,
        norm: Norm | None = None,
        variance: Variance = "running",
        momentum: float = 0.05,
        init_var: float | None = None,
        var_floor: float = 1e-4,
        standardize: bool = True,
        positions: float = 1.0,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        self._check_options(variance, init_var, reduction, standardize)
        self.build_for(student_shape, teacher_shape)
        self.head = own_head(head, hidden_channels, norm) or mean_head(
            student_shape, teacher_shape, hidden_channels=hidden_channels, norm=norm
        )
        self._head_takes_mask = isinstance(self.head, TokenHead | MapHead)
        channels = channels_of(teacher_shape)
        self.scale = TeacherScale(channels)
        self.running_var = RunningVariance(channels, momentum=momentum, floor=var_floor)
        self.trained_var: TrainedVariance | None = None
        if variance == "trained":
            start = 1.0 if init_var is None else init_var
            self.trained_var = TrainedVariance(channels, init_var=start, floor=var_floor)
        self.standardize = standardize
        self.positions = checked_positions("VIDLoss", positions)
        self.reduction: Reduction = reduction
        self._positions: float | Tensor | None = None  # per sample, in the last step

    @staticmethod
    def _check_options(
        variance: str, init_var: float | None, reduction: str, standardize: bool
    ) -> None:
        if variance not in get_args(Variance):
            raise ValueError(
                f"VIDLoss, variance: expected one of {get_args(Variance)}; got {variance!r}."
            )
        if variance == "running" and init_var is not None:
            raise ValueError(
                "VIDLoss, init_var: expected None beside variance='running', which starts from the "
                f"residuals; got {init_var!r}. The paper's: variance='trained'."
            )
        if not isinstance(standardize, bool):
            raise ValueError(f"VIDLoss, standardize: expected True or False; got {standardize!r}.")
        if reduction not in get_args(Reduction):
            raise ValueError(
                f"VIDLoss, reduction: expected one of {get_args(Reduction)}; got {reduction!r}."
            )

    def forward(
        self, student_feature: Tensor, teacher_feature: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Returns ``-log q(t|s)`` in nats, without its constants.

        In train mode the running estimates take the batch in first. With ``torch.distributed``
        they are those of the joined batch: every process must make this call.

        Args:
            student_feature: ``(N, C_s)``, ``(N, L, C_s)`` or ``(N, C_s, H, W)``.
            teacher_feature: the same layout with ``C_t`` channels; resolutions of maps may differ.
            mask: ``(N, L)`` for tokens, ``(N, H, W)`` of any size for maps, nonzero at what counts.

        Raises:
            TypeError: if a feature is not floating point.
            ValueError: if a shape is not the one that this loss was built for.
        """
        together = Together()
        together.add("", self, self.select(student_feature, teacher_feature, mask))
        return together.nll()[""]

    def select(
        self,
        student_feature: Tensor,
        teacher_feature: Tensor,
        mask: Tensor | None = None,
        whole: Whole | None = None,
    ) -> Selected:
        """Returns what the loss takes of the features: the first part of :meth:`forward`.

        Args:
            student_feature: as in :meth:`forward`.
            teacher_feature: as in :meth:`forward`.
            mask: as in :meth:`forward`.
            whole: what these are a chosen part of, which is taken as it is; None if they are all.

        Raises:
            TypeError, ValueError: as :meth:`forward`.
        """
        valid = None if mask is None else valid_positions(mask, student_feature, teacher_feature)
        student_feature, teacher_feature = self.matched(student_feature, teacher_feature, mask)
        rows = max(len(teacher_feature) * len(self.scale.mean), 1)
        positions = teacher_feature.numel() / rows if whole is None else whole.positions
        if self.training and whole is not None:
            self._positions = whole.counted
        elif self.training:
            self._positions = positions if valid is None else valid.sum() / max(len(valid), 1)
            if self.positions < 1:
                student_feature, teacher_feature, valid = some_positions(
                    student_feature, teacher_feature, valid, self.positions
                )
        left_out = positions * rows / max(teacher_feature.numel(), 1)
        student_feature = for_head(student_feature, self.head, valid)
        head_mask = valid if self._head_takes_mask else None
        if valid is not None and teacher_feature.ndim == 4:
            teacher_feature, valid = as_tokens(teacher_feature), valid.flatten(1)
        return Selected(student_feature, head_mask, teacher_feature, valid, left_out)

    @torch.no_grad()
    def log_likelihood(self, student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
        """Returns ``log q(t|s)`` at each position, averaged over channels, without its constants.

        Args:
            student_feature: as in :meth:`forward`.
            teacher_feature: as in :meth:`forward`.

        Returns:
            ``(N,)``, ``(N, L)`` or ``(N, H, W)``, in nats per element. In eval mode, the mean of
            all is the negative of :meth:`forward` with reduction ``'mean'``.
        """
        student_feature, teacher_feature = self.matched(student_feature, teacher_feature)
        mean: Tensor = self.head(for_head(student_feature, self.head))
        target = teacher_feature.to(compute_dtype(mean, teacher_feature))
        mean = mean.to(target.dtype)
        constant, residual, var = None, mean - target, self.variance()
        if self.standardize:
            constant, scale = self.scale.constant(), self.scale
            unit = scale.var.rsqrt().masked_fill_(constant, 0)
            residual = standardized_away(mean, target, scale.mean, unit)
        squared = residual.movedim(1 if residual.ndim == 4 else -1, -1).square()
        squared = squared if constant is None else squared.masked_fill(constant, 0)
        nll = squared / var + var.log()
        log_likelihood: Tensor = -0.5 * nll.mean(dim=-1)
        return log_likelihood

    def variance(self) -> Tensor:
        """Returns q's variances, ``(C,)``, as shares of the teacher's if it is standardized.

        1 where there is nothing to predict, and nothing to learn.
        """
        var: Tensor = (self.trained_var or self.running_var)()
        return var.masked_fill(self.scale.constant(), 1) if self.standardize else var

    def stats(self) -> PairStats | None:
        """Returns what the diagnostics are made of, over the last batches; None before a step."""
        if self._positions is None:
            return None
        floor = self.running_var.floor
        unit = 1 if self.standardize else self.scale.var.clamp(min=floor)
        return PairStats(
            self.running_var() / unit,
            self.variance().detach() / unit,
            ~self.scale.constant(),
            self._positions,
            floor / unit,
        )


def joins(loss: nn.Module) -> TypeGuard[VIDLoss]:
    """Whether a loss is a VIDLoss that nobody has made into something else."""
    if type(loss) is not VIDLoss or loss.reduction == "none":  # no scalar, as its call is to say
        return False
    hooks = loss._forward_hooks or loss._forward_pre_hooks
    hooks = hooks or loss._backward_hooks or loss._backward_pre_hooks
    # Engines wrap a module by a forward of its own.
    return not hooks and "forward" not in loss.__dict__ and loss._compiled_call_impl is None

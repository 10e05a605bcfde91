"""Losses of features that the paper compares with: FitNet and AT."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from vid_loss.guards import no_autocast

from ._base import FeatureLoss, for_head, mean_of_valid, without_padding
from .layouts import Kind, as_tokens, channels_of, compute_dtype, valid_positions
from .positions import checked_positions, some_positions


class FitNetLoss(FeatureLoss):
    r"""Hints (FitNet): a regressor on a student layer and a squared error.

    Romero et al. 2015, `FitNets: Hints for Thin Deep Nets <https://arxiv.org/abs/1412.6550>`_.
    The variant here is the mean over elements of :math:`(t - r(s))^2`; theirs is half the sum.
    The regressor :math:`r` is a 1x1 convolution, or a linear layer for vectors and tokens.

    By itself it is the one-stage sum that later papers compare with. The original has two
    stages, hints first and then the rest: train on ``distiller(images)`` alone for some epochs,
    then ``distiller.set_weight(name, 0.0)`` and train on the task (and KD).

    Args:
        student_shape: shape of the student's feature, the batch first.
        teacher_shape: shape of the teacher's feature, in the same layout.
        positions: as in :class:`~vid_loss.VIDLoss`.

    Raises:
        ValueError: if the shapes are of different kinds, or the share of positions is none.
    """

    def __init__(
        self,
        student_shape: Sequence[int],
        teacher_shape: Sequence[int],
        *,
        positions: float = 1.0,
    ) -> None:
        super().__init__()
        self.positions = checked_positions("FitNetLoss", positions)
        kind = self.build_for(student_shape, teacher_shape)
        channels = channels_of(student_shape), channels_of(teacher_shape)
        self.regressor = (
            nn.Conv2d(*channels, kernel_size=1) if kind == "map" else nn.Linear(*channels)
        )

    def forward(
        self, student_feature: Tensor, teacher_feature: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Returns the mean squared error, in the teacher's units squared.

        Args:
            student_feature: ``(N, C_s)``, ``(N, L, C_s)`` or ``(N, C_s, H, W)``.
            teacher_feature: the same layout with ``C_t`` channels; resolutions of maps may differ.
            mask: ``(N, L)`` for tokens, ``(N, H, W)`` of any size for maps, nonzero at what counts.

        Raises:
            TypeError: if a feature is not floating point.
            ValueError: if a shape is not the one that this loss was built for.
        """
        valid = None if mask is None else valid_positions(mask, student_feature, teacher_feature)
        student_feature, teacher_feature = self.matched(student_feature, teacher_feature, mask)
        if self.positions < 1 and self.training:
            student_feature, teacher_feature, valid = some_positions(
                student_feature, teacher_feature, valid, self.positions
            )
        hint = self.regressor(for_head(student_feature, self.regressor, valid))
        dtype = compute_dtype(hint, teacher_feature)
        with no_autocast(hint):
            hint, teacher_feature = hint.to(dtype), teacher_feature.to(dtype)
            if valid is None:
                return _mean_square(hint, teacher_feature)
            if hint.ndim == 4:
                hint, teacher_feature = as_tokens(hint), as_tokens(teacher_feature)
                valid = valid.flatten(1)
            target = without_padding(teacher_feature, valid)  # 0 times its NaN would be NaN
            error = F.mse_loss(hint, target, reduction="none")
            return mean_of_valid(error.mean(dim=-1), valid)


class ATLoss(FeatureLoss):
    r"""Attention transfer (AT), activation-based, p = 2.

    Zagoruyko & Komodakis 2017, `Paying More Attention to Attention
    <https://arxiv.org/abs/1612.03928>`_. With the map :math:`Q` = channel mean of squares,
    flattened, the loss is :math:`\| Q_s / \|Q_s\|_2 - Q_t / \|Q_t\|_2 \|_2^2`. The variant here is
    that of the authors' code: averaged over positions too, to which their weight of 1000 belongs.
    The default here is 100, by evidence on small networks.
    """

    # Fashion-MNIST, validation accuracy of the small pair of examples/tables.py with 10 and with 30
    # images a class: 75.0 and 77.5 % with 10, 80.0 and 80.8 % with 100, 67.5 and 67.5 % with 1000.
    default_weight = 100.0
    kinds: tuple[Kind, ...] = ("map",)

    def forward(
        self, student_feature: Tensor, teacher_feature: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Returns the mean squared distance of the two normalised attention maps.

        Args:
            student_feature: ``(N, C_s, H, W)``.
            teacher_feature: ``(N, C_t, H', W')``; the larger is pooled to the smaller.
            mask: ``(N, H, W)`` of any size, nonzero at what counts.

        Raises:
            TypeError: if a feature is not floating point.
            ValueError: if a feature is not a map or the batch sizes differ.
        """
        valid = None if mask is None else valid_positions(mask, student_feature, teacher_feature)
        student_feature, teacher_feature = self.matched(student_feature, teacher_feature, mask)
        dtype = compute_dtype(student_feature, teacher_feature)
        with no_autocast(student_feature):
            student_map = _attention_map(student_feature.to(dtype), valid)
            teacher_map = _attention_map(teacher_feature.to(dtype), valid)
            if valid is None:
                return _mean_square(student_map, teacher_map)
            return mean_of_valid((student_map - teacher_map).square(), valid.flatten(1))


def _attention_map(feature: Tensor, valid: Tensor | None) -> Tensor:
    if valid is not None:
        feature = without_padding(feature, valid)
    attention = feature.square().mean(dim=1).flatten(1)
    return F.normalize(attention, dim=1)


def _mean_square(student: Tensor, teacher: Tensor) -> Tensor:
    """Averages the squared distance over all elements; 0 if there are none, not their nan."""
    return F.mse_loss(student, teacher, reduction="sum") / max(student.numel(), 1)

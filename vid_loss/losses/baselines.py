"""Losses that the paper compares with, each with :class:`~vid_loss.VIDLoss`'s call."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._base import FeatureLoss, match_dtype
from ._logits import (
    checked_temperature,
    mean_of_valid,
    refuse_probabilities,
    softened_divergence,
)
from .layouts import Kind, as_tokens, channels_of, compute_dtype, valid_positions


class KDLoss(FeatureLoss):
    r"""Knowledge distillation (KD) of logits.

    Hinton et al. 2015, `Distilling the Knowledge in a Neural Network
    <https://arxiv.org/abs/1503.02531>`_:

    .. math:: T^2 \, \mathrm{KL}\big(\mathrm{softmax}(t / T) \,\|\, \mathrm{softmax}(s / T)\big)

    averaged over the batch, or over all valid tokens. With weight w it is *added* to the task
    loss. The form that replaces a part of it, ``(1 - alpha) * task + alpha * KD``, is the same
    sum with the task loss weighted ``1 - alpha`` in your loop and the pair ``alpha``.

    Args:
        temperature: T, above 0; the higher, the softer.

    Raises:
        ValueError: if the temperature is not a positive number.

    Example:
        >>> KDLoss(temperature=1.0)(torch.zeros(1, 2), torch.tensor([[0.0, 2.0]]))
        tensor(0.3278)
    """

    kinds: tuple[Kind, ...] = ("vector", "tokens")

    def __init__(self, temperature: float = 4.0) -> None:
        super().__init__()
        self.temperature = checked_temperature("KDLoss", temperature)
        self._seen = False

    def forward(
        self, student_feature: Tensor, teacher_feature: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Returns the divergence in nats.

        Args:
            student_feature: logits ``(N, classes)``, or ``(N, L, classes)`` for tokens.
            teacher_feature: logits of the same shape.
            mask: ``(N, L)`` for tokens, nonzero at those that count.

        Raises:
            ValueError: if the shapes differ, are no logits' shapes, or if the first batch
                holds probabilities.
        """
        valid = None if mask is None else valid_positions(mask, student_feature, teacher_feature)
        student_feature, teacher_feature = self.matched(student_feature, teacher_feature, mask)
        if student_feature.shape[-1] != teacher_feature.shape[-1]:
            raise ValueError(
                f"KDLoss: expected the student's {student_feature.shape[-1]} classes of the "
                f"teacher; got {teacher_feature.shape[-1]}. Between different label sets use "
                "LwFLoss on the student's penultimate layer."
            )
        if not self._seen and len(student_feature) and not torch.compiler.is_compiling():
            # Once only: looking at values makes the host wait for the device.
            self._seen = True
            refuse_probabilities("student", student_feature)
            refuse_probabilities("teacher", teacher_feature)
        return softened_divergence(student_feature, teacher_feature, self.temperature, valid)

    def extra_repr(self) -> str:
        """Shows the temperature in ``print(model)``."""
        return f"temperature={self.temperature}"


class LwFLoss(FeatureLoss):
    """Learning without Forgetting (LwF): KD between different label sets.

    Li & Hoiem 2017, `Learning without Forgetting <https://arxiv.org/abs/1606.09282>`_, as the
    paper uses it for transfer between tasks: an extra linear output on the student's penultimate
    layer predicts the teacher's outputs. The variant here is :class:`KDLoss` at temperature 2 on
    that output, times T^2: Li & Hoiem's cross-entropy but for the teacher's entropy, a constant,
    and that factor. Pair it as ``Pair("fc:input", "fc", loss=LwFLoss)``.

    Args:
        student_shape: shape of the student's penultimate feature, the batch first.
        teacher_shape: shape of the teacher's logits, the batch first.
        temperature: T, above 0.

    Raises:
        ValueError: if a shape is a map's or the temperature is not a positive number.
    """

    kinds: tuple[Kind, ...] = ("vector", "tokens")

    def __init__(
        self,
        student_shape: Sequence[int],
        teacher_shape: Sequence[int],
        *,
        temperature: float = 2.0,
    ) -> None:
        super().__init__()
        self.build_for(student_shape, teacher_shape)
        self.output = nn.Linear(channels_of(student_shape), channels_of(teacher_shape))
        self.temperature = checked_temperature("LwFLoss", temperature)

    def forward(
        self, student_feature: Tensor, teacher_feature: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Returns the divergence of the extra output from the teacher's logits, in nats.

        Args:
            student_feature: ``(N, C_s)``, or ``(N, L, C_s)`` for tokens.
            teacher_feature: logits ``(N, classes)`` or ``(N, L, classes)``.
            mask: ``(N, L)`` for tokens, nonzero at those that count.

        Raises:
            ValueError: if a shape is not the one that this loss was built for.
        """
        valid = None if mask is None else valid_positions(mask, student_feature, teacher_feature)
        student_feature, teacher_feature = self.matched(student_feature, teacher_feature, mask)
        logits = self.output(match_dtype(student_feature, self.output))
        return softened_divergence(logits, teacher_feature, self.temperature, valid)

    def extra_repr(self) -> str:
        """Shows the temperature in ``print(model)``."""
        return f"temperature={self.temperature}"


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

    Raises:
        ValueError: if the shapes are of different kinds.
    """

    def __init__(self, student_shape: Sequence[int], teacher_shape: Sequence[int]) -> None:
        super().__init__()
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
        hint = self.regressor(match_dtype(student_feature, self.regressor))
        dtype = compute_dtype(hint, teacher_feature)
        with torch.autocast(hint.device.type, enabled=False):
            hint, teacher_feature = hint.to(dtype), teacher_feature.to(dtype)
            if valid is None:
                return _mean_square(hint, teacher_feature)
            if hint.ndim == 4:
                hint, teacher_feature = as_tokens(hint), as_tokens(teacher_feature)
                valid = valid.flatten(1)
            padded = ~valid.unsqueeze(-1)  # 0 times the NaN of a padded position is NaN
            hint, hinted = (x.masked_fill(padded, 0) for x in (hint, teacher_feature))
            error = F.mse_loss(hint, hinted, reduction="none")
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
        with torch.autocast(student_feature.device.type, enabled=False):
            student_map = _attention_map(student_feature.to(dtype), valid)
            teacher_map = _attention_map(teacher_feature.to(dtype), valid)
            if valid is None:
                return _mean_square(student_map, teacher_map)
            return mean_of_valid((student_map - teacher_map).square(), valid.flatten(1))


def _attention_map(feature: Tensor, valid: Tensor | None) -> Tensor:
    attention = feature.square().mean(dim=1).flatten(1)
    if valid is not None:
        attention = attention.masked_fill(~valid.flatten(1), 0)
    return F.normalize(attention, dim=1)


def _mean_square(student: Tensor, teacher: Tensor) -> Tensor:
    """Averages the squared distance over all elements; 0 if there are none, not their nan."""
    return F.mse_loss(student, teacher, reduction="sum") / max(student.numel(), 1)

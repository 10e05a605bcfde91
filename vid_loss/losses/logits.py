"""Losses of logits that the paper compares with: KD and LwF."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vid_loss.guards import no_autocast

from ._base import FeatureLoss, for_head, mean_of_valid, without_padding
from .layouts import Kind, channels_of, compute_dtype, valid_positions


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
        self.temperature = _checked_temperature("KDLoss", temperature)
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
            _refuse_probabilities("student", student_feature)
            _refuse_probabilities("teacher", teacher_feature)
            self._seen = True
        return _softened_divergence(student_feature, teacher_feature, self.temperature, valid)

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
        self.temperature = _checked_temperature("LwFLoss", temperature)

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
        logits = self.output(for_head(student_feature, self.output, valid))
        return _softened_divergence(logits, teacher_feature, self.temperature, valid)

    def extra_repr(self) -> str:
        """Shows the temperature in ``print(model)``."""
        return f"temperature={self.temperature}"


def _softened_divergence(
    student: Tensor, teacher: Tensor, temperature: float, mask: Tensor | None
) -> Tensor:
    """Returns KDLoss's value for logits ``(N, classes)`` or ``(N, L, classes)``, in nats."""
    dtype = compute_dtype(student, teacher)
    if mask is not None:  # before anything else: 0 times the NaN of a padded position is NaN
        student, teacher = without_padding(student, mask), without_padding(teacher, mask)
    with no_autocast(student):
        log_q = F.log_softmax(student.to(dtype) / temperature, dim=-1)
        log_p = F.log_softmax(teacher.to(dtype) / temperature, dim=-1)
        divergence = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1)
        if mask is not None:
            return mean_of_valid(divergence, mask) * temperature**2
        return divergence.sum() / max(divergence.numel(), 1) * temperature**2


def _checked_temperature(loss: str, temperature: float) -> float:
    """Returns the temperature, or raises a ValueError."""
    if not isinstance(temperature, int | float) or not 0 < temperature < math.inf:
        raise ValueError(f"{loss}, temperature: expected a positive number; got {temperature!r}.")
    return temperature


def _refuse_probabilities(owner: str, logits: Tensor) -> None:
    """Raises a ValueError if a softmax has been applied already."""
    rows = logits.detach().float()
    if rows.shape[-1] > 1 and bool((rows > 0).all() & ((rows.sum(-1) - 1).abs() < 1e-3).all()):
        raise ValueError(
            f"KDLoss: expected {owner} logits; got rows that are positive and sum to 1. "
            "Tap the layer before the softmax."
        )

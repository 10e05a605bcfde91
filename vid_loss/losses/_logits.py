"""What the losses of logits share: the softened divergence, and checks."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layouts import align, compute_dtype, kind_of


def softened_divergence(
    student: Tensor, teacher: Tensor, temperature: float, mask: Tensor | None
) -> Tensor:
    """Returns KDLoss's value for logits ``(N, classes)`` or ``(N, L, classes)``, in nats."""
    dtype = compute_dtype(student, teacher)
    with torch.autocast(student.device.type, enabled=False):
        log_q = F.log_softmax(student.to(dtype) / temperature, dim=-1)
        log_p = F.log_softmax(teacher.to(dtype) / temperature, dim=-1)
        divergence = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1)
        if mask is not None:
            return mean_of_valid(divergence, mask) * temperature**2
        return divergence.sum() / max(divergence.numel(), 1) * temperature**2


def mean_of_valid(values: Tensor, mask: Tensor) -> Tensor:
    """Averages ``(N, L)`` over the valid tokens; 0 if there are none."""
    valid = mask.bool()
    return values.masked_fill(~valid, 0).sum() / valid.sum().clamp(min=1)


def checked_temperature(temperature: float) -> float:
    """Returns the temperature, or raises a ValueError."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature: expected a positive number; got {temperature}.")
    return temperature


def check_logits(loss: nn.Module, student: Tensor, teacher: Tensor, mask: Tensor | None) -> None:
    """Raises a ValueError if two features are not of the same samples, or are no logits."""
    align(student, teacher, mask)
    check_logits_kind(loss, kind_of(teacher.shape), teacher.shape)


def check_logits_kind(loss: nn.Module, kind: str, shape: Sequence[int]) -> None:
    """Raises a ValueError that names the loss, for a map."""
    if kind == "map":
        raise ValueError(
            f"expected logits (N, classes) or (N, L, classes) for {type(loss).__name__}; got a map "
            f"of shape {tuple(shape)}. Tap the classifier, for example 'fc'."
        )


def refuse_probabilities(owner: str, logits: Tensor) -> None:
    """Raises a ValueError if a softmax has been applied already."""
    rows = logits.detach().float()
    if rows.shape[-1] > 1 and bool((rows > 0).all() & ((rows.sum(-1) - 1).abs() < 1e-3).all()):
        raise ValueError(
            f"expected {owner} logits for KDLoss; got rows that are positive and sum to 1. "
            "Tap the layer before the softmax."
        )

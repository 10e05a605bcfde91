"""Divergence of softened logits, and checks, of KDLoss and LwFLoss."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .layouts import compute_dtype


def softened_divergence(
    student: Tensor, teacher: Tensor, temperature: float, mask: Tensor | None
) -> Tensor:
    """Returns KDLoss's value for logits ``(N, classes)`` or ``(N, L, classes)``, in nats."""
    dtype = compute_dtype(student, teacher)
    if mask is not None:  # before anything else: 0 times the NaN of a padded position is NaN
        padded = ~mask.bool().unsqueeze(-1)
        student, teacher = student.masked_fill(padded, 0), teacher.masked_fill(padded, 0)
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


def checked_temperature(loss: str, temperature: float) -> float:
    """Returns the temperature, or raises a ValueError."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"{loss}, temperature: expected a positive number; got {temperature}.")
    return temperature


def refuse_probabilities(owner: str, logits: Tensor) -> None:
    """Raises a ValueError if a softmax has been applied already."""
    rows = logits.detach().float()
    if rows.shape[-1] > 1 and bool((rows > 0).all() & ((rows.sum(-1) - 1).abs() < 1e-3).all()):
        raise ValueError(
            f"KDLoss: expected {owner} logits; got rows that are positive and sum to 1. "
            "Tap the layer before the softmax."
        )

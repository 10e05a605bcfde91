"""Numbers for people: what was transferred, its part in the gradient, and where on an image."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .guards import undisturbed
from .losses.stats import METRICS, PairDiagnostics
from .taps import FeatureTap

if TYPE_CHECKING:
    from .distiller import Distiller

__all__ = ["METRICS", "PairDiagnostics", "gradient_shares", "log_likelihood"]


def gradient_shares(losses: Mapping[str, Tensor], student: nn.Module) -> dict[str, float]:
    """Returns each loss's part in the gradient that reaches the student.

    To be called now and then, in the place of ``distiller(images)``; it costs a backward pass a
    loss::

        loss = criterion(student(images), labels)
        gradient_shares({"task": loss, **distiller.weighted_terms(images)}, student)

    Args:
        losses: scalars by name, weighted as they are added up. Their graphs are kept.
        student: the model whose parameters' gradients are compared; no ``grad`` is touched.

    Returns:
        The norm of each loss's gradient, divided by the sum of the norms; all 0 if no gradient
        reaches the student.

    Example:
        >>> student = nn.Linear(1, 1, bias=False)
        >>> output = student(torch.ones(1, 1)).sum()
        >>> gradient_shares({"task": output, "pair": 3 * output}, student)
        {'task': 0.25, 'pair': 0.75}
    """
    parameters = [p for p in student.parameters() if p.requires_grad]
    norms = {}
    for name, loss in losses.items():
        gradients: Sequence[Tensor | None] = []
        if loss.requires_grad:
            gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        squares = [float(x.double().square().sum()) for x in gradients if x is not None]
        norms[name] = math.sqrt(sum(squares))
    total = sum(norms.values())
    return {name: norm / total if total else 0.0 for name, norm in norms.items()}


@torch.no_grad()
def log_likelihood(distiller: Distiller, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """Returns log q(t|s) at each position of each VIDLoss pair.

    Student and heads run in eval mode, and are left as they were.

    Args:
        distiller: the pairs.
        *args: positional inputs of the student.
        **kwargs: keyword inputs of the student.

    Returns:
        By pair, ``(N, H, W)`` for maps, ``(N, L)`` for tokens (padding included) and ``(N,)`` for
        vectors: nats per element, averaged over channels, without the constant, as in the loss.
    """
    losses = distiller.vid_losses()
    pairs = {name: distiller.pairs[name] for name in losses}
    student = distiller.student
    cache = distiller.cache
    with undisturbed(student, distiller):
        with FeatureTap(student, [x.student for x in pairs.values()], owner="student") as tap:
            student(*args, **kwargs)
            features = tap.collect()
        try:
            distiller.cache = None  # these need not be samples of the data set
            teacher_features = distiller.teacher_features(*args, **kwargs)
        finally:
            distiller.cache = cache
        return {
            name: losses[name].log_likelihood(
                *pair.prepare(features[pair.student], teacher_features[pair.teacher])
            )
            for name, pair in pairs.items()
        }

"""Where a student knows what its teacher sees: log q(t|s) by position."""

from typing import Any

import torch
from torch import Tensor

from .distiller import Distiller
from .guards import undisturbed
from .tap import FeatureTap


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
    with undisturbed(student, distiller):
        with FeatureTap(student, [x.student for x in pairs.values()], owner="student") as tap:
            student(*args, **kwargs)
            features = tap.collect()
        teacher_features = distiller._teacher.features(args, kwargs)
        return {
            name: losses[name].log_likelihood(
                *pair.prepare(features[pair.student], teacher_features[pair.teacher])
            )
            for name, pair in pairs.items()
        }

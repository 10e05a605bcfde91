"""What a pair transferred in a step: explained variance and nats."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

METRICS = ("explained_variance", "nats_per_element", "channels_on_floor")  # to be watched


class PairStats(NamedTuple):
    """What the last steps leave of a pair, on the device until somebody asks."""

    mean_square: Tensor  # (C,), of the residuals, as a share of the teacher's variance
    var: Tensor  # (C,), of q, in the same unit
    alive: Tensor  # (C,), which of the teacher's channels change
    positions: float | Tensor  # per sample
    floor: float | Tensor  # the least that var can be


@dataclass(frozen=True)
class PairDiagnostics:
    r"""How much of the teacher's feature a pair's head predicts, over the last batches.

    The nats are the Gaussian estimate of the information :math:`I(t; s)` that the head has found,
    :math:`\frac{1}{2} \log(\mathrm{var}(t_c) / \sigma_c^2)` averaged over channels, which takes the
    teacher's feature for Gaussian and independent between elements. As long as a variance is not
    its channel's residual :math:`r_c`, it would say too little or too much;
    :math:`\frac{1}{2} (1 - r_c / \sigma_c^2)`, which is 0 on average from then on, is added, so
    that it never says too much. It is 1/2 less the loss's value with reduction ``'mean'``. Real
    features are redundant: the sum over a feature counts much of it repeatedly. Compare runs and
    epochs, not layers of different size.

    Attributes:
        explained_variance: 1 - residual / variance of the teacher's feature, averaged over the
            channels that change: 0 for a head that knows the mean alone, 1 for one that predicts
            all. NaN if the teacher's feature is constant.
        nats_per_element: the estimate, per element of the teacher's feature.
        nats_per_feature: the same times the number of elements of a sample.
        channels_on_floor: how many channels have a variance within twice the floor.
        channels: how many there are.
    """

    explained_variance: float
    nats_per_element: float
    nats_per_feature: float
    channels_on_floor: int
    channels: int

    @classmethod
    def of(cls, stats: PairStats) -> "PairDiagnostics":
        """Computes a pair's diagnostics; here the host waits for the device."""
        mean_square, var = stats.mean_square.double(), stats.var.double()
        unexplained = mean_square[stats.alive].mean()
        nats = 0.5 * (1 - var.log() - mean_square / var)
        # A channel that never changes holds no information.
        nats = torch.where(stats.alive, nats, 0).mean()
        channels = len(var)
        elements = torch.as_tensor(stats.positions, device=nats.device).to(nats) * channels
        on_floor = (var <= 2 * stats.floor).sum().to(nats)
        values = torch.stack([1 - unexplained, nats, nats * elements, on_floor]).tolist()
        if not math.isfinite(values[0]):
            values[0] = math.nan
        return cls(values[0], values[1], values[2], int(values[3]), channels)


def by_metric(diagnostics: Mapping[str, PairDiagnostics]) -> dict[str, float]:
    """Returns the numbers to be watched for a logger, as ``"nats_per_element/<pair>"``."""
    return {f"{key}/{name}": getattr(x, key) for key in METRICS for name, x in diagnostics.items()}

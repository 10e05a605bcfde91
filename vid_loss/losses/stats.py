"""What a pair transferred in a step: explained variance and nats."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .layouts import compute_dtype, kind_of

METRICS = ("explained_variance", "nats_per_element", "channels_on_floor")  # to be watched
_SAMPLES = 32  # of a batch of maps or tokens


class Observation(NamedTuple):
    """Sums over a batch or its first samples, kept on the device until somebody asks."""

    squared_residuals: Tensor  # (N, C), of each sample and channel
    target_sum: Tensor  # (C,)
    target_norm: Tensor  # (C,), 2-norm
    var: Tensor  # (C,), of q
    positions: int | Tensor  # how many were summed, the batch's together
    floor: float

    def target_var(self) -> Tensor:
        """Returns the variance of each of the teacher's channels, ``(C,)``, in float64."""
        mean = self.target_sum.double() / self.positions
        mean_square = self.target_norm.double().square() / self.positions
        return (mean_square - mean.square()).clamp(min=0)


@torch.no_grad()
def observe(
    squared_residuals: Tensor, target: Tensor, var: Tensor, mask: Tensor | None, floor: float
) -> Observation:
    """Takes from a training step what :func:`summarise` needs, without waiting for the device.

    The loss has summed the squared residuals already; the teacher's feature is read twice more,
    by position and then by sample, which is several times faster than both at once. Of maps and
    tokens 32 samples are enough: their many positions make up for it.
    """
    if kind_of(target.shape) == "vector":
        target = target.unsqueeze(0)  # one sample of N positions
    else:
        squared_residuals, target = squared_residuals[:_SAMPLES], target[:_SAMPLES]
    channels, dims = (
        (target.shape[1], (*range(2, target.ndim),))
        if kind_of(target.shape) == "map"
        else (target.shape[2], (1,))
    )
    positions: int | Tensor = target.numel() // channels
    if mask is not None:
        mask = mask[:_SAMPLES].bool()
        target = target.masked_fill(~mask.unsqueeze(-1), 0)
        positions = mask.sum()
    dtype = compute_dtype(target)
    norms = torch.linalg.vector_norm(target, dim=dims, dtype=dtype)
    return Observation(
        squared_residuals.detach(),
        target.sum(dims, dtype=dtype).sum(0),
        torch.linalg.vector_norm(norms, dim=0),
        var.detach(),
        positions,
        floor,
    )


@dataclass(frozen=True)
class PairDiagnostics:
    r"""How much of the teacher's feature a pair's head predicts, in one batch.

    The nats are the Gaussian estimate of the information :math:`I(t; s)` that the head has found,
    :math:`\frac{1}{2} \log(\mathrm{var}(t_c) / \sigma_c^2)` averaged over channels, which takes the
    teacher's feature for Gaussian and independent between elements. As long as a variance is not
    trained to its channel's residual :math:`r_c`, it would say too little or too much;
    :math:`\frac{1}{2} (1 - r_c / \sigma_c^2)`, which is 0 from then on, is added, so that it never
    says too much, and is below 0 at first. Real features are redundant: the sum over a feature
    counts much of it repeatedly. Compare runs and epochs, not layers of different size.

    Attributes:
        explained_variance: 1 - residual / variance of the teacher's feature, each summed over
            channels: 0 for a head that knows the mean alone, 1 for one that predicts all. NaN
            if the teacher's feature is constant.
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


def by_metric(observations: Mapping[str, Observation | None]) -> dict[str, float]:
    """Summarises for a logger, as ``"nats_per_element/<pair>"``; nothing if it was turned off."""
    found = report({name: x for name, x in observations.items() if x is not None})
    return {f"{key}/{name}": getattr(x, key) for key in METRICS for name, x in found.items()}


def report(observations: Mapping[str, Observation | None]) -> dict[str, PairDiagnostics]:
    """Summarises what was observed of each pair.

    Raises:
        RuntimeError: if nothing was observed of a pair.
    """
    if None in observations.values():
        raise RuntimeError(
            "Distiller, diagnostics: expected a training step before; got none that was observed. "
            "Call it after the loss, with Distiller(..., diagnose=True)."
        )
    return {name: summarise(x) for name, x in observations.items() if x is not None}


def summarise(observation: Observation) -> PairDiagnostics:
    """Computes a pair's diagnostics; here the host waits for the device."""
    var, floor = observation.var.double(), observation.floor
    target_var = observation.target_var()
    residual = observation.squared_residuals.double().sum(0) / observation.positions
    explained = 1 - residual.sum() / target_var.sum()
    # A dead channel has no variance and no residual, and no information: 0, by the floor.
    target_var, residual = target_var.clamp(min=floor), residual.clamp(min=floor)
    nats = 0.5 * ((target_var / var).log() + 1 - residual / var).mean()
    samples, channels = observation.squared_residuals.shape
    elements = torch.as_tensor(observation.positions).to(nats) * channels / samples
    on_floor = (var <= 2 * floor).sum().to(nats)
    values = torch.stack([explained, nats, nats * elements, on_floor]).tolist()
    if not math.isfinite(values[0]):
        values[0] = math.nan
    return PairDiagnostics(values[0], values[1], values[2], int(values[3]), channels)

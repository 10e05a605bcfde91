"""A random part of a feature's positions, of which a loss is an unbiased estimate."""

import math
from typing import NamedTuple

import torch
from torch import Size, Tensor

from vid_loss.guards import is_captured


class Lattice(NamedTuple):
    """Rows and columns of a map that are equally far apart, from random ones on around its edges.

    Attributes:
        size: of the map, ``(H, W)``.
        rows: which are taken.
        columns: the same.
    """

    size: Size
    rows: slice | Tensor
    columns: slice | Tensor

    @classmethod
    def drawn(cls, feature: Tensor, share: float) -> "Lattice":
        """Draws one with the share, or the nearest that there is, of a map's positions.

        Args:
            feature: ``(N, C, H, W)``.
            share: above 0, at most 1.
        """
        size = feature.shape[2:]
        height, width = size
        step = min(max(height, 1), math.floor(math.sqrt(1 / share) + 1e-6))
        other = min(max(width, 1), max(1, round(1 / share / step)))
        device = _drawn_on(feature)
        return cls(size, _every(height, step, device), _every(width, other, device))

    def of(self, values: Tensor) -> Tensor:
        """Returns the part of a map ``(N, C, H, W)`` or of a mask ``(N, H, W)``."""
        return _taken(_taken(values, values.ndim - 2, self.rows), values.ndim - 1, self.columns)


class Whole(NamedTuple):
    """What a part of a map was taken of.

    Attributes:
        positions: how many it has.
        counted: how many of them count, in the mean over samples.
    """

    positions: int
    counted: float | Tensor


def checked_positions(loss: str, positions: float) -> float:
    """Returns the share, or raises the ValueError that names the loss."""
    if not isinstance(positions, int | float) or not 0 < positions <= 1:
        raise ValueError(
            f"{loss}, positions: expected a share above 0, at most 1; got {positions!r}. A quarter "
            "is 0.25."
        )
    return float(positions)


def some_positions(
    student: Tensor, teacher: Tensor, mask: Tensor | None, share: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns a part of the positions of two features of one size, the same part of both.

    Of maps a lattice; of tokens, so many at random, the same of all samples; of vectors, all. Each
    position has the same chance. Chosen with torch's default generator of the CPU, in each process
    on its own; compiled or captured in a CUDA graph with the device's, since nothing of the host is
    run again.

    Args:
        student: ``(N, C_s, H, W)``, ``(N, L, C_s)`` or ``(N, C_s)``.
        teacher: the same with ``C_t`` channels.
        mask: ``(N, H, W)`` or ``(N, L)``, or None.
        share: of the positions, above 0, at most 1.
    """
    if student.ndim == 4:
        lattice = Lattice.drawn(student, share)
        student, teacher = lattice.of(student), lattice.of(teacher)
        mask = None if mask is None else lattice.of(mask)
    elif student.ndim == 3:
        count = math.ceil(share * student.shape[1])
        chosen = torch.randperm(student.shape[1], device=_drawn_on(student))[:count]
        student, teacher = _taken(student, 1, chosen), _taken(teacher, 1, chosen)
        mask = None if mask is None else _taken(mask, 1, chosen)
    return student.contiguous(), teacher.contiguous(), mask


def _drawn_on(feature: Tensor) -> torch.device:
    replayed = torch.compiler.is_compiling() or is_captured(feature)
    return feature.device if replayed else torch.device("cpu")


def _every(size: int, step: int, device: torch.device) -> slice | Tensor:
    """Returns every ``step``-th index of a dimension, from a random one on, wrapped at its end."""
    if step == 1:
        return slice(None)
    start = torch.randint(size, (), device=device)
    if size % step == 0 and device.type == "cpu" and not torch.compiler.is_compiling():
        return slice(int(start) % step, None, step)  # a view, where indices would be a copy
    return (start + step * torch.arange(-(-size // step), device=device)) % size


def _taken(values: Tensor, dim: int, chosen: slice | Tensor) -> Tensor:
    if isinstance(chosen, Tensor):
        return values.index_select(dim, chosen.to(values.device, non_blocking=True))
    return values[(slice(None),) * dim + (chosen,)]

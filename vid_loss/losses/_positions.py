"""A random part of a feature's positions, of which a loss is an unbiased estimate."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


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

    Of maps, a lattice whose rows and columns are so many apart and start at random, around the
    edges; of tokens, so many at random, the same of all samples; of vectors, all. Each position has
    the same chance. Chosen with torch's default generator of the CPU, in each process on its own.

    Args:
        student: ``(N, C_s, H, W)``, ``(N, L, C_s)`` or ``(N, C_s)``.
        teacher: the same with ``C_t`` channels.
        mask: ``(N, H, W)`` or ``(N, L)``, or None.
        share: of the positions, above 0, at most 1. The nearest that a lattice has.
    """
    if student.ndim == 4:
        rows, columns = _lattice(student.shape[2:], share)
        student, teacher = (_taken(_taken(x, 2, rows), 3, columns) for x in (student, teacher))
        mask = None if mask is None else _taken(_taken(mask, 1, rows), 2, columns)
    elif student.ndim == 3:
        chosen = torch.randperm(student.shape[1])[: math.ceil(share * student.shape[1])]
        student, teacher = _taken(student, 1, chosen), _taken(teacher, 1, chosen)
        mask = None if mask is None else _taken(mask, 1, chosen)
    return student.contiguous(), teacher.contiguous(), mask


def _lattice(size: Sequence[int], share: float) -> tuple[slice | Tensor, slice | Tensor]:
    height, width = size
    step = min(max(height, 1), math.floor(math.sqrt(1 / share) + 1e-6))
    other = min(max(width, 1), max(1, round(1 / share / step)))
    return _every(height, step), _every(width, other)


def _every(size: int, step: int) -> slice | Tensor:
    """Returns every so-manieth of a dimension, from a random one on and around its end."""
    if step == 1:
        return slice(None)
    start = torch.randint(size, ())
    if size % step == 0 and not torch.compiler.is_compiling():
        return slice(int(start) % step, None, step)  # a view, where indices would be a copy
    return (start + step * torch.arange(-(-size // step))) % size


def _taken(values: Tensor, dim: int, chosen: slice | Tensor) -> Tensor:
    if isinstance(chosen, Tensor):
        return values.index_select(dim, chosen.to(values.device, non_blocking=True))
    return values[(slice(None),) * dim + (chosen,)]

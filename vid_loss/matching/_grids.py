"""Tokens of an image's patches as a map, where tokens are to meet a map."""

import math
from dataclasses import dataclass

from torch import Tensor

from ._stages import Stages

_MOST_LEADING_TOKENS = 8  # a class token, one for distillation, some registers


@dataclass(frozen=True)
class TokensToGrid:
    """Turns the tokens of an image's patches into a map, without the special tokens before them.

    Args:
        leading: number of tokens before the patches: class, distillation, registers.
        height: number of patches vertically.
        width: number of patches horizontally.

    Example:
        >>> import torch
        >>> TokensToGrid(1, 2, 3)(torch.zeros(8, 7, 16)).shape
        torch.Size([8, 16, 2, 3])
    """

    leading: int
    height: int
    width: int

    def __call__(self, tokens: Tensor) -> Tensor:
        """Maps ``(N, leading + height * width, C)`` to ``(N, C, height, width)``."""
        patches = tokens[:, self.leading :].mT
        return patches.reshape(len(tokens), -1, self.height, self.width)


Grids = tuple[TokensToGrid | None, TokensToGrid | None]


def find_grids(student: Stages, teacher: Stages) -> Grids | None:
    """What turns the tokens of each into a map, where one must be; None if it cannot."""
    if not student.ends or not teacher.ends:
        return None
    shapes = student.ends[0].shape, teacher.ends[0].shape
    if student.kind == teacher.kind == "tokens" and shapes[0][1] == shapes[1][1]:
        return None, None
    grids = _grid(student), _grid(teacher)
    for stages, grid in zip((student, teacher), grids, strict=True):
        if stages.kind == "tokens" and grid is None:
            return None
    return grids


def _grid(stages: Stages) -> TokensToGrid | None:
    if stages.kind == "map" or stages.image is None:
        return None
    image_height, image_width = stages.image
    for leading in range(_MOST_LEADING_TOKENS + 1):
        patches = stages.ends[0].shape[1] - leading
        height = math.isqrt(max(patches, 0) * image_height // image_width)
        width = height * image_width // image_height
        if height and height * width == patches and height * image_width == width * image_height:
            return TokensToGrid(leading, height, width)
    return None

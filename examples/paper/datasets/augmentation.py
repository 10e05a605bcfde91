"""Augmentations of a whole batch of small images at once, where it lies."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .small_images import Format

_LEAST_AREA, _LONGEST = 0.3, 4 / 3  # of a cut: its part of the image, its sides as one to this
_COLOR = 0.4  # by how much of itself brightness, contrast and saturation may change


def shifts(pixels: Tensor, form: Format) -> Tensor:
    """Mirrors half of the images, and shifts each by up to the padding, in both directions.

    Args:
        pixels: ``(N, channels, H, W)``, from 0 to 255.
        form: of the data set: whether a mirrored image is still of its class, its background.

    Returns:
        The same shape, from 0 to 255.
    """
    pixels = _flipped(pixels) if form.flips else pixels
    count, _, height, width = pixels.shape
    padded = F.pad(pixels, [form.padding] * 4, value=form.background)
    top, left = torch.randint(2 * form.padding + 1, (2, count, 1), device=pixels.device)
    rows = (top + torch.arange(height, device=pixels.device))[:, :, None]
    columns = (left + torch.arange(width, device=pixels.device))[:, None, :]
    images = torch.arange(count, device=pixels.device)[:, None, None]
    shifted = padded.permute(0, 2, 3, 1)[images, rows, columns].permute(0, 3, 1, 2)
    # As it is, it would turn the maps of every layer that follows to channels last.
    return shifted.contiguous()


def cuts(pixels: Tensor, form: Format) -> Tensor:
    """Cuts a part out of each image, enlarges it to the image's size and changes its colors.

    ImageNet's usual augmentation, with 0.3 as the smallest part. Arguments and result are those of
    :func:`shifts`; the result has fractions.
    """
    pixels = (_flipped(pixels) if form.flips else pixels).float()
    area = _uniform(pixels, _LEAST_AREA, 1)
    ratio = _uniform(pixels, -math.log(_LONGEST), math.log(_LONGEST)).exp()
    sides = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], 1).clamp(max=1)
    centers = (1 - sides) * (2 * torch.rand_like(sides) - 1)
    # Output positions from -1 to 1 are scaled by the sides and moved to the center.
    where = torch.cat([torch.diag_embed(sides), centers.unsqueeze(2)], 2)
    grid = F.affine_grid(where, list(pixels.shape), align_corners=False)
    return _recolored(F.grid_sample(pixels, grid, padding_mode="border", align_corners=False))


AUGMENTATIONS: dict[str, Callable[[Tensor, Format], Tensor]] = {"shifts": shifts, "cuts": cuts}


def _recolored(pixels: Tensor) -> Tensor:
    """Changes brightness, contrast and saturation of each image, in this order."""
    factors = [_uniform(pixels, 1 - _COLOR, 1 + _COLOR).view(-1, 1, 1, 1) for _ in range(3)]
    pixels = (pixels * factors[0]).clamp(max=255)
    mean = pixels.mean((1, 2, 3), keepdim=True)
    pixels = torch.lerp(mean, pixels, factors[1]).clamp(0, 255)
    gray = pixels.mean(1, keepdim=True)
    return torch.lerp(gray, pixels, factors[2]).clamp(0, 255)


def _flipped(pixels: Tensor) -> Tensor:
    mirrored = torch.rand(len(pixels), 1, 1, 1, device=pixels.device) < 0.5
    return torch.where(mirrored, pixels.flip(3), pixels)


def _uniform(pixels: Tensor, low: float, high: float) -> Tensor:
    return low + (high - low) * torch.rand(len(pixels), device=pixels.device)

"""Writes tiny data sets in the idx format, as MNIST's and Fashion-MNIST's files have it."""

import gzip
import struct
from pathlib import Path

import torch
from torch import Tensor

FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
FILES += ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def write_idx(path: Path, content: Tensor) -> None:
    """Writes bytes; compressed if the name ends in .gz."""
    header = struct.pack(">HBB", 0, 8, content.ndim) + struct.pack(
        f">{content.ndim}I", *content.shape
    )
    data = header + bytes(content.flatten().tolist())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def write_miniature(folder: Path, *, each: int = 10, suffix: str = ".gz") -> tuple[Tensor, Tensor]:
    """Writes ``each`` random images of ten classes, for training and for the test.

    Returns:
        The training images ``(10 * each, 28, 28)`` and their labels.
    """
    generator = torch.Generator().manual_seed(0)
    written = []
    for images, labels in (FILES[:2], FILES[2:]):
        pixels = torch.randint(0, 256, (10 * each, 28, 28), generator=generator)
        classes = torch.arange(10 * each) % 10
        write_idx(folder / f"{images}{suffix}", pixels)
        write_idx(folder / f"{labels}{suffix}", classes)
        written.append((pixels, classes))
    return written[0]

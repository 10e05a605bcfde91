"""Tiny networks, small enough to train for some steps inside a test."""

import torch
from torch import Tensor, nn


class TinyCNN(nn.Module):
    """Two stages, a pooled vector and a classifier."""

    def __init__(self, width: int, classes: int = 3) -> None:
        super().__init__()
        self.stage1 = _stage(1, width, stride=1)
        self.stage2 = _stage(width, 2 * width, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(2 * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.pool(self.stage2(self.stage1(images))).flatten(1))


def _stage(in_channels: int, channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
    )


def cnn_pair(student_classes: int = 3, teacher_classes: int = 3) -> tuple[TinyCNN, TinyCNN]:
    """A seeded student and a wider teacher."""
    torch.manual_seed(0)
    return TinyCNN(4, student_classes), TinyCNN(8, teacher_classes)


def images(batch: int = 8) -> Tensor:
    """Seeded images for TinyCNN."""
    return torch.randn(batch, 1, 8, 8, generator=torch.Generator().manual_seed(1))


class TokenNet(nn.Module):
    """An embedding and a layer that keeps its tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, width)
        self.layer = nn.Sequential(nn.Linear(width, width), nn.Tanh())
        self.fc = nn.Linear(width, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.fc(self.layer(self.embed(input_ids)).mean(1))

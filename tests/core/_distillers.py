"""A student, a teacher and a distiller between them, and steps with them."""

import torch
import torch.nn.functional as F
from _models import cnn_pair, images

from vid_loss import Distiller

PAIRS = {"stage1": "stage1", "stage2": "stage2"}
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])


def make(pairs=None, **options):
    student, teacher = cnn_pair()
    return (
        student,
        teacher,
        Distiller(student, teacher, pairs or PAIRS, example=images(), **options),
    )


def train(student, distiller, optimizer, steps):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(student(images()), LABELS) + distiller(images())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses

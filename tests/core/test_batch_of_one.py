"""A last batch of one sample: what helps is named, and what is named helps."""

from functools import partial

import pytest
import torch
from _models import TokenNet, images
from torch import nn

from vid_loss import Distiller, Pair, VIDLoss


class Net(nn.Module):
    """Ends in maps of 1 x 1, without a batch norm of its own."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(1, width, 8)
        self.fc = nn.Linear(width, 3)

    def forward(self, x):
        return self.fc(self.conv(x).flatten(1))


def nets():
    torch.manual_seed(0)
    return Net(40), Net(48)


def test_a_batch_of_one_names_what_helps():
    student, teacher = nets()
    distiller = Distiller(student, teacher, {"conv": "conv"}, example=images())
    student(images(1))
    message = r"Pair 'conv' -> 'conv': expected more than one position .*drop_last=True.*\"group\""
    with pytest.raises(ValueError, match=message):
        distiller(images(1))
    student(images(2))
    assert distiller(images(2)).isfinite()


def test_group_norm_helps():
    """Not only without an error: the student learns from that batch."""
    student, teacher = nets()
    pair = Pair("conv", "conv", loss=partial(VIDLoss, norm="group"))
    distiller = Distiller(student, teacher, [pair], example=images())
    for _ in range(2):  # before that a batch of one has no spread
        student(images())
        distiller(images())
    student(images(1))
    distiller(images(1)).backward()
    assert student.conv.weight.grad.norm() > 1e-6


def test_one_token_that_counts_names_layer_norm():
    torch.manual_seed(0)
    student, teacher = TokenNet(4), TokenNet(6)
    pair = Pair("layer", "layer", loss=partial(VIDLoss, norm="batch"))
    ids = torch.randint(0, 20, (2, 5))
    distiller = Distiller(student, teacher, [pair], example=ids)
    mask = torch.zeros(2, 5)
    mask[0, 0] = 1
    student(ids)
    with pytest.raises(ValueError, match=r"more than one position that counts .*norm=\"layer\""):
        distiller(ids, token_mask=mask)
    pair = Pair("layer", "layer", loss=partial(VIDLoss, norm="layer"))
    distiller = Distiller(student, teacher, [pair], example=ids)
    student(ids)
    assert distiller(ids, token_mask=mask).isfinite()

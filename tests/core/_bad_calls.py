"""Distillers and losses of what they are given, be it bad."""

from functools import partial

import torch
from _models import cnn_pair, images
from torch import nn

from vid_loss import Distiller, Pair, VIDLoss

LABELS = torch.zeros(8, dtype=torch.long)
STAGE = {"stage2": "stage2"}
MISSING = object()


class NoForward(nn.Module):
    """Has none."""


def build(pairs=STAGE, student=MISSING, teacher=MISSING, **options):
    """A distiller, but for what is given."""
    own, taught = cnn_pair()
    student = own if student is MISSING else student
    teacher = taught if teacher is MISSING else teacher
    return Distiller(student, teacher, pairs, **{"example": images(), **options})


def called(call, pairs=STAGE, **options):
    """What a distiller does whose student has run."""
    student, teacher = cnn_pair()
    distiller = Distiller(student, teacher, pairs, example=images(), **options)
    student(images())
    return call(distiller)


def pair(**options):
    return build([Pair("stage2", "stage2", **options)])


def loss(**options):
    return pair(loss=partial(VIDLoss, **options))

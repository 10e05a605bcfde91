"""Every argument of every constructor, given things of kinds that it is not for.

Each is taken or refused in a message that says what was expected; none ends in Python's or torch's
own words about something inside.
"""

import inspect
import math

import pytest
import torch
from torch import nn

from vid_loss import (
    Distiller,
    FeatureTap,
    FitNetLoss,
    KDLoss,
    LwFLoss,
    Pair,
    VIDLoss,
    list_layers,
    match_layers,
)
from vid_loss.losses.gaussian import gaussian_nll
from vid_loss.losses.heads import mean_head
from vid_loss.teachers import Teachers

BATCH, IMAGES = torch.zeros(4, 4), torch.zeros(2, 3, 8, 8)
MAPS = {"student_shape": (2, 4, 3, 3), "teacher_shape": (2, 8, 3, 3)}
THINGS = [
    *(None, "", "0.5", b"x", 3, -1, 0, 1.5, math.nan, True, object()),
    *([1], (), {"a": 1}, torch.ones(2), nn.Linear),
]


def net(width):
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))


def cnn(width):
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, width, 3))


CALLS = {
    VIDLoss: MAPS,
    FitNetLoss: MAPS,
    KDLoss: {},
    LwFLoss: {"student_shape": (2, 4), "teacher_shape": (2, 6)},
    Pair: {"student": "0", "teacher": "0"},
    Distiller: {"student": net(5), "teacher": net(7), "pairs": {"0": "0"}, "example": BATCH},
    FeatureTap: {"model": net(5), "layers": ["0"]},
    Teachers: {"models": {"a": net(7)}},
    list_layers: {"model": net(5), "example": BATCH},
    match_layers: {"student": cnn(4), "teacher": cnn(6), "example": IMAGES},
    mean_head: MAPS,
    gaussian_nll: {"mean": BATCH, "target": BATCH, "var": torch.ones(4)},
}
ARGUMENTS = [
    pytest.param(call, argument, id=f"{call.__name__}-{argument}")
    for call in CALLS
    for argument in inspect.signature(call).parameters
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("call", "argument"), ARGUMENTS)
def test_a_thing_of_another_kind_is_taken_or_named(call, argument):
    refused = []
    for thing in THINGS:
        if argument == "example" and isinstance(thing, torch.Tensor | tuple | dict):
            continue  # the model's own to refuse
        try:
            call(**{**CALLS[call], argument: thing})
        except (TypeError, ValueError) as error:
            refused.append((thing, str(error)))
    assert refused or argument == "owner", "everything was taken"  # that one is for messages
    # A class or a function may itself refuse to be called.
    assert all("expected" in text or "missing" in text for _, text in refused), refused

"""Pairs, layers and losses that cannot be meant: error, how its message begins, and the calls."""

import torch
from _bad_calls import build, called, loss, pair
from _models import TinyCNN, images
from torch import nn

from vid_loss import FeatureTap, KDLoss, Pair

OF_PAIRS = [
    (
        RuntimeError,
        "Pair 'stage2' -> 'stage2': expected finite features of the teacher",
        lambda: build(example=images() * float("nan")),
    ),
    (
        TypeError,
        "FeatureTap, teacher: expected a model that takes hooks; it is TorchS",
        lambda: build(teacher=torch.jit.script(TinyCNN(4))),
    ),
    (
        TypeError,
        "teacher_inputs: expected a tensor, a tuple of positional or a dict o",
        lambda: build(teacher_inputs=lambda x: None),
        lambda: build(teacher_inputs=lambda x: [x]),
    ),
    (
        TypeError,
        "Pair, student: expected a layer's name",
        lambda: build(pairs={2: 3}),
        lambda: build(pairs={TinyCNN(4).stage1: "stage1"}),
        lambda: build([Pair(3, "stage2")]),
    ),
    (
        TypeError,
        "Pair, teacher: expected a layer's name",
        lambda: build(pairs={"stage2": ["stage1", "stage2"]}),
        lambda: build([Pair("stage2", None)]),
    ),
    (
        TypeError,
        "Layer: expected a module's name",
        lambda: FeatureTap(TinyCNN(4), [nn.Linear(1, 1)]),
    ),
    (
        ValueError,
        "Pair 'stage2' -> 'stage2': expected a name of its own",
        lambda: build(pairs=[Pair("stage2", "stage2")] * 2),
    ),
    (
        ValueError,
        "Layer 'stage3' of the student: expected a name from named_modules().",
        lambda: build(pairs={"stage3": "stage2"}),
    ),
    (
        ValueError,
        "Layer 'layer4' of the teacher: expected a name from named_modules().",
        lambda: build(pairs={"stage2": "layer4"}),
    ),
    (
        ValueError,
        "Layer 'stage2[': expected 'name', 'name:input', 'name[0]' or 'name[\"",
        lambda: build(pairs={"stage2[": "stage2"}),
    ),
    (
        TypeError,
        "Layer 'stage2[0]': expected a tuple or a mapping to take 0 from",
        lambda: build(pairs={"stage2[0]": "stage2"}),
    ),
    (
        ValueError,
        "Pair 'stage2' -> 'fc', VIDLoss: expected two features of one layout",
        lambda: build(pairs={"stage2": "fc"}),
    ),
    (
        ValueError,
        "Pair 'stage2' -> 'stage2', weight: expected a finite number, 0 or mo",
        lambda: pair(weight="3"),
        lambda: pair(weight=float("nan")),
        lambda: pair(weight=-1),
        lambda: pair(weight=torch.ones(2)),
        lambda: pair(weight=[1, 2]),
        lambda: called(lambda d: d.set_weight("stage2->stage2", "a")),
        lambda: called(lambda d: d.set_weight("stage2->stage2", float("inf"))),
    ),
    (
        TypeError,
        "Pair 'stage2' -> 'stage2', loss: expected a loss module or what buil",
        lambda: pair(loss="vid"),
        lambda: pair(loss=None),
    ),
    (
        TypeError,
        "Pair 'stage2' -> 'stage2': expected loss to be built from the two fe",
        lambda: pair(loss=KDLoss),
        lambda: pair(loss=lambda s, t: (s - t).mean()),
    ),
    (
        RuntimeError,
        "Pair 'stage2' -> 'stage2': expected a loss that works on the two fea",
        lambda: pair(loss=nn.MSELoss),
        lambda: pair(loss=nn.MSELoss()),
        lambda: loss(head=nn.Conv2d(8, 3, 1)),
        lambda: loss(head=nn.Conv2d(3, 16, 1)),
    ),
    (
        ValueError,
        "Pair 'stage2' -> 'stage2', KDLoss: expected a vector (N, C) or token",
        lambda: pair(loss=KDLoss()),
    ),
    (
        ValueError,
        "Pair 'stage2' -> 'stage2': expected the loss to be a scalar",
        lambda: loss(reduction="none"),
    ),
    (
        ValueError,
        "Pair 'stage2' -> 'stage2', VIDLoss, reduction: expected one of ('mea",
        lambda: loss(reduction="avg"),
    ),
    (
        ValueError,
        "Pair 'stage2' -> 'stage2', VIDLoss, norm: expected one of ('batch', ",
        lambda: loss(norm="bn"),
        lambda: loss(norm=1),
        lambda: loss(norm=[]),
    ),
    (
        ValueError,
        "Pair 'stage2' -> 'stage2', VIDLoss, hidden_channels: expected a posi",
        lambda: loss(hidden_channels=0),
        lambda: loss(hidden_channels="64"),
        lambda: loss(hidden_channels=64.0),
    ),
    (
        ValueError,
        "Pair 'stage2' -> 'stage2', VIDLoss, momentum: expected a number abov",
        lambda: loss(momentum=2),
        lambda: loss(momentum="0.1"),
    ),
    (
        ValueError,
        "Pair 'stage2' -> 'stage2', VIDLoss, var_floor: expected a positive n",
        lambda: loss(var_floor=0),
        lambda: loss(var_floor=None),
    ),
    (
        ValueError,
        "Pair 'stage2' -> 'stage2', VIDLoss, variance: expected one of ('runn",
        lambda: loss(variance="train"),
        lambda: loss(variance=True),
    ),
    (
        ValueError,
        "Pair 'stage2' -> 'stage2', VIDLoss, init_var: expected a number abov",
        lambda: loss(variance="trained", init_var=0),
        lambda: loss(variance="trained", init_var="5"),
    ),
    (
        ValueError,
        "Pair 'stage2' -> 'stage2', VIDLoss, head: expected a module",
        lambda: loss(head=nn.Linear),
    ),
    (
        ValueError,
        "Pair 'stage2' -> 'stage2', VIDLoss, hidden_channels and norm: expect",
        lambda: loss(head=nn.Conv2d(8, 16, 1), norm="batch"),
    ),
    (
        ValueError,
        "Pair 'stage2' -> 'stage2', VIDLoss, standardize: expected True or Fa",
        lambda: loss(standardize="no"),
    ),
    (
        ValueError,
        "Pair 'stage2' -> 'stage2', student feature: expected channel_dim to ",
        lambda: pair(channel_dim=0),
        lambda: pair(channel_dim=7),
    ),
    (
        TypeError,
        "Pair 'stage2' -> 'stage2', channel_dim: expected an int, None or a t",
        lambda: pair(channel_dim="last"),
        lambda: pair(channel_dim=[1, 1]),
    ),
    (
        TypeError,
        "Pair 'stage2' -> 'stage2', student_transform: expected a function of",
        lambda: pair(student_transform="mean"),
    ),
    (
        TypeError,
        "Pair 'stage2' -> 'stage2', student_transform: expected it to return ",
        lambda: pair(student_transform=lambda x: None),
    ),
    (
        ValueError,
        "Pair 'stage2' -> 'stage2', student_transform: expected nothing to be",
        lambda: pair(student_transform=nn.Conv2d(8, 16, 1)),
    ),
    (
        ValueError,
        "Pair 'stage2' -> 'stage2', name: expected a name that is not empty a",
        lambda: pair(name=3),
        lambda: pair(name=""),
        lambda: pair(name="keys"),
    ),
]

"""Calls of a distiller that cannot be meant: error, how its message begins, and the calls."""

import numpy as np
import torch
from _bad_calls import LABELS, NoForward, build, called
from _models import TinyCNN, TokenNet, images
from torch import nn

from vid_loss import Distiller, Pair

OF_DISTILLER = [
    (
        TypeError,
        "Distiller, example: expected arguments for forward(images: torch.Ten",
        lambda: build(example=(images(), LABELS)),
        lambda: build(example=(8, 1, 8, 8)),
        lambda: build(example=()),
        lambda: build(example={}),
        lambda: build(example={"imgs": images()}),
    ),
    (
        TypeError,
        "Distiller, example: expected a tensor, a tuple of positional or a di",
        lambda: build(example=[images(), LABELS]),
        lambda: build(example=None),
        lambda: build(example=images().numpy()),
        lambda: build(example=torch.utils.data.DataLoader(images())),
        lambda: build(example="images"),
    ),
    (
        RuntimeError,
        "Distiller, example: expected inputs that the student runs on",
        lambda: build(example=LABELS),
        lambda: build(example=(images() * 100).to(torch.uint8)),
        lambda: build(example=images().double()),
    ),
    (
        ValueError,
        "Distiller, example: expected inputs that the student runs on",
        lambda: build(example=images()[0]),
    ),
    (
        TypeError,
        "Distiller, student: expected an nn.Module",
        lambda: Distiller(None, TinyCNN(4), {"stage2": "stage2"}, example=images()),
        lambda: build(student="student.pt"),
        lambda: build(student=TinyCNN),
        lambda: build(student=TinyCNN(4).state_dict()),
        lambda: build(student=[TinyCNN(4)]),
        lambda: build(student=lambda x: x),
    ),
    (
        NotImplementedError,
        "Distiller, example: expected inputs that the student runs on",
        lambda: build(student=NoForward(), pairs={"": "fc"}),
    ),
    (
        TypeError,
        "Distiller, teacher: expected an nn.Module",
        lambda: build(teacher=None),
        lambda: build(teacher="teacher.pt"),
        lambda: build(teacher=TinyCNN),
        lambda: build(teacher=TinyCNN(4).state_dict()),
        lambda: build(teacher=[TinyCNN(4), TinyCNN(4)]),
        lambda: build(teacher=torch.relu),
        lambda: build(teacher=3),
    ),
    (
        ValueError,
        "Distiller, teacher: expected weights in memory",
        lambda: build(teacher=TinyCNN(4).to("meta")),
    ),
    (
        ValueError,
        "Distiller, student: expected weights in memory",
        lambda: build(student=TinyCNN(4).to("meta")),
    ),
    (
        RuntimeError,
        "Distiller, teacher: expected inputs that the teacher runs on",
        lambda: build(teacher=TinyCNN(4).double()),
        lambda: build(teacher=TinyCNN(4).bfloat16()),
        lambda: build(teacher=TokenNet(4), pairs={"fc": "layer"}),
    ),
    (
        TypeError,
        "Distiller, teacher_dtype: expected a floating-point torch.dtype or N",
        lambda: build(teacher_dtype="bfloat16"),
        lambda: build(teacher_dtype="torch.float16"),
        lambda: build(teacher_dtype=torch.int8),
        lambda: build(teacher_dtype=True),
        lambda: build(teacher_dtype=np.float16),
    ),
    (
        TypeError,
        "Distiller, teacher_inputs: expected a function of the student's argu",
        lambda: build(teacher_inputs="resize"),
        lambda: build(teacher_inputs=lambda x, y: x),
        lambda: build(teacher_inputs=lambda: 1),
    ),
    (
        RuntimeError,
        "Distiller, teacher: expected its inputs as they were; it, or teacher",
        lambda: build(teacher_inputs=lambda x: x.mul_(2)),
    ),
    (
        TypeError,
        "Distiller, stop_teacher: expected True or False",
        lambda: build(stop_teacher="stage2"),
    ),
    (
        TypeError,
        "Distiller, cache: expected a FeatureCache or None",
        lambda: build(cache="folder"),
        lambda: build(cache=True),
    ),
    (
        TypeError,
        "Distiller, pairs: expected a dict of student layer to teacher layer ",
        lambda: build(pairs=None),
        lambda: build(pairs="stage2"),
        lambda: build(pairs=["stage2"]),
        lambda: build(pairs=[("stage2", "stage2")]),
        lambda: build(pairs=Pair("stage2", "stage2")),
        lambda: build(pairs=nn.Linear(1, 1)),
        lambda: build(pairs={"stage2"}),
    ),
    (
        ValueError,
        "Distiller, pairs: expected at least one pair",
        lambda: build(pairs={}),
        lambda: build(pairs=[]),
    ),
    (
        TypeError,
        "Distiller, teacher: expected arguments for forward(images: torch.Ten",
        lambda: called(lambda d: d()),
    ),
    (
        TypeError,
        "Distiller, teacher: expected inputs that the teacher runs on",
        lambda: called(lambda d: d([images()])),
        lambda: called(lambda d: d(images().numpy())),
    ),
    (
        TypeError,
        "Distiller, teacher_features: expected a dict of ['stage2'] to tensor",
        lambda: called(lambda d: d(teacher_features=[torch.zeros(8, 16, 4, 4)])),
        lambda: called(lambda d: d(teacher_features=torch.zeros(8, 16, 4, 4))),
        lambda: called(lambda d: d(teacher_features={"stage2": None})),
    ),
    (
        TypeError,
        "Distiller, token_mask: expected a tensor",
        lambda: called(lambda d: d(images(), token_mask=[1] * 8)),
        lambda: called(lambda d: d(images(), token_mask=np.ones((8, 8, 8)))),
    ),
    (
        ValueError,
        "Distiller, parameter_groups, lr: expected a number, 0 or more",
        lambda: build().parameter_groups(lr="big"),
        lambda: build().parameter_groups(lr=-1),
    ),
    (
        TypeError,
        "Distiller, add_to: expected the student's optimizer",
        lambda: build().add_to(None),
        lambda: build().add_to([]),
    ),
    (
        TypeError,
        "Distiller, parameter_groups, optimizer: expected an optimizer or Non",
        lambda: build().parameter_groups(0.1),
    ),
    (
        ValueError,
        "Distiller, parameter_groups, weight_decay: expected a number, 0 or m",
        lambda: build().parameter_groups(weight_decay="a"),
        lambda: build().parameter_groups(weight_decay=-0.1),
    ),
    (
        RuntimeError,
        "Distiller, diagnostics: expected a training step before",
        lambda: build().diagnostics(),
    ),
]

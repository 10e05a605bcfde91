"""Calls that cannot be meant: error, how its message begins, and calls that end in it."""

from functools import partial

import numpy as np
import torch
from _models import TinyCNN, TokenNet, cnn_pair, images
from torch import nn

from vid_loss import (
    DistillationModel,
    Distiller,
    FeatureTap,
    FitNetLoss,
    KDLoss,
    LwFLoss,
    Pair,
    VIDLoss,
    gradient_shares,
    list_layers,
    match_layers,
)
from vid_loss.cache import FeatureCache
from vid_loss.losses import gaussian_nll

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

OF_OTHERS = [
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
        "Layer: expected a module's name",
        lambda: build(pairs={"stage2": ["stage1", "stage2"]}),
        lambda: build(pairs={2: 3}),
        lambda: build(pairs={TinyCNN(4).stage1: "stage1"}),
        lambda: build([Pair(3, "stage2")]),
        lambda: build([Pair("stage2", None)]),
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
    (
        TypeError,
        "expected the shape of a feature, the batch first",
        lambda: VIDLoss(torch.zeros(8, 4), torch.zeros(8, 4)),
        lambda: VIDLoss(64, 128),
        lambda: VIDLoss((8, 4.0), (8, 4)),
        lambda: FitNetLoss(4, 8),
    ),
    (
        ValueError,
        "expected a feature (N, C), (N, L, C), (N, C, H, W) or (N, C, D, H, W",
        lambda: VIDLoss((8,), (8,)),
    ),
    (
        TypeError,
        "VIDLoss: expected a floating-point tensor as the student's feature",
        lambda: VIDLoss((8, 4), (8, 4))(np.zeros((8, 4)), np.zeros((8, 4))),
        lambda: VIDLoss((8, 4), (8, 4))(torch.zeros(8, 4, dtype=torch.long), torch.zeros(8, 4)),
        lambda: VIDLoss((8, 4), (8, 4))(None, torch.zeros(8, 4)),
    ),
    (
        TypeError,
        "mask: expected a tensor",
        lambda: VIDLoss((8, 4, 4), (8, 4, 4))(torch.zeros(8, 4, 4), torch.zeros(8, 4, 4), mask=[1]),
    ),
    (
        ValueError,
        "KDLoss, temperature: expected a positive number",
        lambda: KDLoss(0),
        lambda: KDLoss("4"),
        lambda: KDLoss(None),
    ),
    (
        ValueError,
        "LwFLoss, temperature: expected a positive number",
        lambda: LwFLoss((8, 4), (8, 4), temperature="2"),
    ),
    (
        RuntimeError,
        "The student has not run forward in train mode with gradients on sinc",
        lambda: build()(images()),
    ),
    (
        ValueError,
        "Pair 'stage2' -> 'stage2', VIDLoss: expected one batch size",
        lambda: called(lambda d: d(images(4))),
    ),
    (
        ValueError,
        "Pair 'stage2' -> 'stage2', VIDLoss, mask: expected a mask of shape (",
        lambda: called(lambda d: d(images(), token_mask=torch.ones(8))),
    ),
    (
        RuntimeError,
        "The teacher's tap is closed.",
        lambda: called(lambda d: (d.close(), d(images()))),
    ),
    (
        KeyError,
        "\"Distiller: expected one of ['stage2->stage2']",
        lambda: called(lambda d: d.set_weight("layer4", 1)),
    ),
    (
        TypeError,
        "DistillationModel, distiller: expected a Distiller",
        lambda: DistillationModel(build(), TinyCNN(4)),
    ),
    (
        ValueError,
        "DistillationModel, student: expected the model that the distiller wa",
        lambda: DistillationModel(TinyCNN(4), build()),
    ),
    (
        TypeError,
        "DistillationModel, student: expected an nn.Module",
        lambda: DistillationModel(None, None),
    ),
    (
        TypeError,
        "FeatureTap, layers: expected a list of names",
        lambda: FeatureTap(TinyCNN(4), "stage1"),
        lambda: FeatureTap(TinyCNN(4), None),
    ),
    (TypeError, "FeatureTap, model: expected an nn.Module", lambda: FeatureTap(None, ["stage1"])),
    (
        ValueError,
        "FeatureTap, record: expected one of ('always', 'training', 'read')",
        lambda: FeatureTap(TinyCNN(4), ["stage1"], record="train"),
    ),
    (
        TypeError,
        "list_layers, model: expected an nn.Module",
        lambda: list_layers(None, images()),
        lambda: match_layers(TinyCNN(4), None, images()),
    ),
    (
        TypeError,
        "list_layers, example: expected a tensor, a tuple of positional or a ",
        lambda: list_layers(TinyCNN(4), [images()]),
    ),
    (
        ValueError,
        "list_layers, depth: expected 1 or more, or None",
        lambda: list_layers(TinyCNN(4), images(), depth="2"),
    ),
    (
        TypeError,
        "match_layers, example: expected a tensor, a tuple of positional or a",
        lambda: match_layers(TinyCNN(4), TinyCNN(8), [images()]),
    ),
    (
        TypeError,
        "list_layers, example: expected arguments for forward(images: torch.T",
        lambda: match_layers(TinyCNN(4), TinyCNN(8), (images(), LABELS)),
    ),
    (
        TypeError,
        "FeatureCache, max_bytes: expected a number of bytes or None",
        lambda: FeatureCache("f", max_bytes="10GB"),
        lambda: FeatureCache("f", max_bytes=1e9),
    ),
    (
        ValueError,
        "FeatureCache, max_bytes: expected a number of bytes or None",
        lambda: FeatureCache("f", max_bytes=-5),
    ),
    (
        ValueError,
        "FeatureCache, dtype: expected torch.float16 or torch.float32",
        lambda: FeatureCache("f", dtype="float16"),
        lambda: FeatureCache("f", dtype=torch.int8),
    ),
    (
        TypeError,
        "FeatureCache, folder: expected the name of a folder",
        lambda: FeatureCache(None),
        lambda: FeatureCache(""),
        lambda: FeatureCache(3),
    ),
    (
        ValueError,
        "FeatureCache, sample_index: expected integers (N,), each sample's pl",
        lambda: called(lambda d: d(images()), cache=FeatureCache("g")),
        lambda: called(lambda d: d(images(), sample_index=torch.rand(8)), cache=FeatureCache("g3")),
        lambda: called(
            lambda d: d(images(), sample_index=-torch.arange(8)), cache=FeatureCache("g4")
        ),
        lambda: called(
            lambda d: d(images(), sample_index=list("abcdefgh")), cache=FeatureCache("g5")
        ),
    ),
    (
        ValueError,
        "FeatureCache, sample_index: expected an index for each of 8 samples",
        lambda: called(lambda d: d(images(), sample_index=range(3)), cache=FeatureCache("g2")),
    ),
    (
        TypeError,
        "gradient_shares, losses: expected a dict of names to losses",
        lambda: gradient_shares([torch.zeros(())], TinyCNN(4)),
    ),
    (
        TypeError,
        "gradient_shares, student: expected an nn.Module",
        lambda: gradient_shares({"a": torch.zeros((), requires_grad=True)}, None),
    ),
    (
        ValueError,
        "gradient_shares, losses: expected losses with a gradient",
        lambda: gradient_shares({"a": torch.zeros(())}, TinyCNN(4)),
    ),
    (
        ValueError,
        "gaussian_nll: expected mean and target of one shape",
        lambda: gaussian_nll(torch.zeros(2, 3), torch.zeros(2, 4), torch.ones(3)),
    ),
    (
        TypeError,
        "gaussian_nll, var: expected a tensor, shape (3,)",
        lambda: gaussian_nll(torch.zeros(2, 3), torch.zeros(2, 3), 1.0),
    ),
    (
        ValueError,
        "gaussian_nll, reduction: expected one of ('mean', 'batchmean', 'sum'",
        lambda: gaussian_nll(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(3), reduction="avg"),
    ),
]

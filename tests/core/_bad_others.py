"""Other calls that cannot be meant: error, how its message begins, and the calls."""

import numpy as np
import torch
from _bad_calls import LABELS, build, called
from _models import TinyCNN, images

from vid_loss import (
    DistillationModel,
    FeatureTap,
    FitNetLoss,
    KDLoss,
    LwFLoss,
    VIDLoss,
    gradient_shares,
    list_layers,
    match_layers,
)
from vid_loss.cache import FeatureCache
from vid_loss.losses import gaussian_nll

OF_OTHERS = [
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
        TypeError,
        "gradient_shares, losses: expected tensors of one number each; got 0.5 as 'a'",
        lambda: gradient_shares({"b": torch.zeros((), requires_grad=True), "a": 0.5}, TinyCNN(4)),
    ),
    (
        TypeError,
        "gradient_shares, losses: expected tensors of one number each; got shape (3,",
        lambda: gradient_shares({"a": torch.zeros(3, requires_grad=True)}, TinyCNN(4)),
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
        "gaussian_nll, var: expected a tensor; got 1.0.",
        lambda: gaussian_nll(torch.zeros(2, 3), torch.zeros(2, 3), 1.0),
    ),
    (
        ValueError,
        "gaussian_nll, reduction: expected one of ('mean', 'batchmean', 'sum'",
        lambda: gaussian_nll(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(3), reduction="avg"),
    ),
]

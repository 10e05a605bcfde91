"""A script may make all its tensors elsewhere: what belongs on the host is made on the host.

The meta device has no values, so that whatever is made there and read is an error.
"""

from functools import partial

import pytest
import torch
from _models import cnn_pair, images
from torch.utils.data import TensorDataset

from vid_loss import (
    ATLoss,
    DistillationModel,
    Distiller,
    FitNetLoss,
    KDLoss,
    LwFLoss,
    Pair,
    VIDLoss,
)
from vid_loss.cache import FeatureCache, FixedAugmentations
from vid_loss.diagnostics import log_likelihood
from vid_loss.plots import plot_log_likelihood
from vid_loss.subsets import images_per_class, labels_per_class

PAIRS = [
    Pair("stage1", "stage1", loss=partial(VIDLoss, positions=0.25)),
    Pair("stage2", "stage2"),
    Pair("stage2", "stage2", loss=FitNetLoss),
    Pair("stage2", "stage2", loss=ATLoss()),
    Pair("fc", "fc", loss=KDLoss()),
    Pair("fc:input", "fc", loss=LwFLoss),
]


def make(**options):
    student, teacher = cnn_pair()
    return DistillationModel(
        student, Distiller(student, teacher, PAIRS, example=images(), **options)
    )


BATCH = images()


def steps(model, **call):
    values = []
    torch.manual_seed(2)
    for _ in range(4):
        values.append(model(BATCH, **call)[1])
        values[-1].backward()
    return torch.stack(values), model.distiller.diagnostics()


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_training_and_diagnostics(device, request):
    expected = steps(make())
    model = make()
    if device == "gpu":
        request.getfixturevalue("as_on_a_gpu")
    with torch.device("meta"):
        found = steps(model)
    torch.testing.assert_close(found[0], expected[0])
    assert found[1].keys() == expected[1].keys()


@pytest.mark.parametrize("index", [list, torch.as_tensor], ids=["list", "tensor"])
def test_a_cache(tmp_path, index):
    index, courses = index(range(8)), []
    for _ in ("computed", "read"):
        model = make(cache=FeatureCache(tmp_path))
        with torch.device("meta"):
            courses.append(steps(model, sample_index=index)[0])
            model.distiller.cache.flush()
    torch.testing.assert_close(*courses)


def test_subsets():
    labels = [0, 1, 1, 0, 2, 2, 2, 1]
    expected = images_per_class(labels, 2, seed=0)
    kept = labels_per_class(torch.tensor(labels), 1, seed=0)
    given = torch.tensor(labels)
    with torch.device("meta"):
        assert images_per_class(given, 2, seed=0) == expected
        assert torch.equal(labels_per_class(given, 1, seed=0), kept)


def test_fixed_augmentations():
    dataset = FixedAugmentations(TensorDataset(torch.arange(3)), views=2, seed=0)
    with torch.device("meta"):
        assert dataset.view(1, 0)[0][0] == 1
        assert dataset[1][0][0] == 1


def test_a_picture_of_the_likelihood():
    model, batch = make(), BATCH[:3]
    steps(model)
    with torch.device("meta"):
        figure = plot_log_likelihood(batch, log_likelihood(model.distiller, batch))
    assert len(figure.axes) == 3 * (1 + 2) + 2  # pictures, two maps, and their scales

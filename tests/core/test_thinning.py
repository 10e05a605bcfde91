"""Parts of the teacher's maps are drawn before the student runs: the loss is the same."""

import copy
import gc
import weakref
from functools import partial

import pytest
import torch
from _models import images
from _thinning import QUARTER, make, pairs
from torch import nn

from vid_loss import DistillationModel, Distiller, FitNetLoss, Pair, VIDLoss
from vid_loss.terms._thinning import Thinning


def steps(model, batches, **call):
    """What each step came to, and the gradients; the draws are those of one seed."""
    torch.manual_seed(2)
    values = []
    for batch in batches:
        values.append(model(batch, **call)[1])
        values[-1].backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return torch.stack(values), gradients, model.distiller.diagnostics()


def both(monkeypatch, chosen, batches, **call):
    """The same with thinning and without."""
    thinned = steps(make(chosen), batches, **call)
    monkeypatch.setattr(Thinning, "thin", lambda *_: None)
    return thinned, steps(make(chosen), batches, **call)


@pytest.fixture
def drawn(monkeypatch):
    """Counts the parts that are drawn before the student's forward."""
    count = []
    thin = Thinning.thin

    def counted(self, features, *rest):
        thin(self, features, *rest)
        count.append(sorted(features.parts))

    monkeypatch.setattr(Thinning, "thin", counted)
    return count


@pytest.mark.parametrize("share", [0.25, 0.5, 0.11, 0.03])
@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean"])
def test_the_loss_is_that_of_maps_thinned_later(monkeypatch, share, reduction):
    chosen = pairs(partial(VIDLoss, positions=share, reduction=reduction))
    found, expected = both(monkeypatch, chosen, [images()] * 4)
    torch.testing.assert_close(found[:2], expected[:2])
    assert found[2] == expected[2]


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (6, 10)])
def test_so_it_is_of_maps_with_masks(monkeypatch, size):
    batch = torch.randn(4, 1, *size)
    mask = torch.zeros(4, *size)
    mask[:2], mask[2, 2:] = 1, 1
    found, expected = both(monkeypatch, pairs(), [batch] * 4, token_mask=mask)
    torch.testing.assert_close(found[:2], expected[:2])
    assert found[2] == expected[2]


def test_the_first_step_of_inputs_of_a_size_learns_and_later_ones_drop(drawn):
    model = make(pairs())
    wide = torch.randn(8, 1, 8, 12)
    for batch in (images(), images(), wide, images()[:3], wide):
        model(batch)
    both = ["stage1", "stage2"]
    assert drawn == [[], both, [], both, both]


def test_whole_maps_are_gone_when_the_student_runs():
    model = make(pairs())
    held = []
    teacher = model.distiller._teacher.tap.model
    teacher.stage2.register_forward_hook(lambda *x: held.append(weakref.ref(x[-1])))
    alive = []
    model.student.register_forward_pre_hook(lambda *_: alive.append(held[-1]() is not None))
    for _ in range(2):
        model(images())
        gc.collect()
    assert alive == [True, False]


class Strided(nn.Module):
    """Its map is larger than the teacher's where a side is odd."""

    def __init__(self, width):
        super().__init__()
        self.stage1 = nn.Conv2d(1, width, 3, 2, padding=1)

    def forward(self, x):
        return self.stage1(x)


class Floored(Strided):
    def __init__(self, width):
        super().__init__(width)
        self.stage1 = nn.Conv2d(1, width, 2, 2)


def test_maps_that_differ_for_some_inputs_are_pooled_there():
    student, teacher = Strided(3), Floored(5)
    example = torch.randn(2, 1, 8, 8)
    distiller = Distiller(
        student, teacher, [Pair("stage1", "stage1", loss=QUARTER)], example=example
    )
    model = DistillationModel(student, distiller)
    for side in (8, 8, 9, 9, 8):
        assert model(torch.randn(2, 1, side, side))[1].isfinite()
    assert distiller._thinning._alike == {("stage1", (torch.Size([1, 8, 8]),), torch.Size([4, 4]))}


OTHERS = {
    "another loss": Pair("stage1", "stage1", loss=FitNetLoss),
    "all positions": Pair("stage1", "stage1", name="all"),
    "another share": Pair("stage1", "stage1", loss=partial(VIDLoss, positions=0.5), name="a half"),
    "a transform": Pair(
        "stage1", "stage1", loss=QUARTER, teacher_transform=torch.tanh, name="transform"
    ),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_a_layer_that_another_loss_needs_otherwise_is_whole(other, drawn):
    model = make([*pairs(), other])
    for _ in range(2):
        model(images())
    assert drawn[-1] == ["stage2"]
    model.distiller.set_weight(other.label, 0.0)
    model(images())
    model(images())
    assert drawn[-1] == ["stage1", "stage2"]


@pytest.mark.parametrize("make_hook", [lambda loss: loss.register_forward_hook(lambda *_: None)])
def test_a_loss_that_somebody_looks_into_gets_whole_maps(make_hook, drawn):
    model = make(pairs())
    for loss in model.distiller.losses.values():
        make_hook(loss)
    for _ in range(2):
        model(images())
    assert drawn[-1] == []


class Placed(nn.Module):
    """A loss of somebody's own, for which positions are another thing."""

    def __init__(self, *_):
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(3, 2))

    def forward(self, student, teacher):
        return self.positions.sum() + student.mean()


def test_another_loss_may_have_positions_of_its_own(drawn):
    model = make([Pair("stage1", "stage1", loss=Placed), *pairs()])
    for _ in range(2):
        model(images())
    assert drawn[-1] == ["stage2"]


def test_features_that_a_user_asks_for_are_whole():
    model = make(pairs())
    for _ in range(2):
        model(images())
    features = model.distiller.teacher_features(images())
    assert features["stage1"].shape[2:] == (8, 8)
    model.student(images())
    assert model.distiller(teacher_features=features).isfinite()


def test_images_of_ever_new_sizes_are_not_remembered_for_ever(monkeypatch, drawn):
    monkeypatch.setattr("vid_loss.terms._thinning._MOST", 6)
    model = make(pairs())
    for width in (8, 9, 10, 11, 8, 8):
        model(torch.randn(2, 1, 8, width))
        assert len(model.distiller._thinning._alike) <= 6
    assert drawn == [[], [], [], [], [], ["stage1", "stage2"]]


def test_a_copy_goes_on_by_itself():
    model = make(pairs())
    model(images())
    twin = copy.deepcopy(model)
    torch.manual_seed(3)
    found = model(images())[1]
    torch.manual_seed(3)
    assert torch.equal(twin(images())[1], found)
    assert twin.distiller._thinning is not model.distiller._thinning


class Dropping(nn.Module):
    """Draws random numbers between the teacher's forward and the losses'."""

    def __init__(self, width):
        super().__init__()
        self.stage1 = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.Dropout(0.5))
        self.stage2 = nn.Conv2d(width, width, 1)

    def forward(self, x):
        return self.stage2(self.stage1(x))


def test_a_resumed_run_draws_what_an_uninterrupted_one_does():
    chosen = [*pairs(), Pair("stage2", "stage1", loss=QUARTER, name="of one layer")]

    def made():
        torch.manual_seed(0)
        student, teacher = Dropping(4), Dropping(6)
        return DistillationModel(student, Distiller(student, teacher, chosen, example=images()))

    model, resumed = made(), made()
    first = steps(model, [images()] * 3)
    resumed.load_state_dict(model.state_dict())
    random = torch.get_rng_state()
    found = []
    for one in (model, resumed):
        torch.set_rng_state(random)
        found.append([one(images())[1].item() for _ in range(3)])
    assert first[0].isfinite().all()
    assert found[1] == found[0]

"""What was taken without a word: transforms that write or cut, a loss in two pairs, NaN heads."""

import copy
import math

import pytest
import torch
from _models import cnn_pair, images

from vid_loss import DistillationModel, Distiller, FitNetLoss, KDLoss, Pair, VIDLoss


def build(*pairs):
    student, teacher = cnn_pair()
    return student, Distiller(student, teacher, list(pairs), example=images())


def add(x):
    return x.add_(1)


def write(x):
    x[:, 0] = 0
    return x


def activate(x):
    return torch.relu_(x)


@pytest.mark.parametrize("owner", ["student", "teacher"])
@pytest.mark.parametrize("transform", [add, write, activate])
def test_a_transform_that_writes_is_refused(owner, transform):
    message = rf"Pair 'stage2' -> 'stage2', {owner}_transform: expected it to leave .*x\.clone\(\)"
    with pytest.raises(ValueError, match=message):
        build(Pair("stage2", "stage2", **{f"{owner}_transform": transform}))
    _, distiller = build(
        Pair("stage2", "stage2", **{f"{owner}_transform": lambda x: transform(x.clone())})
    )
    assert distiller.pairs


def no_grad(x):
    with torch.no_grad():
        return x * 2


CUTS = {
    "detach": lambda x: x.detach(),
    "data": lambda x: x.data,
    "no_grad": no_grad,
    "numpy": lambda x: torch.from_numpy(x.detach().numpy()),
    "sign": lambda x: (x > 0).float(),
    "constant": torch.zeros_like,
}


@pytest.mark.parametrize("transform", CUTS.values(), ids=CUTS)
def test_a_student_transform_without_a_gradient_is_refused(transform):
    with pytest.raises(ValueError, match="student_transform: expected a result that the student"):
        build(Pair("stage2", "stage2", student_transform=transform))
    build(Pair("stage2", "stage2", teacher_transform=transform))  # the teacher learns nothing


def test_transforms_that_do_neither_are_called_as_before():
    student, distiller = build(
        Pair("stage2", "stage2", student_transform=lambda x: x * 2, teacher_transform=torch.tanh)
    )
    student(images())
    distiller(images()).backward()
    assert student.stage1[0].weight.grad.norm() > 0


@pytest.mark.parametrize("cls", [VIDLoss, FitNetLoss])
def test_one_loss_in_two_pairs_is_refused(cls):
    loss = cls((8, 8, 4, 4), (8, 16, 4, 4))
    pairs = [Pair("stage2", "stage2", loss=loss, name=name) for name in ("a", "b")]
    with pytest.raises(ValueError, match=r"loss: expected a module of its own.*that of 'a'.*deepc"):
        build(*pairs)
    build(pairs[0], Pair("stage2", "stage2", loss=copy.deepcopy(loss), name="b"))


def test_a_loss_that_keeps_nothing_may_be_in_two():
    loss = KDLoss()
    build(*(Pair("fc", "fc", loss=loss, name=name) for name in ("a", "b")))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("part", ["head.0.weight", "scale.mean", "running_var.var"])
@pytest.mark.parametrize("how", ["distiller", "losses", "model"])
def test_heads_of_a_run_that_diverged_are_not_loaded(how, part, value):
    student, distiller = build(Pair("stage2", "stage2"))
    model = DistillationModel(student, distiller)
    module = {"distiller": distiller, "losses": distiller.losses, "model": model}[how]
    state = copy.deepcopy(module.state_dict())
    key = next(key for key in state if key.endswith(part))
    before = copy.deepcopy(distiller.state_dict())
    module.load_state_dict(state)
    state[key].view(-1)[0] = value
    with pytest.raises(ValueError, match=rf"expected finite heads; got inf or NaN in '{key}'"):
        module.load_state_dict(state)
    for name, tensor in distiller.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_and_those_of_a_copy_are_not_either():
    _, distiller = build(Pair("stage2", "stage2"))
    twin = copy.deepcopy(distiller)
    state = {key: x * math.nan for key, x in twin.state_dict().items()}
    with pytest.raises(ValueError, match="expected finite heads"):
        twin.load_state_dict(state)


@pytest.mark.parametrize("owner", ["student", "teacher"])
def test_weights_that_are_not_finite_are_named_at_once(owner):
    student, teacher = cnn_pair()
    model = student if owner == "student" else teacher
    torch.nn.init.constant_(model.stage1[0].weight, math.nan)
    error = ValueError if owner == "student" else RuntimeError
    with pytest.raises(error, match=rf"expected finite features of the {owner}; got .* 'stage2'"):
        Distiller(student, teacher, {"stage2": "stage2"}, example=images())

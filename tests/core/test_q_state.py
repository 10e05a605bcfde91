"""The running estimates through resume, copies, averages of weights and accumulation."""

import copy
import io
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from _models import cnn_pair, images
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from vid_loss import DistillationModel, Distiller, Pair, VIDLoss

PAIRS = [
    Pair("stage1", "stage1"),
    Pair("stage2", "stage2", loss=partial(VIDLoss, norm="group")),
    Pair("fc:input", "fc", loss=partial(VIDLoss, variance="trained")),
]
LABELS = torch.arange(8) % 3
ESTIMATES = ("scale.positions", "scale.mean", "scale.var", "running_var.var")


def fresh(optimizer=torch.optim.AdamW):
    student, teacher = cnn_pair()
    distiller = Distiller(student, teacher, PAIRS, example=images()[:1])
    return student, distiller, optimizer([*student.parameters(), *distiller.parameters()], lr=0.01)


def batch(step):
    return torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(step))


def train(student, distiller, optimizer, steps):
    losses = []
    for step in steps:
        x = batch(step)
        loss = F.cross_entropy(student(x), LABELS) + distiller(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def estimates(module):
    found = {name: x for name, x in module.named_buffers() if name.endswith(ESTIMATES)}
    assert len(found) == len(ESTIMATES) * len(PAIRS)
    return found


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_a_run_that_is_resumed_equals_one_that_is_not():
    straight = fresh()
    losses = train(*straight, range(10))
    first = fresh()
    before = train(*first, range(5))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in first], file)
    file.seek(0)
    second = fresh()
    for part, state in zip(second, torch.load(file), strict=True):
        part.load_state_dict(state)
    assert before + train(*second, range(5, 10)) == losses
    assert_equal(second[0].state_dict(), straight[0].state_dict())
    assert_equal(second[1].state_dict(), straight[1].state_dict())
    assert_equal(estimates(second[1]), estimates(straight[1]))
    assert second[1].diagnostics() == straight[1].diagnostics()


def test_a_distillation_models_state_carries_the_estimates():
    student, distiller, optimizer = fresh()
    train(student, distiller, optimizer, range(3))
    other_student, other, _ = fresh()
    model = DistillationModel(student, distiller)
    DistillationModel(other_student, other).load_state_dict(model.state_dict())
    assert_equal(estimates(other), estimates(distiller))


def test_a_copy_has_estimates_of_its_own():
    student, distiller, optimizer = fresh()
    train(student, distiller, optimizer, range(3))
    model = DistillationModel(student, distiller)
    twin = copy.deepcopy(model)
    assert_equal(estimates(twin), estimates(model))
    kept = {name: x.clone() for name, x in estimates(twin).items()}
    train(student, distiller, optimizer, range(3, 5))
    assert_equal(estimates(twin), kept)
    assert twin(batch(3))[1].isfinite()


@pytest.mark.parametrize("use_buffers", [True, False])
def test_an_average_of_weights_carries_the_estimates(use_buffers):
    student, distiller, optimizer = fresh()
    model = DistillationModel(student, distiller)
    options = {"multi_avg_fn": get_ema_multi_avg_fn(0.5)}
    average = AveragedModel(model, use_buffers=use_buffers, **options)
    train(student, distiller, optimizer, range(3))
    average.update_parameters(model)
    first = {name: x.clone() for name, x in estimates(model).items()}
    assert_equal(estimates(average.module), first)
    train(student, distiller, optimizer, range(3, 6))
    average.update_parameters(model)
    second = estimates(model)
    expected = {n: torch.lerp(x, second[n], 0.5) for n, x in first.items()}
    if not use_buffers:  # torch copies them then
        expected = second
    torch.testing.assert_close(estimates(average.module), expected)
    assert {x.dtype for x in estimates(average.module).values()} == {torch.float32}


@pytest.mark.parametrize("norm", ["group", "none"])
def test_accumulation_comes_close_to_the_full_batch_once_the_estimates_have_settled(norm):
    """Not exactly: the variances take in each half before its loss, the full batch as a whole.

    A half weighs 1/20 in the running mean, so that a channel's variance, and its gradient with it,
    is off by a twentieth of what two halves differ in; 0.2 % of all gradients here.
    """
    torch.manual_seed(0)
    student = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, 3))
    teacher = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Tanh())
    pairs = [Pair("1", "1", loss=partial(VIDLoss, norm=norm))]
    distiller = Distiller(student, teacher, pairs, example=images())
    parameters = [*student.parameters(), *distiller.parameters()]
    for step in range(100):
        student(batch(step))
        distiller(batch(step))
    settled = copy.deepcopy(distiller.state_dict())
    x = batch(100)

    def gradients(chunks):
        distiller.load_state_dict(settled)
        for parameter in parameters:
            parameter.grad = None
        for part, labels in zip(x.chunk(chunks), LABELS.chunk(chunks), strict=True):
            loss = F.cross_entropy(student(part), labels) + distiller(part)
            (loss / chunks).backward()
        scale = copy.deepcopy(distiller.losses["1->1"].scale.state_dict())
        return torch.cat([parameter.grad.flatten() for parameter in parameters]), scale

    (whole, scale), (halves, scale_of_halves) = gradients(1), gradients(2)
    assert 0 < (halves - whole).norm() < 0.004 * whole.norm()
    torch.testing.assert_close(scale_of_halves, scale)  # here positions count, not batches

"""Batches that are written to between the student's forward and the distiller's call."""

import copy

import pytest
import torch
from _distillers import make
from _models import images
from torch import nn

from vid_loss import Distiller, FeatureTap


class Scaling(nn.Module):
    """Scales what it is given, in place or not, as some models do first."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale
        self.body = nn.Linear(4, 3)

    def forward(self, x):
        return self.body(self.scale(x[0] if isinstance(x, list) else x))


def by_the_loop(student, distiller, batch):
    student(batch)
    batch.mul_(2)
    return distiller(batch)


def by_a_part_of_it(student, distiller, batch):
    student(batch)
    batch[:2] = 0
    return distiller(batch)


def by_a_view_of_it(student, distiller, batch):
    student(batch)
    batch.flatten(1).clamp_(0, 1)
    return distiller(batch)


def after_the_teacher(student, distiller, batch):
    features = distiller.teacher_features(batch)
    batch.mul_(2)
    student(batch)
    return distiller(batch, teacher_features=features)


STEPS = [by_the_loop, by_a_part_of_it, by_a_view_of_it, after_the_teacher]


@pytest.mark.parametrize("step", STEPS)
def test_a_batch_that_changes_on_the_way_is_refused(step):
    student, _, distiller = make()
    with pytest.raises(RuntimeError, match=r"changed in place since the student was called"):
        step(student, distiller, images().clone())
    batch = images().clone()
    student(batch)  # and what is right goes on
    assert torch.isfinite(distiller(batch))


def in_place(x):
    return x.div_(255)


def given_to(model, batch, form):
    if form == "by name":
        return model(x=batch)
    return model([batch]) if form == "in a list" else model(batch)


@pytest.mark.parametrize("form", ["by place", "by name", "in a list"])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_a_student_that_changes_its_own_input_is_refused_when_a_distiller_is_built(
    form, batch_size
):
    x = torch.rand(batch_size, 4) * 255
    example = {"by place": x, "by name": {"x": x}, "in a list": ([x],)}[form]
    student, teacher = Scaling(in_place), Scaling(lambda x: x / 255)
    with pytest.raises(RuntimeError, match=r"changed in place since the student was called"):
        Distiller(student, teacher, {"body": "body"}, example=example)
    assert not student._forward_hooks
    assert not student.body._forward_hooks


@pytest.mark.parametrize("form", ["by place", "by name", "in a list"])
def test_a_student_that_changes_its_own_input_in_training_is_refused(form):
    student, teacher = Scaling(lambda x: x / 255), Scaling(lambda x: x / 255)
    x, batch = torch.rand(5, 4) * 255, torch.rand(5, 4) * 255
    example = {"by place": x, "by name": {"x": x}, "in a list": ([x],)}[form]
    distiller = Distiller(student, teacher, {"body": "body"}, example=example)
    student.scale = in_place
    given_to(student, batch, form)
    with pytest.raises(RuntimeError, match=r"changed in place since the student was called"):
        given_to(distiller, batch, form)


@pytest.mark.parametrize("form", ["by place", "by name", "in a list"])
def test_the_hook_of_the_message_makes_it_right(form):
    values = []
    x = torch.rand(5, 4) * 255
    example = {"by place": x, "by name": {"x": x}, "in a list": ([x],)}[form]
    for scale in (in_place, lambda x: x / 255):
        torch.manual_seed(0)
        student, teacher = Scaling(scale), Scaling(lambda x: x / 255)
        hook = lambda _, *given: copy.deepcopy(given)  # noqa: E731  # as in the message
        student.register_forward_pre_hook(hook, with_kwargs=True)
        distiller = Distiller(student, teacher, {"body": "body"}, example=example)
        given_to(student, x, form)
        values.append(given_to(distiller, x, form))
    torch.testing.assert_close(*values)


def test_a_tensor_that_takes_the_place_of_one_that_is_gone_is_no_change(monkeypatch):
    """Python gives the identity of a temporary to the next one; which may have been written to."""
    student, teacher = Scaling(lambda x: x * 2), Scaling(lambda x: x)
    for p in student.parameters():
        p.requires_grad_(False)  # so that autograd keeps nothing of the input
    student.more = nn.Parameter(torch.ones(3))
    student.register_forward_hook(lambda module, _, output: output * module.more)
    example = torch.rand(5, 4)
    distiller = Distiller(student, teacher, {"": "body"}, example=example)
    seen = set()
    for _ in range(50):
        student(example / 255)
        given = example.clone().div_(255)
        seen.add(id(given))
        assert torch.isfinite(distiller(given))
        del given
    assert len(seen) < 50  # identities come again


def buffer_filled_anew(student, distiller):
    buffer = images().clone()
    for _ in range(3):
        buffer.copy_(torch.rand_like(buffer))  # as of a prefetcher, or a graph's static input
        student(buffer)
        distiller(buffer)
    return True


def another_slice_of_one_memory(student, distiller):
    memory = torch.cat([images(), images()])
    student(memory[:8])
    memory[8:] = 0
    return torch.isfinite(distiller(memory[:8]))


def features_from_elsewhere(student, distiller):
    features = {name: x.clone() for name, x in distiller.teacher_features(images()).items()}
    batch = images().clone()
    student(batch)
    batch.mul_(2)
    return torch.isfinite(distiller(batch, teacher_features=features))


def a_copy(student, distiller):
    batch = images().clone()
    student(batch)
    distiller(batch.mul(2))
    return True


def after_the_call(student, distiller):
    batch = images().clone()
    for _ in range(2):
        student(batch)
        distiller(batch)
        batch.mul_(2)
    return True


@pytest.mark.parametrize(
    "loop",
    [
        buffer_filled_anew,
        another_slice_of_one_memory,
        features_from_elsewhere,
        a_copy,
        after_the_call,
    ],
)
def test_loops_that_change_what_nobody_sees_go_on(loop):
    student, _, distiller = make()
    assert loop(student, distiller)


class Marking(nn.Module):
    """Marks some of its labels, in place."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 3)

    def forward(self, x, labels):
        labels[labels == 0] = -100
        return self.body(x)


def test_labels_that_a_student_marks_are_let_alone():
    student, teacher = Marking(), Scaling(lambda x: x)
    batch = {"x": torch.rand(5, 4), "labels": torch.arange(5)}
    distiller = Distiller(
        student,
        teacher,
        {"body": "body"},
        example=batch,
        teacher_inputs=lambda x, labels: x,
    )
    batch["labels"] = torch.arange(5)
    student(**batch)
    assert torch.isfinite(distiller(**batch))


def test_a_tap_that_is_asked_of_no_batch_does_not_look():
    model = Scaling(in_place)
    with FeatureTap(model, ["body"]) as tap:
        model(torch.rand(5, 4))
        assert tap.collect()["body"].shape == (5, 3)


def test_without_a_teacher_a_student_may_change_its_own_input():
    student = Scaling(in_place)
    features = {"body": torch.randn(5, 3)}
    offline = Distiller(
        student, None, {"body": "body"}, example=torch.rand(5, 4), teacher_features=features
    )
    batch = torch.rand(5, 4)
    student(batch)
    assert torch.isfinite(offline(batch, teacher_features=features))

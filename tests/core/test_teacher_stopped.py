"""A teacher that is stopped after the last layer that a pair reads."""

import pytest
import torch
from _models import cnn_pair, images
from torch import nn

from vid_loss import DistillationModel, Distiller


@pytest.mark.parametrize("compiled", ["nothing", "teacher", "model"])
@torch._dynamo.config.patch(skip_nnmodule_hook_guards=False)  # two models of one class
def test_a_stopped_teacher_gives_the_same_loss_and_runs_no_layer_more(compiled):
    torch._dynamo.reset()
    values, later = [], []
    for stop in (False, True):
        student, teacher = cnn_pair()
        teacher.stage2.register_forward_hook(lambda *_, stop=stop: later.append(stop))
        wrapped = torch.compile(teacher) if compiled == "teacher" else teacher
        pairs = {"stage1": "stage1"}
        distiller = Distiller(student, wrapped, pairs, example=images(), stop_teacher=stop)
        model = DistillationModel(student, distiller)
        if compiled == "model":
            model = torch.compile(model)
        later.clear()
        _, value = model(images())
        value.backward()
        values.append((value.detach(), student.stage1[0].weight.grad))
        assert later == ([] if stop else [False])
    torch.testing.assert_close(values[0], values[1])


def test_a_stopped_teacher_is_read_at_its_last_layer_whatever_the_pairs_order():
    student, teacher = cnn_pair()
    pairs = {"fc:input": "fc:input", "stage1": "stage1"}
    stopped = Distiller(student, teacher, pairs, example=images(), stop_teacher=True)
    whole = Distiller(student, teacher, pairs, example=images())
    for layer, feature in whole.teacher_features(images()).items():
        torch.testing.assert_close(stopped.teacher_features(images())[layer], feature)


def test_a_stopped_teacher_still_serves_others_to_its_end():
    student, teacher = cnn_pair()
    expected = teacher.eval()(images())
    Distiller(student, teacher, {"stage1": "stage1"}, example=images(), stop_teacher=True)
    torch.testing.assert_close(teacher(images()), expected)


def test_an_error_of_the_teacher_is_not_taken_for_its_end():
    student, teacher = cnn_pair()
    pairs = {"stage2": "stage2"}
    distiller = Distiller(student, teacher, pairs, example=images(), stop_teacher=True)

    def fail(*_):
        raise ZeroDivisionError("of the user's")

    teacher.stage1.register_forward_hook(fail)
    student(images())
    with pytest.raises(ZeroDivisionError, match="of the user's"):
        distiller(images())


class Patching(nn.Module):
    """Replaces a layer's forward while it runs, and forgets to put it back after an exception."""

    def __init__(self, own):
        super().__init__()
        self.layer = nn.Linear(3, 4)
        if own:
            self.layer.forward = self.layer.forward

    def forward(self, x):
        plain = self.layer.forward
        self.layer.forward = lambda x: plain(x)
        output = self.layer(x)
        self.layer.forward = plain
        return output


@pytest.mark.parametrize("own", [True, False])
def test_a_stopped_teacher_keeps_its_forwards(own):
    student, teacher = nn.Sequential(nn.Linear(3, 2)), Patching(own)
    before = vars(teacher.layer).get("forward")
    x = torch.randn(5, 3)
    distiller = Distiller(student, teacher, {"0": "layer"}, example=x, stop_teacher=True)
    # The example ran to its end, which leaves an attribute behind.
    vars(teacher.layer).pop("forward")
    if own:
        teacher.layer.forward = before
    for _ in range(2):
        student(x)
        distiller(x)
    assert vars(teacher.layer).get("forward") is before

"""Every method and sum of the paper's Tables 1 and 2 is a list of pairs."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from _models import cnn_pair, images

from vid_loss import ATLoss, Distiller, FitNetLoss, KDLoss, LwFLoss, Pair, VIDLoss
from vid_loss.subsets import IGNORE_INDEX, labeled_cross_entropy

STAGES = ("stage1", "stage2")
KD = [Pair("fc", "fc", loss=KDLoss(temperature=4))]
FITNET = [Pair("stage2", "stage2", loss=FitNetLoss)]
AT = [Pair(stage, stage, loss=ATLoss()) for stage in STAGES]
LWF = [Pair("fc:input", "fc", loss=LwFLoss)]
MI_I = [Pair(stage, stage) for stage in STAGES]
MI_L = [Pair("fc:input", "fc")]

# Name: pairs, and whether student and teacher have the same classes.
METHODS = {
    "KD": (KD, True),
    "FitNet": (FITNET, True),
    "AT": (AT, True),
    "MI": (MI_I, True),
    "KD+AT": (KD + AT, True),
    "KD+MI": (KD + MI_I, True),
    "LwF": (LWF, False),
    "FitNet, other classes": (FITNET, False),
    "AT, other classes": (AT, False),
    "MI-L": (MI_L, False),
    "MI-I": (MI_I, False),
    "LwF+FitNet": (LWF + FITNET, False),
    "MI-L+MI-I": (MI_L + MI_I, False),
}


@pytest.mark.parametrize(("pairs", "same_classes"), METHODS.values(), ids=METHODS)
def test_every_method_lowers_its_own_loss(pairs, same_classes):
    student, teacher = cnn_pair(student_classes=3, teacher_classes=3 if same_classes else 7)
    distiller = Distiller(student, teacher, pairs, example=images())
    teacher_calls = []
    teacher.register_forward_hook(lambda *_: teacher_calls.append(1))
    assert len(student.stage2._forward_hooks) <= 1
    optimizer = torch.optim.Adam([*student.parameters(), *distiller.parameters()], lr=0.01)
    history = []
    for _ in range(20):
        optimizer.zero_grad()
        # Without a task loss: that of an untrained teacher's images would pull against KD.
        student(images())
        distiller(images()).backward()
        optimizer.step()
        history.append({name: value.item() for name, value in distiller.terms.items()})
    assert len(teacher_calls) == 20
    for name in history[0]:
        assert history[-1][name] < history[0][name], name


def test_fitnet_in_two_stages():
    """Hints first, the task later, by weights that change while training."""
    student, teacher = cnn_pair()
    distiller = Distiller(student, teacher, FITNET, example=images())
    name = "stage2->stage2 FitNetLoss"
    optimizer = torch.optim.SGD([*student.parameters(), *distiller.parameters()], lr=0.01)
    classifier = student.fc.weight.clone()
    student(images())
    distiller(images()).backward()
    assert student.fc.weight.grad is None
    optimizer.step()
    assert torch.equal(student.fc.weight, classifier)
    distiller.set_weight(name, 0.0)
    optimizer.zero_grad()
    (F.cross_entropy(student(images()), torch.zeros(8).long()) + distiller(images())).backward()
    assert distiller.losses[name].regressor.weight.grad is None
    assert student.fc.weight.grad.any()


@pytest.mark.parametrize("pairs", [KD, MI_I, LWF], ids=["KD", "MI", "LwF"])
def test_unlabeled_images_count_fully_in_the_transfer_terms(pairs):
    student, teacher = cnn_pair()
    distiller = Distiller(student, teacher, pairs, example=images())
    values = []
    for labels in (torch.zeros(8).long(), torch.full((8,), IGNORE_INDEX)):
        task_loss = labeled_cross_entropy(student(images()), labels)
        values.append(distiller(images()))
        assert torch.isfinite(task_loss + values[-1])
    assert task_loss == 0
    torch.testing.assert_close(*values)
    (task_loss + values[-1]).backward()
    assert student.stage1[0].weight.grad.abs().sum() > 0


def test_a_partial_keeps_its_options():
    student, teacher = cnn_pair()
    pairs = [Pair("stage1", "stage1", loss=partial(VIDLoss, hidden_channels=5, norm="none"))]
    distiller = Distiller(student, teacher, pairs, example=images())
    assert distiller.losses["stage1->stage1"].head[0].out_channels == 5

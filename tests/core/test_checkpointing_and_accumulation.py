"""Gradients of a script that checkpoints its layers or accumulates batches."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from _models import cnn_pair, images
from torch import nn
from torch.utils.checkpoint import checkpoint

from vid_loss import Distiller, Pair, VIDLoss

PAPER = {"variance": "trained", "standardize": False, "init_var": 5.0}
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])


class Checkpointing(nn.Module):
    """A student that recomputes its first stage in backward."""

    def __init__(self, student, use_reentrant):
        super().__init__()
        self.student = student
        self.use_reentrant = use_reentrant

    def forward(self, x):
        net = self.student
        # Reentrant checkpointing needs an input that asks for a gradient.
        x = x.clone().requires_grad_()
        features = checkpoint(net.stage1, x, use_reentrant=self.use_reentrant)
        return net.fc(net.pool(net.stage2(features)).flatten(1))


@pytest.mark.parametrize(
    ("layer", "use_reentrant"),
    [("stage1.0", False), ("stage1", False), ("stage2", False), ("stage2", True)],
)
def test_gradient_checkpointing_gives_the_plain_gradients(layer, use_reentrant):
    grads = []
    for wrap in (lambda s: Checkpointing(s, use_reentrant), lambda s: nn.Sequential(s)):
        student, teacher = cnn_pair()
        wrapped = wrap(student)
        prefix = "student" if isinstance(wrapped, Checkpointing) else "0"
        distiller = Distiller(wrapped, teacher, {f"{prefix}.{layer}": "stage1"}, example=images())
        loss = F.cross_entropy(wrapped(images()), LABELS) + distiller(images())
        loss.backward()
        grads.append([p.grad for p in [*student.parameters(), *distiller.parameters()]])
    for checkpointed, plain in zip(*grads, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_reentrant_checkpointing_around_a_tapped_layer_is_refused():
    student, teacher = cnn_pair()
    wrapped = Checkpointing(student, use_reentrant=True)
    distiller = Distiller(wrapped, teacher, {"student.stage1.1": "stage1"}, example=images())
    wrapped(images())
    with pytest.raises(RuntimeError, match=r"'student.stage1.1' .* reentrant checkpoint"):
        distiller(images())


def test_accumulation_equals_the_full_batch():
    """With heads that normalise no batch, in a student that does not either.

    And with the paper's variance in the teacher's raw units: the default form's estimates take in
    each part before its loss. How close it comes is in test_q_state.py.
    """
    torch.manual_seed(0)
    student = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, 3))
    teacher = copy.deepcopy(student)
    pairs = [Pair("1", "0", loss=partial(VIDLoss, norm="none", **PAPER))]
    distiller = Distiller(student, teacher, pairs, example=images())
    parameters = [*student.parameters(), *distiller.parameters()]

    def gradients(chunks):
        for parameter in parameters:
            parameter.grad = None
        batches = zip(images().chunk(chunks), LABELS.chunk(chunks), strict=True)
        for batch, labels in batches:
            loss = F.cross_entropy(student(batch), labels) + distiller(batch)
            (loss / chunks).backward()
        return [parameter.grad.clone() for parameter in parameters]

    for whole, parts in zip(gradients(1), gradients(4), strict=True):
        torch.testing.assert_close(parts, whole)

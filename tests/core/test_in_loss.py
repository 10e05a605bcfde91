"""A distiller whose value does not reach backward() is told of after some steps."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from _models import images
from _three_lines import LABELS, Script
from torch.optim import SGD, Adam, AdamW

from vid_loss import KDLoss, Pair

pytestmark = pytest.mark.usefixtures("no_hooks_of_other_tests")


def with_no_grad(script):
    with torch.no_grad():
        return script.distiller(images())


def forgotten(script):
    script.distiller(images())
    return 0.0


LEFT_OUT = {
    "item": lambda script: script.distiller(images()).item(),
    "detach": lambda script: script.distiller(images()).detach(),
    "no_grad": with_no_grad,
    "not added": forgotten,
    "terms": lambda script: script.distiller(images()) * 0 + sum(script.distiller.terms.values()),
}


def steps(script, number, transfer, *others):
    """Runs steps and returns at which of them something was said, and what."""
    said = []
    for step in range(1, number + 1):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loss = F.cross_entropy(script.student(images()), LABELS) + transfer(script)
            for optimizer in (script.optimizer, *others):
                optimizer.zero_grad()
            loss.backward()
            for optimizer in (script.optimizer, *others):
                optimizer.step()
        said += [(step, str(x.message)) for x in caught]
    return said


@pytest.mark.parametrize("way", ["item", "detach", "no_grad", "not added"])
@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize("optimizer", [SGD, AdamW])
def test_a_value_that_is_left_out_is_told_of_once(way, add, optimizer):
    ((step, message),) = steps(Script(optimizer, add=add), 25, LEFT_OUT[way])
    assert step == 20
    assert "expected its value in the loss that backward() is called on" in message
    assert "loss = criterion(student(images), labels) + distiller(images)" in message


def test_so_is_it_where_the_heads_have_an_optimizer_of_their_own():
    script = Script(add=False)
    own = Adam(script.distiller.parameters())
    assert [step for step, _ in steps(script, 25, forgotten, own)] == [20]


def test_what_else_is_wrong_is_said_as_well():
    """Of a transfer that is added from step 22 on, in no optimizer."""
    script, number = Script(add=False), iter(range(1, 99))

    def later(script):
        transfer = script.distiller(images())
        return transfer if next(number) > 21 else 0.0

    (first, _), (second, message) = steps(script, 25, later)
    assert (first, second) == (20, 23)
    assert "they are in no optimizer" in message


@pytest.mark.parametrize("every", [2, 5])
def test_nothing_is_said_of_heads_that_step_rarely(every):
    script, number = Script(add=False), iter(range(99))
    own = Adam(script.distiller.parameters())

    def sometimes(script):
        transfer = script.distiller(images())
        return transfer if not next(number) % every else 0.0

    assert steps(script, 25, sometimes, own) == []


def test_gradients_of_zero_are_gradients():
    assert steps(Script(), 25, LEFT_OUT["terms"]) == []


def test_nothing_is_said_of_steps_without_a_call():
    script = Script()
    script.student(images())
    with_no_grad(script)  # how far it is before training
    for _ in range(25):
        script.optimizer.zero_grad()
        F.cross_entropy(script.student(images()), LABELS).backward()
        script.optimizer.step()
    script.steps(3)


def test_nothing_is_said_of_an_optimizer_of_a_part_that_steps_before_the_transfer_is_there():
    script = Script(add=False)
    script.optimizer = SGD(script.distiller.parameters(), lr=0.01)
    part = SGD(script.student.fc.parameters(), lr=0.01)  # the pairs' layers are before it
    for _ in range(25):
        for optimizer in (part, script.optimizer):
            optimizer.zero_grad()
        output = script.student(images())
        transfer = script.distiller(images())
        F.cross_entropy(output, LABELS).backward(retain_graph=True)
        part.step()
        transfer.backward()
        script.optimizer.step()


def test_nothing_is_said_of_a_loss_without_heads_or_of_one_that_does_not_weigh():
    pairs = [Pair("fc", "fc", loss=KDLoss()), Pair("stage1", "stage1", 0.0)]
    assert steps(Script(pairs=pairs, add=False), 25, LEFT_OUT["item"]) == []
    off = Script(add=False)
    for name in off.distiller.pairs:
        off.distiller.set_weight(name, 0.0)
    assert steps(off, 25, LEFT_OUT["item"]) == []


def test_nothing_is_said_where_a_student_is_measured_and_not_trained():
    script = Script()
    for _ in range(25):
        script.student(images())
        script.distiller(images())

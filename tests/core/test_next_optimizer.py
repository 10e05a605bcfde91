"""An optimizer that takes the place of another, as where layers are unfrozen, is looked at too."""

import copy
import gc

import pytest
import torch.nn.functional as F
from _models import images
from _three_lines import LABELS, Script
from torch.optim import SGD, Adam
from torch.optim.optimizer import _global_optimizer_pre_hooks

pytestmark = pytest.mark.usefixtures("no_hooks_of_other_tests")


def trained(**options):
    """A script after some steps, whose optimizer is gone."""
    script = Script(Adam, **options)
    script.steps(4)
    script.optimizer = None
    gc.collect()
    return script


def test_heads_that_are_not_in_the_next_optimizer_are_noticed_at_its_second_step():
    script = trained()
    script.optimizer = SGD(script.student.parameters(), lr=0.01)
    script.steps(1)
    with pytest.warns(UserWarning, match="in no optimizer"):
        script.steps(1)
    script.steps(2)  # once is enough


@pytest.mark.parametrize("loads", [True, False])
def test_nothing_is_said_of_one_that_has_them_and_nothing_is_left_of_the_look(loads):
    script = Script(Adam)
    script.steps(4)
    state = copy.deepcopy(script.optimizer.state_dict())
    script.optimizer = Adam(script.student.parameters(), lr=0.01)
    gc.collect()
    script.distiller.add_to(script.optimizer, lr=0.01)
    if loads:
        script.optimizer.load_state_dict(state)
    script.steps(3)
    assert not _global_optimizer_pre_hooks


def test_nothing_is_said_where_the_student_goes_on_alone():
    script = trained()
    optimizer = SGD(script.student.parameters(), lr=0.01)
    for _ in range(3):  # the heads have their last gradients all the while
        F.cross_entropy(script.student(images()), LABELS).backward()
        optimizer.step()
    assert any(p.grad is not None for p in script.distiller.parameters())
    assert not _global_optimizer_pre_hooks


def test_a_distiller_that_is_gone_before_its_optimizer():
    script = Script()
    script.steps(3)
    optimizer = script.optimizer
    del script
    gc.collect()
    del optimizer
    assert not _global_optimizer_pre_hooks


def test_a_third_one_is_looked_at_as_well():
    script = trained()
    script.optimizer = Adam([*script.student.parameters(), *script.distiller.parameters()])
    script.steps(3)
    script.optimizer = SGD(script.student.parameters(), lr=0.01)
    gc.collect()
    with pytest.warns(UserWarning, match="in no optimizer"):
        script.steps(2)

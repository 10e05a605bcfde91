"""A distiller whose heads an optimizer has, and that no step calls."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from _models import images
from _three_lines import LABELS, Script

from vid_loss.optimizer import _uncalled

pytestmark = pytest.mark.usefixtures("no_hooks_of_other_tests")
LATE = 5


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(_uncalled, "STEPS", LATE)


def forgotten(script, number, model=None):
    """Runs steps without the transfer, and returns at which of them something was said."""
    said = []
    for step in range(1, number + 1):
        script.optimizer.zero_grad()
        F.cross_entropy((model or script.student)(images()), LABELS).backward()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            script.optimizer.step()
        said += [(step, str(x.message)) for x in caught]
    return said


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_it_is_told_of_once_and_what_comes_later_is_still_looked_at(optimizer):
    script = Script(optimizer)
    ((step, message),) = forgotten(script, 3 * LATE)
    assert step == LATE
    assert f"{LATE} steps of an optimizer that has its heads, and no call" in message
    assert "loss = criterion(student(images), labels) + distiller(images)" in message
    script.steps(2)
    assert script.distiller.diagnostics()


def test_nothing_is_said_of_a_transfer_that_begins_before_or_has_begun():
    script = Script()
    assert forgotten(script, LATE - 1) == []
    script.steps(1)
    assert forgotten(script, 2 * LATE) == []


def test_nothing_is_said_of_heads_in_no_optimizer():
    assert forgotten(Script(add=False), 2 * LATE) == []


def test_nothing_is_said_while_no_pair_weighs():
    script = Script()
    for name in script.distiller.pairs:
        script.distiller.set_weight(name, 0.0)
    assert forgotten(script, 2 * LATE) == []


def test_steps_on_another_model_do_not_count():
    script, other = Script(), Script().student
    script.optimizer.add_param_group({"params": other.parameters()})
    assert forgotten(script, 2 * LATE, other) == []

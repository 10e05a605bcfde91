"""What is said at the first optimizer step, and to whom nothing is said."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from _models import images
from _three_lines import LABELS, Script
from torch import nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.optimizer import _global_optimizer_pre_hooks

from vid_loss import DistillationModel, KDLoss, Pair
from vid_loss.optimizer import _averaged

pytestmark = pytest.mark.usefixtures("no_hooks_of_other_tests")


@pytest.mark.parametrize("optimizer", [SGD, Adam, AdamW])
def test_heads_in_no_optimizer_are_noticed_at_the_second_step(optimizer):
    script = Script(optimizer, add=False)
    script.steps(1)
    with pytest.warns(UserWarning, match=r"in no optimizer. Add: distiller\.add_to\(optimizer\)"):
        script.steps(1)
    script.steps(2)  # once is enough


def test_heads_that_begin_with_weight_0_are_noticed_when_they_count():
    script = Script(add=False)
    for name in script.distiller.pairs:
        script.distiller.set_weight(name, 0.0)
    script.steps(3)
    script.distiller.set_weight("stage1->stage1", 1.0)
    with pytest.warns(UserWarning, match="in no optimizer"):
        script.steps(2)


@pytest.mark.parametrize("every", [1, 3])
def test_heads_with_an_optimizer_of_their_own_are_no_reason_to_warn(every):
    script = Script(add=False)
    own = Adam(script.distiller.parameters())
    for step in range(7):
        script.steps(1, *([own] if step % every == every - 1 else []))


def test_a_student_in_two_optimizers_and_its_heads_in_the_later_one():
    script = Script(add=False)
    del script.optimizer
    weights = [p for p in script.student.parameters() if p.ndim > 1]
    others = [p for p in script.student.parameters() if p.ndim == 1]
    script.optimizer = SGD(weights, lr=0.1)
    script.steps(4, Adam([*others, *script.distiller.parameters()]))


def test_an_adversary_with_an_optimizer_of_its_own():
    script = Script()
    adversary = nn.Linear(3, 1)
    its_own = Adam(adversary.parameters())
    for _ in range(3):
        adversary(script.student(images()).detach()).sum().backward()
        its_own.step()
        script.steps(1)


def test_frozen_heads_and_losses_without_any():
    frozen = Script(add=False)
    frozen.distiller.requires_grad_(False)
    frozen.steps(4)
    Script(pairs=[Pair("fc", "fc", loss=KDLoss())], add=False).steps(4)


def test_a_student_without_an_optimizer_that_we_know():
    """A flat copy, as DeepSpeed and FSDP 1 keep."""
    script = Script(add=False)
    script.optimizer = SGD([torch.zeros(3, requires_grad=True)], lr=0.1)
    script.steps(4)


@pytest.mark.parametrize(("optimizer", "options"), [(AdamW, {}), (SGD, {"momentum": 0.9})])
def test_a_closure_makes_gradients_after_the_look(optimizer, options):
    script = Script(optimizer, **options)

    def closure():
        script.optimizer.zero_grad()
        loss = F.cross_entropy(script.student(images()), LABELS) + script.distiller(images())
        loss.backward()
        return loss

    for _ in range(3):
        script.optimizer.step(closure)


def test_a_gradient_scaler_whose_first_steps_are_skipped():
    scaled, scaler = Script(AdamW), torch.amp.GradScaler("cpu", init_scale=2.0**40)
    for _ in range(60):  # the first ones overflow
        with torch.autocast("cpu", dtype=torch.float16):
            loss = F.cross_entropy(scaled.student(images()), LABELS) + scaled.distiller(images())
        scaled.optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(scaled.optimizer)
        scaler.update()
    assert scaled.optimizer.state


def test_a_copy_that_is_trained_with_a_copy_of_the_optimizer():
    script = Script(Adam)
    script.steps(2)
    model = DistillationModel(script.student, script.distiller)
    twin, script.optimizer = copy.deepcopy((model, script.optimizer))
    script.student, script.distiller = twin.student, twin.distiller
    script.steps(3)
    script.distiller = copy.deepcopy(twin).distiller  # looked at as well
    script.student = script.distiller.student
    script.optimizer = SGD(script.student.parameters(), lr=0.01)
    with pytest.warns(UserWarning, match="in no optimizer"):
        script.steps(2)


def test_nothing_is_left_of_the_look():
    script = Script()
    script.steps(1)
    script.steps(1)
    assert not _global_optimizer_pre_hooks
    others = [Script(), Script(add=False)]
    assert len(_global_optimizer_pre_hooks) == 2
    del others
    gc.collect()
    assert not _global_optimizer_pre_hooks


def test_an_average_of_the_model_is_not_looked_at():
    script = Script()
    ema = torch.optim.swa_utils.AveragedModel(DistillationModel(script.student, script.distiller))
    script.steps(2)
    ema.eval()(images())
    assert not _global_optimizer_pre_hooks


def test_an_adapter_that_does_not_call_the_distiller_pays_for_no_comparison(monkeypatch):
    """It asks for the terms inside the student's forward, in several processes."""
    monkeypatch.setattr(_averaged, "several_processes", lambda: True)
    monkeypatch.setattr(torch.Tensor, "norm", lambda *_: pytest.fail("a norm is taken"))
    script = Script()
    for _ in range(3):
        script.student(images())
        sum(script.distiller.weighted_terms(images()).values()).backward()
        script.optimizer.step()


def test_processes_compare_in_few_calls_while_gradients_are_accumulated(monkeypatch):
    calls, number = [], 0
    monkeypatch.setattr(_averaged, "several_processes", lambda: True)
    script = Script()
    monkeypatch.setattr(
        torch.distributed, "all_reduce", lambda *_, **__: calls.append(number), raising=False
    )
    for name in script.distiller.pairs:
        script.distiller.set_weight(name, 0.0)
    for _ in range(5):
        script.student(images())
        script.distiller(images())
    script.distiller.set_weight("stage1->stage1", 1.0)
    for _ in range(12):
        number += 1
        script.student(images())
        script.distiller(images()).backward()
    script.optimizer.step()
    for _ in range(27):
        number += 1
        script.student(images())
        script.distiller(images())
    assert calls == [2, 3, 5, 9, 17]


@pytest.fixture
def alone_among_processes(monkeypatch):
    """Several processes, of which the others would never answer."""
    monkeypatch.setattr(_averaged, "several_processes", lambda: True)
    monkeypatch.setattr(
        torch.distributed, "all_reduce", lambda *_, **__: pytest.fail("it waits"), raising=False
    )


@pytest.mark.usefixtures("alone_among_processes")
def test_pairs_without_heads_have_nothing_to_compare():
    Script(pairs=[Pair("fc", "fc", loss=KDLoss())], add=False).steps(4)


@pytest.mark.usefixtures("alone_among_processes")
@pytest.mark.parametrize("part", ["whole", "other", "none"])
def test_heads_that_fsdp_1_has_flattened_are_not_compared(monkeypatch, part):
    """Each process has another part of them between the forwards, perhaps all, perhaps none."""
    script = Script()
    whole = list(script.distiller.losses.parameters())
    seen = {"whole": whole, "other": whole[1:], "none": []}[part]
    for parameter in seen:
        parameter._fsdp_flattened = True  # as FSDP 1 marks them
    step = torch.optim.SGD.step

    def sharded_step(optimizer):
        with monkeypatch.context() as outside:
            outside.setattr(script.distiller.losses, "parameters", lambda: iter(seen))
            step(optimizer)

    monkeypatch.setattr(script.optimizer, "step", lambda: sharded_step(script.optimizer))
    script.steps(4)


def test_processes_compare_once_whatever_optimizer_follows(monkeypatch):
    """It is collected when Python likes, in one process earlier than in another."""
    calls = []
    monkeypatch.setattr(_averaged, "several_processes", lambda: True)
    monkeypatch.setattr(
        torch.distributed, "all_reduce", lambda *_, **__: calls.append(None), raising=False
    )
    script = Script()
    script.steps(3)
    assert len(calls) == 1
    parameters = [*script.student.parameters(), *script.distiller.parameters()]
    script.optimizer = SGD(parameters, lr=0.01)
    gc.collect()
    script.steps(8)
    assert len(calls) == 1

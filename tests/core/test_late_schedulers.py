"""Schedulers that were built before the heads came: right as they are, warned of, or refused."""

from contextlib import suppress
from functools import partial
from inspect import getfile

import pytest
import torch
from _three_lines import Script
from torch.optim import SGD, AdamW
from torch.optim import lr_scheduler as torch_schedulers
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiplicativeLR,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from torch.optim.swa_utils import SWALR

GROUP_BY_GROUP = {
    StepLR: lambda o: StepLR(o, 2, 0.5),
    MultiStepLR: lambda o: MultiStepLR(o, [3, 5]),
    ExponentialLR: lambda o: ExponentialLR(o, 0.9),
    PolynomialLR: lambda o: PolynomialLR(o, 8),
    ReduceLROnPlateau: lambda o: ReduceLROnPlateau(o, patience=0),
    ChainedScheduler: lambda o: ChainedScheduler([StepLR(o, 2), ExponentialLR(o, 0.9)]),
}


class OwnStep(StepLR):
    """A subclass that does more in a step, and computes as StepLR."""

    def step(self, *args):
        super().step(*args)


SILENT = {
    **GROUP_BY_GROUP,
    OwnStep: lambda o: OwnStep(o, 2, 0.5),
    "a decay from the whole rate": lambda o: LinearLR(o, 1.0, 0.1, 5),
    "a factor of one": lambda o: ConstantLR(o, 1.0, 5),
}
WITH_LISTS = {
    LambdaLR: lambda o: LambdaLR(o, lambda step: 0.5**step),
    MultiplicativeLR: lambda o: MultiplicativeLR(o, lambda step: 0.5),
    ConstantLR: lambda o: ConstantLR(o, 0.1, 3),
    LinearLR: lambda o: LinearLR(o, 0.1, 1.0, 3),
    CosineAnnealingWarmRestarts: lambda o: CosineAnnealingWarmRestarts(o, 4),
    CyclicLR: lambda o: CyclicLR(o, 0.01, 0.1, cycle_momentum=False),
    OneCycleLR: lambda o: OneCycleLR(o, 0.1, total_steps=20),
    SequentialLR: lambda o: SequentialLR(o, [StepLR(o, 2), ExponentialLR(o, 0.9)], [3]),
    SWALR: lambda o: SWALR(o, 0.1, anneal_epochs=5),
}


class Own(LRScheduler):
    """A user's own, that multiplies what each group has."""

    def get_lr(self):
        factor = 0.9 if self.last_epoch else 1.0
        return [group["lr"] * factor for group in self.optimizer.param_groups]


# Subclasses of one that goes on and of one that fails, with rates of their own.
OwnGamma = type("OwnGamma", (StepLR,), {"get_lr": Own.get_lr})
OwnLambda = type("OwnLambda", (LambdaLR,), {"get_lr": Own.get_lr})


class OwnCycle(CyclicLR):
    """A subclass of one that fails, which sets the rates in its steps."""

    def step(self, epoch=None):
        self.last_epoch += 1
        for group in self.optimizer.param_groups:
            group["lr"] = 0.5**self.last_epoch


WARNED = {
    Own: lambda o: Own(o),
    OwnGamma: lambda o: OwnGamma(o, 2),
    OwnLambda: lambda o: OwnLambda(o, lambda step: 1.0),
    OwnCycle: lambda o: OwnCycle(o, 0.01, 0.1, cycle_momentum=False),
    CosineAnnealingLR: lambda o: CosineAnnealingLR(o, 12),
}
LINE = r"Build the scheduler after distiller\.add_to\(optimizer\)\."


def rates(make, late, steps=12, distills=True):
    """The rates of all groups after each step of a script, or of torch alone."""
    script = Script(SGD, add=False)
    late_group = script.distiller if distills else torch.nn.Linear(1, 1)
    heads = {"params": late_group.parameters(), "lr": 0.3}
    if not late:
        script.optimizer.add_param_group(heads)
    scheduler = make(script.optimizer)
    if late:
        script.optimizer.add_param_group(heads)
    found = []
    for _ in range(steps):
        script.steps(1) if distills else script.optimizer.step()
        scheduler.step(*[1.0] * isinstance(scheduler, ReduceLROnPlateau))
        found.append([group["lr"] for group in script.optimizer.param_groups])
    return found


@pytest.mark.parametrize("kind", SILENT)
def test_what_works_on_each_group_as_it_is_goes_on_in_silence(kind):
    make = SILENT[kind]
    assert rates(make, late=True) == rates(make, late=False)


@pytest.mark.parametrize("kind", WITH_LISTS)
def test_what_fails_in_torch_or_gives_other_rates_is_refused_in_the_first_step(kind):
    make = WITH_LISTS[kind]
    right = rates(make, late=False)
    with suppress(ValueError, KeyError):  # torch's own
        assert rates(make, late=True, distills=False) != right
    with pytest.raises(RuntimeError, match=rf"got .*{kind.__name__}.*, built before .*{LINE}"):
        rates(make, late=True, steps=1)


@pytest.mark.parametrize("kind", WARNED)
def test_what_may_be_right_goes_on_with_a_warning(kind):
    make = WARNED[kind]
    with pytest.warns(UserWarning, match=rf"got {kind.__name__}, built before .*{LINE}") as found:
        late = rates(make, late=True)
    assert (len(found), late) == (1, rates(make, late=False))


def test_a_cosine_is_right_up_to_its_end_and_no_further_as_its_warning_says():
    make = partial(CosineAnnealingLR, T_max=4)
    with pytest.warns(UserWarning, match="right up to T_max; torch stops with an error in the"):
        late = rates(make, late=True, steps=4)
    assert late == rates(make, late=False, steps=4)
    if torch.__version__ >= (2, 9):  # 2.8 gives the late group a wrong rate instead
        with pytest.raises(ValueError, match="zip"):
            rates(make, late=True, steps=5, distills=False)


def test_every_scheduler_of_torch_is_tried():
    classes = [x for x in vars(torch_schedulers).values() if isinstance(x, type)]
    theirs = {x for x in classes if issubclass(x, LRScheduler)} - {LRScheduler}
    private = {x for x in theirs if x.__name__.startswith("_")}
    assert theirs - private == {*GROUP_BY_GROUP, *WITH_LISTS, CosineAnnealingLR} - {SWALR}


FIRST_PHASE = {
    LinearLR: WITH_LISTS[LinearLR],
    ConstantLR: WITH_LISTS[ConstantLR],
    OneCycleLR: partial(OneCycleLR, max_lr=0.1, total_steps=3),
    CosineAnnealingLR: partial(CosineAnnealingLR, T_max=3),
}


def second_phase(make, steps=3):
    """Heads come after a schedule has made its steps, perhaps all of them."""
    script = Script(SGD, add=False)
    scheduler = make(script.optimizer)
    for _ in range(steps):
        script.optimizer.step()
        scheduler.step()
    script.optimizer.add_param_group({"params": script.distiller.parameters(), "lr": 0.3})
    script.steps(2)
    assert script.optimizer.param_groups[-1]["lr"] == 0.3
    return scheduler


@pytest.mark.parametrize("kind", FIRST_PHASE)
def test_one_that_has_come_to_its_end_is_no_reason(kind):
    assert second_phase(FIRST_PHASE[kind]).last_epoch == 3


@pytest.mark.parametrize("kind", WITH_LISTS)
def test_one_of_an_earlier_phase_is_warned_of(kind):
    with pytest.warns(UserWarning, match=rf"got {kind.__name__}, .* if it makes more .*{LINE}"):
        second_phase(WITH_LISTS[kind], steps=2)


def test_rates_that_were_given_by_hand_are_no_reason():
    def make(optimizer):
        scheduler = LambdaLR(optimizer, lambda step: 0.5**step)
        if len(optimizer.param_groups) == 1:
            scheduler.base_lrs.append(0.3)
            scheduler.lr_lambdas.append(lambda step: 0.5**step)
        return scheduler

    assert rates(make, late=True) == rates(make, late=False)
    script = Script(SGD, add=False)
    scheduler = SWALR(script.optimizer, 0.1)
    script.optimizer.add_param_group({"params": script.distiller.parameters(), "swa_lr": 0.1})
    script.steps(1)
    scheduler.step()


def test_the_error_comes_again_until_the_scheduler_is_built_anew():
    script = Script(AdamW, add=False)
    scheduler = LambdaLR(script.optimizer, lambda step: 0.5**step)
    script.optimizer.add_param_group({"params": script.distiller.parameters()})
    for _ in range(2):
        with pytest.raises(RuntimeError, match="got LambdaLR, built before"):
            script.steps(1)
    scheduler = LambdaLR(script.optimizer, lambda step: 0.5**step)
    script.steps(1)
    scheduler.step()
    assert [group["lr"] for group in script.optimizer.param_groups] == [0.005, 0.005]


def test_schedules_of_transformers_and_a_prepared_one():
    transformers = pytest.importorskip("transformers")
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)

    def make(optimizer):
        scheduler = transformers.get_scheduler("linear", optimizer, 2, 20)
        return accelerator.prepare(optimizer, scheduler)[1]

    assert len(rates(make, late=False)) == 12
    with pytest.raises(RuntimeError, match="got LambdaLR, built before"):
        rates(make, late=True, steps=1)


def test_a_scheduler_of_another_optimizer_is_no_reason():
    script = Script(SGD)
    other = SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = LambdaLR(other, lambda step: 0.5**step)
    script.steps(2)
    assert scheduler.base_lrs == [0.1]


def test_a_schedule_that_is_not_torch_s_is_warned_of_at_the_line_of_the_step(recwarn):
    """As timm's: rates of the groups that there were, and no list that torch would compare."""
    script = Script(SGD, add=False)
    for group in script.optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    script.optimizer.add_param_group({"params": script.distiller.parameters()})
    script.steps(3)
    (warning,) = recwarn
    assert "has set up the other groups and not theirs. Build" in str(warning.message)
    assert warning.filename == getfile(Script)

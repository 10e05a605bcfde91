"""Schedulers that were built before the heads came: right as they are, or an error that says so."""

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
WITH_LISTS = {
    LambdaLR: lambda o: LambdaLR(o, lambda step: 0.5**step),
    MultiplicativeLR: lambda o: MultiplicativeLR(o, lambda step: 0.5),
    ConstantLR: lambda o: ConstantLR(o, 0.1, 3),
    LinearLR: lambda o: LinearLR(o, 0.1, 1.0, 3),
    CosineAnnealingLR: lambda o: CosineAnnealingLR(o, 4),  # fails in its fifth step
    CosineAnnealingWarmRestarts: lambda o: CosineAnnealingWarmRestarts(o, 4),
    CyclicLR: lambda o: CyclicLR(o, 0.01, 0.1, cycle_momentum=False),
    OneCycleLR: lambda o: OneCycleLR(o, 0.1, total_steps=20),
    SequentialLR: lambda o: SequentialLR(o, [StepLR(o, 2), ExponentialLR(o, 0.9)], [3]),
}


def rates(make, late, steps=12):
    """The rates of all groups after each step of a script."""
    script = Script(SGD, add=False)
    heads = {"params": script.distiller.parameters(), "lr": 0.3}
    if not late:
        script.optimizer.add_param_group(heads)
    scheduler = make(script.optimizer)
    if late:
        script.optimizer.add_param_group(heads)
    found = []
    for _ in range(steps):
        script.steps(1)
        scheduler.step(*[1.0] * isinstance(scheduler, ReduceLROnPlateau))
        found.append([group["lr"] for group in script.optimizer.param_groups])
    return found


@pytest.mark.parametrize("kind", GROUP_BY_GROUP)
def test_what_works_on_each_group_as_it_is_goes_on_in_silence(kind):
    make = GROUP_BY_GROUP[kind]
    assert rates(make, late=True) == rates(make, late=False)


@pytest.mark.parametrize("kind", WITH_LISTS)
def test_what_has_a_list_of_rates_is_refused_in_the_first_step(kind):
    make = WITH_LISTS[kind]
    assert len(rates(make, late=False)) == 12
    message = (
        rf"got .*{kind.__name__}.*, built before they came, .*Build the scheduler after "
        r"optimizer.add_param_group\({'params': distiller.parameters\(\)}\)\."
    )
    with pytest.raises(RuntimeError, match=message):
        rates(make, late=True, steps=1)


def test_every_scheduler_of_torch_is_tried():
    classes = [x for x in vars(torch_schedulers).values() if isinstance(x, type)]
    theirs = {x for x in classes if issubclass(x, LRScheduler)} - {LRScheduler}
    private = {x for x in theirs if x.__name__.startswith("_")}
    assert theirs - private == {*GROUP_BY_GROUP, *WITH_LISTS}


def test_averaging_with_a_rate_of_its_own_counts_groups_too():
    with pytest.raises(RuntimeError, match="got SWALR, built before"):
        rates(lambda o: SWALR(o, 0.1, anneal_epochs=5), late=True, steps=1)


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

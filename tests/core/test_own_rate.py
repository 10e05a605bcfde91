"""Loops that write the learning rates into the groups, the heads' too or not."""

import warnings

import pytest
import torch
from _distillers import images, make

ADAM, SGD = torch.optim.Adam, torch.optim.SGD


def to_all(groups, rate):
    for group in groups:
        group["lr"] = rate


def theirs_left(groups, rate):
    to_all(groups[:-1], rate)


def by_factor(groups, rate):
    for group in groups:
        group["lr"] = group.setdefault("base", group["lr"]) * rate


def added(kind, student, distiller, lr=None, decay=0.0, scaled=()):
    first, *rest = student.parameters()
    optimizer = kind([{"params": [first], **dict(scaled)}, {"params": rest}], lr=1e-3)
    distiller.add_to(optimizer, lr=lr, weight_decay=decay)
    return optimizer


def built(kind, student, distiller):
    own = {"params": student.parameters()}
    return kind([own, *distiller.parameter_groups()], lr=1e-3)


def built_first(kind, student, distiller):
    own = {"params": student.parameters()}
    return kind([*distiller.parameter_groups(), own], lr=1e-3)


def said(build, write, rates=(1e-4,) * 4, scheduler=None, to_none=True):
    torch.manual_seed(0)
    student, _, distiller = make()
    optimizer = build(student, distiller)
    scheduler = scheduler and scheduler(optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for rate in rates:
            write(optimizer.param_groups, rate)
            optimizer.zero_grad(set_to_none=to_none)
            (student(images()).square().mean() + distiller(images())).backward()
            optimizer.step()
            if scheduler:
                scheduler.step()
    assert {x.filename for x in caught} <= {__file__}  # the line that calls the distiller
    return [str(x.message) for x in caught]


@pytest.mark.parametrize("kind", [ADAM, SGD])
@pytest.mark.parametrize("rates", [(1e-4,) * 4, (0, 0, 0, 1e-4, 1e-4, 1e-4)], ids=["", "from 0"])
def test_one_rate_for_every_group_is_noticed_once(kind, rates):
    (message,) = said(lambda s, d: added(kind, s, d), to_all, rates)
    given = "5.0e-03" if kind is ADAM else "3.0e-01"
    assert f"they were given, {given}; got 1.0e-04, as another group" in message
    assert "optimizer.param_groups[:2]" in message


def test_it_is_noticed_once_while_other_things_are_looked_at():
    assert len(said(lambda s, d: added(ADAM, s, d), to_all, (1e-4,) * 8, to_none=False)) == 1


@pytest.mark.parametrize(
    ("build", "others"),
    [
        (lambda s, d: added(ADAM, s, d, decay=0.1), "[:2]"),
        (lambda s, d: added(ADAM, s, d, lr=0.01), "[:2]"),
        (lambda s, d: built(ADAM, s, d), "[:1]"),
        (lambda s, d: built_first(ADAM, s, d), "[1:]"),
    ],
    ids=["two groups", "a rate that was asked for", "built", "built, the heads first"],
)
def test_the_message_names_the_groups_that_are_not_theirs(build, others):
    (message,) = said(build, to_all)
    assert f"optimizer.param_groups{others}" in message


@pytest.mark.parametrize("write", [theirs_left, by_factor, lambda *_: None])
@pytest.mark.parametrize("kind", [ADAM, SGD])
@pytest.mark.parametrize("rates", [(0.1,) * 4, (0, 0, 0.1, 0.2)], ids=["", "from 0"])
def test_nothing_is_said_where_they_keep_their_own(kind, write, rates):
    assert said(lambda s, d: added(kind, s, d), write, rates) == []


def test_nothing_is_said_where_they_have_none_of_their_own():
    assert said(lambda s, d: added(ADAM, s, d, lr=1e-3), to_all) == []
    assert said(lambda s, d: ADAM([*s.parameters(), *d.parameters()], lr=1e-3), to_all) == []


def cosine(optimizer):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9)


@pytest.mark.parametrize("kind", [ADAM, SGD])
@pytest.mark.parametrize("scale", [0.5, 1.0])
@pytest.mark.parametrize(
    ("write", "scheduler"), [(to_all, None), (lambda *_: None, None), (lambda *_: None, cosine)]
)
@pytest.mark.parametrize("rates", [(1e-4,) * 4, (0, 0, 0, 1e-4, 1e-4, 1e-4)], ids=["", "from 0"])
def test_scales_that_nothing_multiplies_by_are_noticed_once(kind, scale, write, scheduler, rates):
    build = lambda s, d: added(kind, s, d, scaled={"lr_scale": scale})  # noqa: E731  # as below
    (message,) = said(build, write, rates, scheduler)
    assert "to be multiplied by its lr_scale" in message
    assert "group.pop('lr_scale', None)" in message


def test_what_that_message_says_gives_them_their_own():
    def build(student, distiller):
        optimizer = ADAM([{"params": student.parameters(), "lr_scale": 0.5}], lr=1e-3)
        for group in optimizer.param_groups:
            group.pop("lr_scale", None)
        distiller.add_to(optimizer)
        return optimizer

    assert said(build, lambda *_: None, scheduler=cosine) == []


def test_heads_alone_in_an_optimizer_have_the_peak_that_it_is_given():
    build = lambda _, d: ADAM(d.parameter_groups())  # noqa: E731  # as in the tables above
    assert said(build, lambda *_: None, scheduler=one_cycle(2e-3)) == []


def one_cycle(*peaks, **options):
    peak = list(peaks) if len(peaks) > 1 else peaks[0]
    return lambda x: torch.optim.lr_scheduler.OneCycleLR(x, peak, total_steps=9, **options)


@pytest.mark.parametrize(
    ("kind", "given"), [(ADAM, 0.005), (SGD, 0.3)], ids=lambda x: getattr(x, "__name__", None)
)
@pytest.mark.parametrize("options", [{}, {"anneal_strategy": "linear", "three_phase": True}])
def test_one_peak_for_every_group_is_noticed_once(kind, given, options):
    scheduler = one_cycle(1e-3, **options)
    (message,) = said(
        lambda s, d: added(kind, s, d), lambda *_: None, (0,) * 5, scheduler=scheduler
    )
    assert "one max_lr for every group, 1.0e-03" in message
    assert f"max_lr=[0.001, 0.001, {given}]" in message


@pytest.mark.parametrize(
    "scheduler",
    [
        one_cycle(1e-3, 1e-3, 5e-3),
        one_cycle(0.1),
        lambda x: torch.optim.lr_scheduler.CosineAnnealingLR(x, 9),
        lambda x: torch.optim.lr_scheduler.LambdaLR(x, lambda step: 0.1 * step),
    ],
    ids=["a peak for each", "a peak above theirs", "cosine", "a warm-up from 0"],
)
def test_nothing_is_said_where_a_scheduler_keeps_their_own(scheduler):
    build = lambda s, d: added(ADAM, s, d)  # noqa: E731  # as in the tables above
    assert said(build, lambda *_: None, scheduler=scheduler) == []

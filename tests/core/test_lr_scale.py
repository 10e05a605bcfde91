"""Optimizers whose groups have an lr_scale: layer decay, by a loop or by timm's scheduler."""

import warnings

import pytest
import torch
from _distillers import images, make
from torch.optim import SGD, AdamW

BASE = 1e-3
OWN = {AdamW: 5e-3, SGD: 0.3}  # of heads with lambda 3


def with_heads(kind, scales=(0.25, 1.0), multiplied=False, **options):
    torch.manual_seed(0)
    student, _, distiller = make()
    first, *rest = student.parameters()
    groups = [{"params": x} for x in ([first], rest)]
    for group, scale in zip(groups, scales, strict=True):
        if scale is not None:
            group["lr_scale"] = scale
            group["lr"] = BASE * (scale if multiplied else 1)
    optimizer = kind(groups, lr=BASE)
    distiller.add_to(optimizer, **options)
    return student, distiller, optimizer


def theirs(distiller, optimizer):
    mine = {id(p) for p in distiller.parameters()}
    return [x for x in optimizer.param_groups if any(id(p) in mine for p in x["params"])]


@pytest.mark.parametrize("kind", [AdamW, SGD])
@pytest.mark.parametrize("decay", [0.0, 0.05])
@pytest.mark.parametrize("scales", [(0.25, 1.0), (1.0, 1.0)], ids=["layer decay", "none"])
@pytest.mark.parametrize("lr", [None, 0.02])
def test_a_loop_that_multiplies_by_lr_scale_keeps_the_heads_rate_in_proportion(
    kind, decay, scales, lr
):
    student, distiller, optimizer = with_heads(kind, scales, lr=lr, weight_decay=decay)
    own = lr or OWN[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for factor in (0.0, 0.5, 1.0, 0.1, 0.01):
            for group in optimizer.param_groups:
                group["lr"] = factor * BASE * group["lr_scale"]
            heads = theirs(distiller, optimizer)
            assert len(heads) == (2 if decay else 1)
            assert [x["lr"] for x in heads] == pytest.approx([factor * own] * len(heads))
            optimizer.zero_grad()
            (student(images()).square().mean() + distiller(images())).backward()
            optimizer.step()


@pytest.mark.parametrize("kind", [AdamW, SGD])
def test_timms_scheduler_gives_them_what_it_gives_beside_groups_without_a_scale(kind):
    scheduler = pytest.importorskip("timm.scheduler").CosineLRScheduler
    rates = []
    for scales in ((0.25, 1.0), (None, None)):
        _, distiller, optimizer = with_heads(kind, scales)
        schedule = scheduler(optimizer, t_initial=9)
        rates.append([])
        for epoch in range(9):
            schedule.step(epoch)
            rates[-1].append(theirs(distiller, optimizer)[0]["lr"])
    assert rates[0] == pytest.approx(rates[1])
    assert rates[0][0] == pytest.approx(OWN[kind])
    assert rates[0][-1] < 0.1 * OWN[kind]


@pytest.mark.parametrize("kind", [AdamW, SGD])
def test_beside_rates_that_were_multiplied_already_theirs_is_too(kind):
    _, distiller, optimizer = with_heads(kind, multiplied=True)
    (heads,) = theirs(distiller, optimizer)
    assert heads["lr"] == pytest.approx(OWN[kind])
    assert heads["lr_scale"] * BASE == pytest.approx(OWN[kind])


def test_without_a_scale_in_the_optimizer_they_have_none():
    _, distiller, optimizer = with_heads(AdamW, (None, None))
    (heads,) = theirs(distiller, optimizer)
    assert "lr_scale" not in heads
    assert heads["lr"] == OWN[AdamW]

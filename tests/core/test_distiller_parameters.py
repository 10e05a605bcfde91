"""Heads in optimizers: their groups, rates and decay, and what is said if they are in none."""

from functools import partial

import pytest
import torch
from _distillers import make, train
from _models import images
from torch import nn

from vid_loss import KDLoss, Pair, VIDLoss
from vid_loss.optimizer import HEAD_LEARNING_RATE, SGD_HEAD_STEP, head_learning_rate


def test_parameter_groups_keep_variances_norms_and_biases_from_decay():
    loss = partial(VIDLoss, variance="trained")
    _, _, distiller = make([Pair(f"stage{i}", f"stage{i}", loss=loss) for i in (1, 2)])
    decayed, free = distiller.parameter_groups(weight_decay=0.1)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in distiller.named_parameters()}
    free_names = {names.pop(id(p)) for p in free["params"]}
    assert {name for name in free_names if name.endswith("raw_var")}
    assert all("head.1" in n or n.endswith(("bias", "raw_var")) for n in free_names)
    assert sorted(names.values()) == sorted(
        f"losses.{pair}.head.{layer}.weight"
        for pair in ("stage1->stage1", "stage2->stage2")
        for layer in (0, 3)
    )
    assert len(decayed["params"]) == len(names)


def test_weight_decay_leaves_the_variance_alone():
    pair = Pair("stage1", "stage1", 0.0, loss=partial(VIDLoss, variance="trained"))
    _, _, distiller = make([pair])
    loss = distiller.losses["stage1->stage1"]
    before = loss.variance().clone(), loss.head[0].weight.clone()
    optimizer = torch.optim.SGD(distiller.parameter_groups(weight_decay=0.5), lr=0.1)
    for parameter in distiller.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(loss.variance(), before[0])
    assert not torch.equal(loss.head[0].weight, before[1])


def test_parameter_groups_have_a_rate_of_their_own():
    _, _, distiller = make()
    student = nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-5, weight_decay=0.1)
    distiller.add_to(optimizer)
    first, heads = optimizer.param_groups
    assert (first["lr"], heads["lr"]) == (5e-5, HEAD_LEARNING_RATE)
    assert (first["weight_decay"], heads["weight_decay"]) == (0.1, 0.0)
    assert {id(p) for p in heads["params"]} == {id(p) for p in distiller.parameters()}
    assert [g["lr"] for g in distiller.parameter_groups(lr=0.3, weight_decay=0.1)] == [0.3, 0.3]
    assert [g["lr"] for g in distiller.parameter_groups()] == [HEAD_LEARNING_RATE]


def test_an_optimizer_gets_the_groups_that_it_could_be_built_of():
    _, _, distiller = make()
    options = {"lr": 0.3, "weight_decay": 0.1}
    optimizer = torch.optim.AdamW(nn.Linear(1, 1).parameters(), lr=5e-5)
    distiller.add_to(optimizer, **options)
    for added, group in zip(
        optimizer.param_groups[1:], distiller.parameter_groups(**options), strict=True
    ):
        assert [id(p) for p in added["params"]] == [id(p) for p in group["params"]]
        assert (added["lr"], added["weight_decay"]) == (group["lr"], group["weight_decay"])


class Wrapper:
    """An optimizer of another library, around one of torch's or not."""

    def __init__(self, **attributes):
        vars(self).update(attributes)

    def step(self):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("attributes", "advice"),
    [
        (
            {"opt": torch.optim.SGD([torch.zeros(1)], lr=0.1)},
            r"one: distiller\.add_to\(optimizer\.opt\)$",
        ),
        ({"lr": 0.1}, r"takes list\(distiller\.parameters\(\)\) as a group more when it is built"),
    ],
)
def test_an_optimizer_of_another_library_is_told_what_to_do(attributes, advice):
    _, _, distiller = make()
    with pytest.raises(TypeError, match=rf"one of torch's; got <.*Wrapper.*>\. .*{advice}"):
        distiller.add_to(Wrapper(**attributes))


def test_heads_are_added_once():
    _, _, distiller = make()
    optimizer = torch.optim.SGD([distiller.losses["stage1->stage1"].head[0].weight], lr=0.1)
    with pytest.raises(ValueError, match="got one that has them already"):
        distiller.add_to(optimizer)
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("kind", "rate", "expected"),
    [
        (torch.optim.AdamW, 5e-5, HEAD_LEARNING_RATE),
        (torch.optim.NAdam, 5e-5, HEAD_LEARNING_RATE),
        (torch.optim.Adam, 0.5, 0.5),
        (torch.optim.SGD, 0.5, 0.5),
        (torch.optim.SGD, 1e-3, SGD_HEAD_STEP / 3),
        (torch.optim.RMSprop, 1e-5, HEAD_LEARNING_RATE),
        (torch.optim.RMSprop, 0.02, 0.02),
        (torch.optim.Adadelta, 1.0, 1.0),
        (torch.optim.ASGD, 1e-3, SGD_HEAD_STEP / 3),
    ],
)
def test_heads_are_fitted_at_a_rate_that_fits_them(kind, rate, expected):
    _, _, distiller = make()
    optimizer = kind(nn.Linear(1, 1).parameters(), lr=rate)
    assert [g["lr"] for g in distiller.parameter_groups(optimizer)] == [expected]
    assert [g["lr"] for g in distiller.parameter_groups(optimizer, lr=0.3)] == [0.3]


class Sam(torch.optim.Optimizer):
    """One around another, as SAM and Lookahead are."""

    def __init__(self, parameters, lr, kind):
        self.base_optimizer = kind(parameters, lr=lr)
        super().__init__(self.base_optimizer.param_groups, {"lr": lr})


class Mine(torch.optim.SGD):
    """A kind of SGD whose name does not say so."""


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (Mine, SGD_HEAD_STEP / 3),
        (partial(Sam, kind=torch.optim.SGD), SGD_HEAD_STEP / 3),
        (partial(Sam, kind=Mine), SGD_HEAD_STEP / 3),
        (partial(Sam, kind=torch.optim.AdamW), HEAD_LEARNING_RATE),
    ],
)
def test_what_an_optimizer_is_made_of_counts(build, expected):
    _, _, distiller = make()
    optimizer = build(nn.Linear(1, 1).parameters(), lr=1e-4)
    assert [g["lr"] for g in distiller.parameter_groups(optimizer)] == [expected]


def test_who_looks_at_the_groups_or_is_refused_changes_no_rate():
    student, _, distiller = make()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    distiller.add_to(optimizer)
    assert distiller.own_rate == SGD_HEAD_STEP / 3
    distiller.parameter_groups()
    with pytest.raises(ValueError, match="got one that has them already"):
        distiller.add_to(optimizer, lr=0.5)
    assert distiller.own_rate == SGD_HEAD_STEP / 3


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lion", HEAD_LEARNING_RATE),
        ("rmsproptf", HEAD_LEARNING_RATE),
        ("paged_adamw_8bit", HEAD_LEARNING_RATE),
        ("schedule_free_sgd", SGD_HEAD_STEP / 3),
        ("momentum", SGD_HEAD_STEP / 3),
        ("signsgd", HEAD_LEARNING_RATE),
        ("Nesterov", SGD_HEAD_STEP / 3),
    ],
)
def test_an_optimizer_that_is_yet_to_be_built_is_known_by_its_name(name, expected):
    assert [head_learning_rate(name, rate) for rate in (None, 1e-5, 0.7)] == [
        expected,
        expected,
        0.7,
    ]


@pytest.mark.parametrize(("rate", "expected"), [(1e-3, SGD_HEAD_STEP / 30), (0.1, 0.1)])
def test_beside_sgd_whose_steps_grow_with_lambda_the_largest_one_decides(rate, expected):
    _, _, distiller = make([Pair(f"stage{i}", f"stage{i}", 10.0**i) for i in (1, 2)])
    distiller.set_weight("stage2->stage2", 30.0)
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=rate)
    assert [g["lr"] for g in distiller.parameter_groups(optimizer)] == [expected]


@pytest.mark.parametrize("weight", [0.0, 1e-3, 1.0])
def test_a_small_lambda_which_may_be_raised_later_raises_no_rate(weight):
    _, _, distiller = make([Pair("stage1", "stage1", weight)])
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1e-3)
    assert [g["lr"] for g in distiller.parameter_groups(optimizer)] == [SGD_HEAD_STEP / 3]


def test_a_pair_without_parameters_gives_no_empty_group():
    _, _, distiller = make([Pair("fc", "fc", loss=KDLoss())])
    assert distiller.parameter_groups(weight_decay=0.1) == []


@pytest.mark.parametrize("options", [{}, {"fused": True}], ids=["plain", "fused"])
def test_heads_that_are_in_no_optimizer_are_noticed(options):
    student, _, distiller = make()
    optimizer = torch.optim.Adam(student.parameters(), lr=0.01, **options)
    with pytest.warns(UserWarning, match=r"distiller\.add_to\(optimizer\)"):
        train(student, distiller, optimizer, steps=8)


def test_heads_in_an_optimizer_raise_no_alarm():
    """Not with accumulation, nor with weights loaded between two steps."""
    student, _, distiller = make()
    optimizer = torch.optim.SGD([*student.parameters(), *distiller.parameters()], lr=0.05)
    for _ in range(3):
        student(images())
        distiller(images()).backward()
    student.load_state_dict(student.state_dict())
    train(student, distiller, optimizer, steps=8)


def test_heads_with_an_optimizer_of_their_own_raise_no_alarm():
    student, _, distiller = make()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
    heads_optimizer = torch.optim.AdamW(distiller.parameters(), fused=True)
    for _ in range(3):
        train(student, distiller, optimizer, steps=3)
        heads_optimizer.step()


def test_heads_that_nothing_weighs_raise_no_alarm():
    student, _, distiller = make([Pair("stage1", "stage1", 0.0)])
    optimizer = torch.optim.SGD([*student.parameters(), *distiller.parameters()], lr=0.05)
    train(student, distiller, optimizer, steps=9)


def test_frozen_heads_raise_no_alarm():
    student, _, distiller = make()
    distiller.requires_grad_(False)
    train(student, distiller, torch.optim.SGD(student.parameters(), lr=0.05), steps=8)

import copy
from math import nan

import pytest
import torch
from torch import nn

from vid_loss import FitNetLoss, VIDLoss
from vid_loss.losses.positions import some_positions


def taken(kind, size, share):
    """Which positions are taken of a map or of tokens, by a feature that holds their numbers."""
    numbers = torch.arange(torch.Size(size).numel()).view(1, *size).float().expand(2, *size)
    feature = numbers.unsqueeze(1 if kind == "map" else 2)
    student, teacher, _ = some_positions(feature, feature.clone(), None, share)
    assert torch.equal(student, teacher)
    assert torch.equal(student[0], student[1])
    return student[0].flatten().int().tolist()


@pytest.mark.parametrize(
    ("kind", "size", "share"),
    [
        ("map", (8, 8), 0.25),
        ("map", (7, 5), 0.25),
        ("map", (6, 9), 1 / 9),
        ("map", (4, 6), 0.5),
        ("map", (1, 20), 0.25),
        ("map", (2, 2), 0.04),
        ("tokens", (10,), 0.25),
        ("tokens", (3,), 0.1),
    ],
)
def test_every_position_has_the_same_chance_and_none_comes_twice(kind, size, share):
    torch.manual_seed(0)
    total = torch.Size(size).numel()
    counts = torch.zeros(total)
    draws = 1500
    for _ in range(draws):
        chosen = taken(kind, size, share)
        assert len(set(chosen)) == len(chosen)
        counts[chosen] += 1
    rate = len(chosen) / total
    spread = (rate * (1 - rate) / draws) ** 0.5
    assert (counts / draws - rate).abs().max() < 5 * spread + 1e-9


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_a_lattice_of_a_map_has_the_share_it_says(share):
    assert len(taken("map", (8, 12), share)) == share * 96


LOSSES = {
    "vid": lambda s, t: VIDLoss(s, t, norm="none", positions=0.25),
    "vid batchmean": lambda s, t: VIDLoss(s, t, norm="none", positions=0.25, reduction="batchmean"),
    "vid none": lambda s, t: VIDLoss(s, t, norm="none", positions=0.25, reduction="none"),
    "fitnet": lambda s, t: FitNetLoss(s, t, positions=0.25),
}


SHAPES = {
    "map": ((3, 4, 4, 4), (3, 6, 4, 4)),
    "odd map": ((3, 4, 3, 5), (3, 6, 3, 5)),
    "tokens": ((3, 8, 4), (3, 8, 6)),
}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES)
def test_value_and_gradient_are_those_of_all_positions_in_the_mean(make, shapes, monkeypatch):
    torch.manual_seed(0)
    student, teacher = torch.randn(shapes[0], requires_grad=True), torch.randn(shapes[1])
    loss = make(*shapes)
    if isinstance(loss, VIDLoss):  # of q as it is: what each step fits anew is another function
        for _ in range(20):
            loss(student, teacher)
        loss.scale.positions.fill_(1e30)
        loss.running_var.momentum = 1e-12
        monkeypatch.setattr("vid_loss.losses._group.LEAST_SHARE", 0.0)
    whole = loss.eval()(student, teacher)
    (expected,) = torch.autograd.grad(whole.sum(), student)
    loss.train()
    values, gradients = [], []
    for _ in range(400):
        value = loss(student, teacher)
        values.append(value.detach())
        gradients.append(torch.autograd.grad(value.sum(), student)[0])
    for found, true in ((values, whole.detach()), (gradients, expected)):
        stacked = torch.stack(found)
        spread = stacked.std(0) / len(found) ** 0.5
        assert ((stacked.mean(0) - true).abs() <= 5 * spread + 1e-6).all()


def twice(change, mask=None):
    """The loss of the same features, q and draw, before and after a change of the teacher's."""
    student, teacher = torch.randn(4, 8, 4), torch.randn(4, 8, 6)
    loss = VIDLoss(student.shape, teacher.shape, positions=0.5)
    state = copy.deepcopy(loss.state_dict())
    torch.manual_seed(1)
    first = loss(student, teacher, mask)
    loss.load_state_dict(state)
    change(teacher)
    torch.manual_seed(1)
    return first, loss(student, teacher, mask)


def test_masked_positions_count_for_nothing():
    mask = torch.arange(8) < torch.tensor([[8], [3], [1], [5]])
    first, second = twice(lambda teacher: teacher.masked_fill_(~mask.unsqueeze(-1), nan), mask)
    assert torch.equal(first, second)


def test_one_seed_takes_the_same():
    assert torch.equal(*twice(lambda teacher: None))


def test_the_head_sees_the_part_alone_and_all_in_eval_mode():
    seen = []

    class Seeing(nn.Conv2d):
        def forward(self, x):
            seen.append(tuple(x.shape))
            return super().forward(x)

    loss = VIDLoss((2, 3, 8, 8), (2, 5, 8, 8), head=Seeing(3, 5, 1), positions=0.25)
    student, teacher = torch.randn(2, 3, 8, 8), torch.randn(2, 5, 8, 8)
    loss(student, teacher)
    loss.eval()(student, teacher)
    assert seen == [(2, 3, 4, 4), (2, 3, 8, 8)]
    assert loss.stats().positions == 64  # of a sample, whatever part of them was taken


def test_nothing_is_drawn_where_all_are_taken():
    student, teacher = torch.randn(2, 3, 8, 8), torch.randn(2, 5, 8, 8)
    part = VIDLoss(student.shape, teacher.shape, positions=0.25).eval()
    whole = VIDLoss(student.shape, teacher.shape)
    before = torch.get_rng_state()
    for loss in (part, whole):
        loss(student, teacher)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("positions", [0, -0.5, 1.5, float("nan")])
@pytest.mark.parametrize("loss", [VIDLoss, FitNetLoss])
def test_a_share_that_is_none_is_named(loss, positions):
    with pytest.raises(ValueError, match=f"{loss.__name__}, positions: expected a share above 0"):
        loss((2, 3, 4, 4), (2, 5, 4, 4), positions=positions)


def test_compiled_it_does_not_compile_again():
    torch.manual_seed(0)
    loss = VIDLoss((2, 3, 8, 8), (2, 5, 8, 8), positions=0.25)
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    student, teacher = torch.randn(2, 3, 8, 8), torch.randn(2, 5, 8, 8)
    compiled(student, teacher)
    with torch.compiler.set_stance("fail_on_recompile"):
        values = [compiled(student, teacher).item() for _ in range(6)]
    assert len(set(values)) > 1


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", [VIDLoss, FitNetLoss])
def test_shares_compiled_one_after_the_other_have_the_eager_gradients(kind, shapes):
    """Of the second on, dynamo takes the share for a number that it does not know."""
    torch.compiler.reset()
    torch.manual_seed(0)
    student, teacher = torch.randn(shapes[0], requires_grad=True), torch.randn(shapes[1])
    for share in (1.0, 0.25, 0.5, 0.1):
        loss = kind(*shapes, positions=share)
        state = copy.deepcopy(loss.state_dict())
        steps = []
        for step in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
            loss.load_state_dict(state)
            torch.manual_seed(1)
            value = step(student, teacher)
            steps.append([value, *torch.autograd.grad(value, [student, *loss.parameters()])])
        torch.testing.assert_close(steps[1], steps[0])
        assert steps[1][1].any()

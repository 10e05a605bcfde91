"""The variance of q, a running mean of the squared residuals; channels that never change."""

import copy
import math

import pytest
import torch
from torch import nn

from vid_loss import VIDLoss
from vid_loss.diagnostics import PairDiagnostics


def constant_head(channels):
    """Predicts 0 for each channel."""
    head = nn.Linear(channels, channels)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def test_the_first_batches_count_equally_and_then_the_newest_for_the_momentum():
    torch.manual_seed(0)
    loss = VIDLoss((8, 2), (8, 2), momentum=0.2, standardize=False, head=constant_head(2))
    squares = []
    expected = torch.zeros(2, dtype=torch.float64)
    for step in range(12):
        teacher = (1 + step) * torch.randn(8, 2)
        loss(torch.zeros(8, 2), teacher)
        squares.append(teacher.double().square().mean(0))
        mean = torch.stack(squares).mean(0)
        expected = mean if step < 5 else 0.8 * expected + 0.2 * squares[-1]
        torch.testing.assert_close(loss.variance().double(), expected, rtol=1e-5, atol=0)


def test_early_batches_count_by_their_positions():
    loss = VIDLoss((8, 1), (8, 1), momentum=0.01, standardize=False, head=constant_head(1))
    loss(torch.zeros(6, 1), torch.full((6, 1), 1.0))
    loss(torch.zeros(2, 1), torch.full((2, 1), 3.0))
    assert loss.variance().item() == pytest.approx((6 * 1 + 2 * 9) / 8)


def test_what_is_not_finite_leaves_the_variance():
    torch.manual_seed(0)
    loss = VIDLoss((8, 2), (8, 2))
    loss(torch.randn(8, 2), torch.randn(8, 2))
    before = loss.running_var.var.clone()
    student = torch.randn(8, 2)
    student[0] = math.inf
    loss(student, torch.randn(8, 2))
    assert torch.equal(loss.running_var.var, before)


def test_eval_mode_estimates_nothing():
    loss = VIDLoss((8, 2), (8, 2)).eval()
    before = copy.deepcopy(loss.state_dict())
    loss(torch.randn(8, 2), torch.randn(8, 2) + 3)
    torch.testing.assert_close(loss.state_dict(), before, rtol=0, atol=0)
    assert loss.stats() is None


@pytest.mark.parametrize("variance", ["running", "trained"])
def test_a_dead_channel_teaches_nothing(variance):
    """Value finite, no gradient, no nats, not on the floor; the others are as without it."""
    torch.manual_seed(0)
    loss = VIDLoss((8, 3), (8, 2), variance=variance)
    alone = VIDLoss((8, 3), (8, 1), variance=variance)
    for _ in range(5):
        with torch.no_grad():
            alone.head.weight.copy_(loss.head.weight[:1])
        loss.zero_grad()
        student = torch.randn(8, 3, requires_grad=True)
        teacher = torch.cat([torch.randn(8, 1), torch.full((8, 1), 4.0)], dim=1)
        value, expected = loss(student, teacher), alone(student, teacher[:, :1])
        torch.testing.assert_close(2 * value, expected)
        grads = [
            torch.autograd.grad(x, student, retain_graph=True)[0] for x in (2 * value, expected)
        ]
        torch.testing.assert_close(*grads)
        value.backward()
        assert not loss.head.weight.grad[1].any()
    report, other = (PairDiagnostics.of(x.stats()) for x in (loss, alone))
    assert report.channels_on_floor == 0
    assert report.nats_per_feature == pytest.approx(other.nats_per_feature, rel=1e-5)


def test_a_channel_that_wakes_up_is_taken_in_without_a_jolt():
    """Its variance starts from 1 like any other's, not from what the head said while it slept."""
    torch.manual_seed(0)
    loss = VIDLoss((64, 3), (64, 2))
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.1)
    for step in range(60):
        teacher = torch.randn(64, 2)
        if step < 40:
            teacher[:, 1] = 0
        value = loss(torch.randn(64, 3), teacher)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        assert value < 4, step
    assert value < 0.8


@pytest.mark.parametrize("training", [True, False])
def test_samples_one_by_one_sum_up_to_all_with_a_channel_that_never_changes(training):
    torch.manual_seed(0)
    teacher = torch.randn(4, 7, 3)
    teacher[..., 1] = 7.0
    values = []
    for reduction in ("none", "sum"):
        torch.manual_seed(1)
        loss = VIDLoss((4, 7, 5), (4, 7, 3), reduction=reduction)
        student = torch.randn(4, 7, 5)
        loss(student, teacher)
        values.append(loss.train(training)(student, teacher))
    torch.testing.assert_close(values[0].sum(), values[1])

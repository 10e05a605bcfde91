import math

import pytest
import torch
from torch import nn

from vid_loss import VIDLoss
from vid_loss.diagnostics import PairDiagnostics


def readable_diagnostics(mean, target, var):
    """The same from its formulas, channel by channel, in float64."""
    mean, target = mean.double(), target.double()
    explained, nats = [], []
    for c in range(len(var)):
        residual = (target[:, c] - mean[:, c]).square().mean()
        variance = target[:, c].var(correction=0)
        explained.append(1 - residual / variance)
        nats.append(0.5 * (math.log(variance / var[c]) + 1 - residual / var[c]))
    return float(sum(explained) / len(explained)), float(sum(nats) / len(nats))


def reported(mean, target, mask=None, *, init_var=1.0):
    """The diagnostics after one step whose head says ``mean``, in the teacher's raw units."""
    options = {"variance": "trained", "standardize": False, "init_var": init_var}
    loss = VIDLoss(mean.shape, target.shape, head=nn.Identity(), **options)
    loss(mean, target, mask)
    return PairDiagnostics.of(loss.stats())


@pytest.mark.parametrize("shape", [(64, 3), (16, 3, 4, 5), (16, 7, 3)])
def test_the_figures_are_those_of_the_formulas(shape):
    torch.manual_seed(0)
    target, mean, var = torch.randn(shape) * 2 + 3, torch.randn(shape) + 3, [0.7] * 3
    report = reported(mean, target, init_var=0.7)
    if len(shape) == 3:
        mean, target = mean.flatten(0, 1), target.flatten(0, 1)
    explained, nats = readable_diagnostics(mean, target, var)
    assert report.explained_variance == pytest.approx(explained, rel=1e-4)
    assert report.nats_per_element == pytest.approx(nats, rel=1e-4)
    elements = math.prod(shape[1:])
    assert report.nats_per_feature == pytest.approx(elements * nats, rel=1e-4)


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e2])
def test_the_default_form_reports_the_same_of_its_standardized_feature(scale):
    """With the variance that it fits itself: nats are -log(1 - explained variance) / 2."""
    torch.manual_seed(0)
    target = scale * (torch.randn(999, 3) + 5)
    unit = (target - target.mean(0)) / target.std(0, correction=0)
    mean = torch.tensor([0.9, 0.5, 0.1]) * unit
    loss = VIDLoss(mean.shape, target.shape, head=nn.Identity())
    value = loss(mean, target)
    report = PairDiagnostics.of(loss.stats())
    unexplained = [0.1**2, 0.5**2, 0.9**2]
    assert report.explained_variance == pytest.approx(1 - sum(unexplained) / 3, rel=1e-4)
    nats = -sum(map(math.log, unexplained)) / 6
    assert report.nats_per_element == pytest.approx(nats, rel=1e-4)
    assert report.nats_per_element == pytest.approx(0.5 - value.item(), rel=1e-4)


def test_masked_tokens_count_in_nothing():
    torch.manual_seed(0)
    target, mean = torch.randn(4, 6, 3), torch.randn(4, 6, 3)
    mask = torch.ones(4, 6)
    mask[:, 4:] = 0
    short = reported(mean[:, :4], target[:, :4])
    mean[:, 4:], target[:, 4:] = 0, 100
    padded = reported(mean, target, mask)
    assert padded.explained_variance == pytest.approx(short.explained_variance, rel=1e-4)
    assert padded.nats_per_feature == pytest.approx(short.nats_per_feature, rel=1e-4)


def test_they_are_running_means_over_the_last_batches():
    """The first batches count equally, then the newest counts for the momentum."""
    torch.manual_seed(0)
    loss = VIDLoss((64, 2), (64, 2), momentum=0.25, standardize=False, head=nn.Identity())
    expected = 0.0
    for step in range(8):
        target = torch.randn(64, 2)
        mean = target + step * torch.tensor([1.0, -1.0])
        loss(mean, target)
        expected += max(1 / (step + 1), 0.25) * (step**2 - expected)
        report = PairDiagnostics.of(loss.stats())
        residual = (loss.scale.var.reciprocal() * expected).mean()
        assert report.explained_variance == pytest.approx(1 - float(residual), rel=1e-4)


def test_half_precision_features_are_summed_in_float32():
    torch.manual_seed(0)
    target = torch.randn(64, 2, 16, 16).bfloat16() + 20
    half = reported(target.float() - 1, target)
    full = reported(target.float() - 1, target.float())
    assert half.nats_per_element == pytest.approx(full.nats_per_element, rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"standardize": False}], ids=str)
def test_a_dead_channel_carries_nothing(options):
    torch.manual_seed(0)
    target = torch.randn(64, 2)
    target[:, 1] = 4.0
    mean = target * torch.tensor([0.5, 1.0])

    def report(channels):
        shape = 64, channels
        loss = VIDLoss(shape, shape, head=nn.Identity(), **options)
        loss(mean[:, :channels], target[:, :channels])
        return PairDiagnostics.of(loss.stats())

    both, alone = report(2), report(1)
    assert both.channels == 2
    assert both.nats_per_element == pytest.approx(alone.nats_per_element / 2, rel=1e-5)
    assert both.explained_variance == pytest.approx(alone.explained_variance, rel=1e-5)
    assert both.channels_on_floor == len(options)  # in its own units there is nothing to predict


@pytest.mark.parametrize("init_var", [0.1, 10.0])
def test_variances_that_are_not_trained_never_say_too_much(init_var):
    torch.manual_seed(0)
    report = reported(torch.zeros(999, 2), torch.randn(999, 2), init_var=init_var)
    assert report.nats_per_element < 0


def test_a_constant_feature_has_no_explained_variance():
    target = torch.full((8, 2), 3.0)
    assert math.isnan(reported(target, target).explained_variance)


@pytest.mark.parametrize("correlation", [0.3, 0.6, 0.9])
def test_the_estimate_is_the_mutual_information_of_linear_gaussian_pairs(correlation):
    # t = r s + sqrt(1 - r^2) n, mixed by a rotation of s: I = -log(1 - r^2) / 2 an element.
    torch.manual_seed(0)
    channels = 4
    rotation = torch.linalg.qr(torch.randn(channels, channels))[0]
    units = torch.tensor([1e-2, 1.0, 30.0, 1e2])  # no information depends on them

    def sample(count):
        student, noise = torch.randn(2, count, channels)
        feature = correlation * student @ rotation + math.sqrt(1 - correlation**2) * noise
        return student, units * feature

    loss = VIDLoss((1, channels), (1, channels))
    # Adam's steps are as long as its rate: 0.02 crosses the head's distance, 1 at most, in some 50
    # of them, and the variance's running mean, over some 20, settles in the rest.
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.02)
    for _ in range(100):
        optimizer.zero_grad()
        loss(*sample(4096)).backward()
        optimizer.step()
    report = PairDiagnostics.of(loss.stats())
    closed_form = -0.5 * math.log(1 - correlation**2)
    assert report.nats_per_element == pytest.approx(closed_form, rel=0.05)
    assert report.nats_per_feature == pytest.approx(channels * closed_form, rel=0.05)
    assert report.explained_variance == pytest.approx(correlation**2, rel=0.05)

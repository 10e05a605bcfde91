import math

import pytest
import torch
from _models import TokenNet, cnn_pair, images
from torch import nn

from vid_loss import DistillationModel, Distiller, KDLoss, Pair, VIDLoss, gradient_shares
from vid_loss.losses.stats import observe, summarise

PAIRS = [Pair("stage1", "stage1"), Pair("fc:input", "fc")]


def step(distiller, batch):
    distiller.student.train()
    distiller.student(batch)
    return distiller(batch)


def readable_diagnostics(mean, target, var):
    """The same from its formulas, channel by channel, in float64."""
    mean, target = mean.double(), target.double()
    residuals, variances, nats = [], [], []
    for c in range(len(var)):
        residuals.append((target[:, c] - mean[:, c]).square().mean())
        variances.append(target[:, c].var(correction=0))
        nats.append(0.5 * (math.log(variances[c] / var[c]) + 1 - residuals[c] / var[c]))
    return 1 - sum(residuals) / sum(variances), sum(nats) / len(nats)


def observed(mean, target, var, mask=None):
    squares = (target - mean).square()
    if mask is not None:
        squares = squares * mask.unsqueeze(-1)
    if target.ndim > 2:
        squares = squares.sum((2, 3) if target.ndim == 4 else 1)
    return summarise(observe(squares, target, var, mask, floor=1e-5))


@pytest.mark.parametrize("shape", [(64, 3), (16, 3, 4, 5), (16, 7, 3)])
def test_the_figures_are_those_of_the_formulas(shape):
    torch.manual_seed(0)
    target, mean, var = torch.randn(shape) * 2 + 3, torch.randn(shape) + 3, torch.rand(3) + 0.5
    report = observed(mean, target, var)
    if len(shape) == 3:
        mean, target = mean.flatten(0, 1), target.flatten(0, 1)
    explained, nats = readable_diagnostics(mean, target, var)
    assert report.explained_variance == pytest.approx(float(explained), rel=1e-4)
    assert report.nats_per_element == pytest.approx(float(nats), rel=1e-4)
    elements = math.prod(shape[1:])
    assert report.nats_per_feature == pytest.approx(elements * float(nats), rel=1e-4)


def test_masked_tokens_count_in_nothing():
    torch.manual_seed(0)
    target, mean, var = torch.randn(4, 6, 3), torch.randn(4, 6, 3), torch.rand(3) + 0.5
    mask = torch.ones(4, 6)
    mask[:, 4:] = 0
    short = observed(mean[:, :4], target[:, :4], var)
    mean[:, 4:], target[:, 4:] = 0, 100
    padded = observed(mean, target, var, mask)
    assert padded.explained_variance == pytest.approx(short.explained_variance, rel=1e-4)
    assert padded.nats_per_feature == pytest.approx(short.nats_per_feature, rel=1e-4)


def test_32_samples_of_maps_and_tokens_are_enough():
    torch.manual_seed(0)
    target, var = torch.randn(40, 5, 3), torch.ones(3)
    target[32:] += 100
    mask = torch.ones(40, 5)
    mask[:, 3:] = 0
    for kind in (target, target.mT.unsqueeze(2)):
        assert observed(kind - 1, kind, var) == observed(kind[:32] - 1, kind[:32], var)
    few = observed(target[:32] - 1, target[:32], var, mask[:32])
    assert observed(target - 1, target, var, mask) == few
    assert few.nats_per_feature == pytest.approx(3 * 3 * few.nats_per_element)


def test_half_precision_features_are_summed_in_float32():
    torch.manual_seed(0)
    target = torch.randn(64, 2, 16, 16) + 20
    half = observed(target - 1, target.bfloat16(), torch.ones(2))
    full = observed(target - 1, target.bfloat16().float(), torch.ones(2))
    assert half.nats_per_element == pytest.approx(full.nats_per_element, rel=1e-3)


def test_a_dead_channel_is_on_the_floor_and_carries_nothing():
    target = torch.randn(64, 2)
    target[:, 1] = 4.0
    report = observed(target, target, torch.tensor([1.0, 1e-5]))
    assert (report.channels_on_floor, report.channels) == (1, 2)
    alone = observed(target[:, :1], target[:, :1], torch.tensor([1.0]))
    assert report.nats_per_element == pytest.approx(alone.nats_per_element / 2, rel=1e-5)


@pytest.mark.parametrize("init_var", [0.1, 10.0])
def test_variances_that_are_not_trained_never_say_too_much(init_var):
    torch.manual_seed(0)
    report = observed(torch.zeros(999, 2), torch.randn(999, 2), torch.full((2,), init_var))
    assert report.nats_per_element < 0


def test_a_constant_feature_has_no_explained_variance():
    target = torch.full((8, 2), 3.0)
    assert math.isnan(observed(target, target, torch.ones(2)).explained_variance)


@pytest.mark.parametrize("correlation", [0.3, 0.6, 0.9])
def test_the_estimate_is_the_mutual_information_of_linear_gaussian_pairs(correlation):
    # t = r s + sqrt(1 - r^2) n, mixed by a rotation of s: I = -log(1 - r^2) / 2 an element.
    torch.manual_seed(0)
    channels = 4
    rotation = torch.linalg.qr(torch.randn(channels, channels))[0]

    def sample(count):
        student, noise = torch.randn(2, count, channels)
        return student, correlation * student @ rotation + math.sqrt(1 - correlation**2) * noise

    loss = VIDLoss((1, channels), (1, channels))
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.1)
    for i in range(200):
        optimizer.param_groups[0]["lr"] = 0.1 if i < 120 else 0.005
        optimizer.zero_grad()
        loss(*sample(4096)).backward()
        optimizer.step()
    loss.observes = True
    loss(*sample(2**16))
    report = summarise(loss.observation)
    closed_form = -0.5 * math.log(1 - correlation**2)
    assert report.nats_per_element == pytest.approx(closed_form, rel=0.05)
    assert report.nats_per_feature == pytest.approx(channels * closed_form, rel=0.05)
    assert report.explained_variance == pytest.approx(correlation**2, rel=0.05)


def test_a_distiller_reports_its_vid_pairs_by_name():
    student, teacher = cnn_pair()
    distiller = Distiller(
        student, teacher, [*PAIRS, Pair("fc", "fc", loss=KDLoss())], example=images()
    )
    step(distiller, images())
    report = distiller.diagnostics()
    assert list(report) == ["stage1->stage1", "fc:input->fc"]
    assert report["stage1->stage1"].channels == 8
    # The variances start at 5, above those of the features: nothing is known to be transferred.
    assert all(pair.nats_per_element < 0 for pair in report.values())


def test_masks_reach_the_diagnostics():
    torch.manual_seed(0)
    student, teacher = TokenNet(4), TokenNet(8)
    text = {"input_ids": torch.arange(12).view(2, 6), "attention_mask": torch.ones(2, 6)}
    text["attention_mask"][:, 3:] = 0
    distiller = Distiller(student, teacher, {"layer": "layer"}, example=text)
    student(**text)
    distiller(**text)
    report = distiller.diagnostics()["layer->layer"]
    assert report.nats_per_feature == pytest.approx(3 * 8 * report.nats_per_element, rel=1e-5)


def test_what_is_kept_has_no_graph_and_no_map():
    student, teacher = cnn_pair()
    distiller = Distiller(student, teacher, PAIRS, example=images())
    step(distiller, images())
    kept = distiller.losses["stage1->stage1"].observation
    tensors = [x for x in kept if isinstance(x, torch.Tensor)]
    assert not any(x.requires_grad for x in tensors)
    assert max(x.numel() for x in tensors) == 8 * 8  # batch x channels


def test_the_loss_is_the_same_with_and_without():
    student, teacher = cnn_pair()
    torch.manual_seed(0)
    on = Distiller(student, teacher, PAIRS, example=images())
    torch.manual_seed(0)
    off = Distiller(student, teacher, PAIRS, example=images(), diagnose=False)
    student(images())
    torch.testing.assert_close(on(images()), off(images()), rtol=0, atol=0)
    assert on.state_dict().keys() == off.state_dict().keys()


def test_diagnostics_need_a_step_and_the_switch():
    student, teacher = cnn_pair()
    with pytest.raises(RuntimeError, match="expected a training step before"):
        Distiller(student, teacher, PAIRS, example=images()).diagnostics()
    off = Distiller(student, teacher, PAIRS, example=images(), diagnose=False)
    step(off, images())
    with pytest.raises(RuntimeError, match="diagnose=True"):
        off.diagnostics()


def test_diagnostics_of_a_compiled_model_agree():
    torch._dynamo.reset()
    student, teacher = cnn_pair()
    distiller = Distiller(student, teacher, PAIRS, example=images())
    model = DistillationModel(student, distiller)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(images())[1].backward()
    traced = distiller.diagnostics()
    step(distiller, images())
    eager = distiller.diagnostics()
    assert traced["stage1->stage1"].nats_per_element == pytest.approx(
        eager["stage1->stage1"].nats_per_element, rel=1e-4
    )


def test_gradient_shares_follow_the_weights():
    student, teacher = cnn_pair()
    pairs = [Pair("stage1", "stage1", 1.0), Pair("stage1", "stage1", 3.0, name="again")]
    distiller = Distiller(student, teacher, pairs, example=images())
    distiller.losses["again"].load_state_dict(distiller.losses["stage1->stage1"].state_dict())
    task = student(images()).square().mean()
    shares = gradient_shares({"task": task, **distiller.weighted_terms(images())}, student)
    assert sum(shares.values()) == pytest.approx(1.0)
    assert shares["again"] == pytest.approx(3 * shares["stage1->stage1"], rel=1e-4)
    assert shares["task"] > 0
    task.backward()  # the graph is kept for the step


def test_gradient_shares_leave_no_gradient_behind():
    student, teacher = cnn_pair()
    distiller = Distiller(student, teacher, PAIRS, example=images())
    student(images())
    gradient_shares(distiller.weighted_terms(images()), student)
    parameters = [*student.parameters(), *distiller.parameters()]
    assert all(parameter.grad is None for parameter in parameters)


def test_a_loss_that_does_not_reach_the_student_has_no_share():
    student = nn.Linear(2, 1)
    other = torch.ones(1, requires_grad=True)
    losses = {"elsewhere": other.sum(), "constant": torch.ones(())}
    assert gradient_shares(losses, student) == {"elsewhere": 0.0, "constant": 0.0}

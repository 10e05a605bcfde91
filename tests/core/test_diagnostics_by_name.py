"""What a distiller reports of its pairs, and which share of the gradient each loss has."""

import copy

import pytest
import torch
from _models import TokenNet, cnn_pair, images
from torch import nn

import vid_loss
from vid_loss import DistillationModel, Distiller, KDLoss, Pair, gradient_shares
from vid_loss.diagnostics import PairDiagnostics, report

PAIRS = [Pair("stage1", "stage1"), Pair("fc:input", "fc")]


def step(distiller, batch):
    distiller.student.train()
    distiller.student(batch)
    return distiller(batch)


def test_a_distiller_reports_its_vid_pairs_by_name():
    student, teacher = cnn_pair()
    distiller = Distiller(
        student, teacher, [*PAIRS, Pair("fc", "fc", loss=KDLoss())], example=images()
    )
    step(distiller, images())
    report = distiller.diagnostics()
    assert list(report) == ["stage1->stage1", "fc:input->fc"]
    assert report["stage1->stage1"].channels == 8
    # Heads that have just been built know nothing, and the variances say so from the first step.
    assert all(abs(pair.nats_per_element) < 0.1 for pair in report.values())


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
    kept = distiller.losses["stage1->stage1"].stats()
    tensors = [x for x in kept if isinstance(x, torch.Tensor)]
    assert tensors
    assert not any(x.requires_grad for x in tensors)
    assert max(x.numel() for x in tensors) == 8  # channels


def test_reading_them_changes_nothing_and_later_steps_do_not_change_what_was_read():
    student, teacher = cnn_pair()
    distiller = Distiller(student, teacher, PAIRS, example=images())
    step(distiller, images())
    before = {name: x.clone() for name, x in distiller.state_dict().items()}
    report, kept = distiller.diagnostics(), distiller.losses["stage1->stage1"].stats()
    assert distiller.diagnostics() == report
    torch.testing.assert_close(distiller.state_dict(), before, rtol=0, atol=0)
    step(distiller, 3 * images())
    assert PairDiagnostics.of(kept) == report["stage1->stage1"]
    assert distiller.diagnostics() != report


def test_diagnostics_need_a_step():
    student, teacher = cnn_pair()
    distiller = Distiller(student, teacher, PAIRS, example=images())
    with pytest.raises(RuntimeError, match="expected a training step before"):
        distiller.diagnostics()
    assert distiller.metrics() == {}


def test_metrics_are_named_for_a_logger():
    student, teacher = cnn_pair()
    distiller = Distiller(student, teacher, PAIRS, example=images())
    step(distiller, images())
    report, metrics = distiller.diagnostics(), distiller.metrics()
    assert len(metrics) == 3 * len(PAIRS)
    explained = report["fc:input->fc"].explained_variance
    assert metrics["explained_variance/fc:input->fc"] == explained


def test_diagnostics_of_a_compiled_model_agree():
    torch._dynamo.reset()
    student, teacher = cnn_pair()
    distiller = Distiller(student, teacher, PAIRS, example=images())
    model = DistillationModel(student, distiller)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    twin = copy.deepcopy(model)
    for batch in (images(), 2 * images()):
        compiled(batch)[1].backward()
        twin(batch)[1].backward()
    traced, eager = distiller.diagnostics(), twin.distiller.diagnostics()
    for key in ("nats_per_element", "nats_per_feature", "explained_variance"):
        values = [getattr(report["stage1->stage1"], key) for report in (traced, eager)]
        assert values[0] == pytest.approx(values[1], rel=1e-4), key


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


def test_a_report_has_versions_models_pairs_and_what_the_last_step_came_to():
    student, teacher = cnn_pair()
    pairs = [*PAIRS, Pair("fc", "fc", loss=KDLoss(temperature=4), weight=0.5)]
    distiller = Distiller(student, teacher, pairs, example=images())
    assert report(distiller).count("no step") == 3
    step(distiller, images())
    lines = report(distiller).splitlines()
    assert f"vid-loss {vid_loss.__version__}, torch {torch.__version__}" in lines[0]
    size = sum(p.numel() for p in student.parameters())
    assert f"student: {type(student).__name__}, {size} parameters, float32 on cpu" in lines
    where = lines.index("fc:input->fc: fc:input (Linear) -> fc (Linear), VIDLoss, lambda 3")
    found = distiller.diagnostics()["fc:input->fc"]
    assert f"explained_variance {found.explained_variance:.4g}" in lines[where + 1]
    assert f"last term {float(distiller.terms['fc:input->fc']):.4g}" in lines[where + 1]
    assert any(line.endswith("KDLoss, lambda 0.5") for line in lines)


def test_a_report_says_what_keeps_the_diagnostics_away(monkeypatch):
    def not_finite():
        raise RuntimeError("NaN in it")

    student, teacher = cnn_pair()
    distiller = Distiller(student, teacher, PAIRS, example=images())
    monkeypatch.setattr(distiller, "metrics", not_finite)
    assert "diagnostics: NaN in it" in report(distiller)


def test_a_frozen_student_has_no_share():
    student, _ = cnn_pair()
    batch = images().requires_grad_()
    student.requires_grad_(False)
    assert gradient_shares({"task": student(batch).sum()}, student) == {"task": 0.0}

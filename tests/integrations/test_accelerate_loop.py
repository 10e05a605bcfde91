import importlib
import re
import sys
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, StackDataset

from vid_loss import Distiller, Pair, VIDLoss
from vid_loss.cache import FeatureCache
from vid_loss.diagnostics import METRICS

pytest.importorskip("accelerate", reason="needs the accelerate extra")
pytest.importorskip("safetensors", reason="needs the accelerate extra")

from _accelerate import loader, make_accelerator, net, net_parameters_at_start, run
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from safetensors.torch import load_file
from vid_loss.integrations.accelerate import evaluate, train
from vid_loss.integrations.accelerate._means import LossMeans

pytestmark = pytest.mark.usefixtures("fresh_state")


def test_training_moves_student_and_heads_and_records_every_epoch(accelerator, tmp_path):
    before = net_parameters_at_start()
    progress, student, _ = run(accelerator, tmp_path)
    assert progress.epoch == 2
    transferred = {f"{metric}/2:input->2" for metric in METRICS}
    names = {"task", "2:input->2", *transferred, "validation"}
    assert [set(epoch) for epoch in progress.history] == [names] * 2
    assert progress.history[1]["2:input->2"] < progress.history[0]["2:input->2"]
    assert not torch.equal(student[0].weight, before)
    assert progress.best_percent == max(epoch["validation"] for epoch in progress.history)


@pytest.mark.parametrize(("kind", "rate"), [(torch.optim.SGD, 0.3), (torch.optim.AdamW, 5e-3)])
def test_heads_come_into_a_prepared_optimizer_at_the_rate_of_its_kind(accelerator, kind, rate):
    student = net(8, 2)
    distiller = Distiller(student, net(16, 5), {"0": "0"}, example=torch.zeros(1, 6))
    optimizer = accelerator.prepare(kind(student.parameters(), lr=1e-4))
    distiller.add_to(optimizer)
    assert optimizer.param_groups[-1]["lr"] == pytest.approx(rate)


def test_a_student_alone_trains_without_a_distiller(accelerator, tmp_path):
    progress, student, _ = run(accelerator, tmp_path, transfer=False)
    assert set(progress.history[0]) == {"task", "validation"}
    assert not torch.equal(student[0].weight, net_parameters_at_start())


@pytest.mark.parametrize(("shown", "expected"), [(True, 2), (False, 0)])
def test_losses_are_read_every_ten_steps_and_not_for_a_hidden_bar(
    accelerator, tmp_path, monkeypatch, shown, expected
):
    read = []
    monkeypatch.setattr(LossMeans, "last", lambda means: read.append(means.count) or {})
    data = loader(8 * 25, shuffle=True)
    run(accelerator, tmp_path, train_loader=data, epochs=1, show_progress=shown)
    assert len(read) == expected  # each makes the host wait for the device


def test_unlabeled_batches_train_the_transfer_terms(accelerator, tmp_path):
    data = loader(32, unlabeled=32, shuffle=True)
    progress, student, _ = run(accelerator, tmp_path, train_loader=data)
    assert progress.history[0]["task"] == 0
    assert not torch.equal(student[0].weight, net_parameters_at_start())


def test_clipping_counts_the_gradients_of_heads(accelerator, tmp_path, monkeypatch):
    clipped = []
    original = accelerator.clip_grad_norm_

    def noted(parameters, norm):
        clipped.append((len(list(parameters := list(parameters))), norm))
        return original(parameters, norm)

    monkeypatch.setattr(accelerator, "clip_grad_norm_", noted)
    _, student, distiller = run(accelerator, tmp_path, max_grad_norm=0.5)
    count = len(list(student.parameters())) + len(list(distiller.parameters()))
    assert set(clipped) == {(count, 0.5)}


def test_a_cache_serves_the_teachers_features_and_changes_nothing(accelerator, tmp_path):
    ends, runs = [], []
    for cache in (None, FeatureCache(tmp_path / "features", dtype=torch.float32)):
        set_seed(0)
        student, teacher = net(8, 2), net(16, 5)
        teacher.register_forward_pre_hook(
            lambda _, args, cached=bool(cache): runs.append((cached, len(args[0])))
        )
        pairs, example = [Pair("2:input", "2")], torch.zeros(1, 6)
        distiller = Distiller(student, teacher, pairs, example=example, cache=cache)
        optimizer = torch.optim.SGD([*student.parameters(), *distiller.parameters()], lr=0.1)
        samples = loader(32).dataset
        if cache:
            samples = StackDataset(samples, range(32))
        train(
            accelerator,
            student,
            distiller,
            optimizer=optimizer,
            schedule=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3),
            train_loader=DataLoader(samples, batch_size=8, shuffle=True),
            validation_loader=loader(13),
            epochs=3,
            output=tmp_path / str(bool(cache)),
        )
        ends.append(list(student.parameters()))
    torch.testing.assert_close(ends[0], ends[1])
    assert runs.count((False, 8)) == 3 * 4
    assert runs.count((True, 8)) == 4


def test_heads_outside_the_optimizer_are_refused(accelerator, tmp_path):
    with pytest.raises(ValueError, match=r"distiller\.add_to\(optimizer\)"):
        run(accelerator, tmp_path, heads=False)


def test_a_sampler_that_cannot_resume_is_refused(tmp_path):
    with pytest.raises(ValueError, match="use_seedable_sampler=True"):
        run(Accelerator(cpu=True), tmp_path)


def test_a_missing_extra_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    monkeypatch.delitem(sys.modules, "vid_loss.integrations.accelerate")
    with pytest.raises(ImportError, match=re.escape('pip install "vid-loss[accelerate]"')):
        importlib.import_module("vid_loss.integrations.accelerate")


def test_mixed_precision_trains_heads_in_float32(tmp_path):
    bf16 = make_accelerator(mixed_precision="bf16")
    progress, _, distiller = run(bf16, tmp_path)
    assert progress.history[1]["2:input->2"] < progress.history[0]["2:input->2"]
    assert {p.dtype for p in distiller.parameters()} == {torch.float32}


# Dynamo looks at the .grad of the features, which are no leaves, and hides that where it can.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_a_compiled_run_exports_the_plain_student(tmp_path):
    plain, student, _ = run(make_accelerator(), tmp_path / "plain")
    AcceleratorState._reset_state(reset_partial_state=True)
    progress, compiled, _ = run(make_accelerator(dynamo_backend="aot_eager"), tmp_path / "compiled")
    exported = load_file(tmp_path / "compiled" / "last.safetensors")
    torch.testing.assert_close(exported, dict(compiled.state_dict()), rtol=0, atol=0)
    torch.testing.assert_close(exported, dict(student.state_dict()))
    torch.testing.assert_close(progress.history, plain.history)


def test_losses_reach_a_tracker(tmp_path):
    pytest.importorskip("tensorboard")
    accelerator = make_accelerator(log_with="tensorboard", project_dir=tmp_path)
    accelerator.init_trackers("run")
    run(accelerator, tmp_path)
    accelerator.end_training()
    (events,) = (tmp_path / "run").glob("events*")
    assert b"2:input->2" in events.read_bytes()


def test_accumulated_batches_equal_one_batch(tmp_path):
    # With the paper's loss, which is the same function of any batch: it keeps no running means.
    loss = partial(VIDLoss, variance="trained", standardize=False, init_var=5.0)
    ends = []
    for batch_size, steps in ((16, 1), (8, 2)):
        accelerator = make_accelerator(gradient_accumulation_steps=steps)
        data = DataLoader(loader(32).dataset, batch_size, shuffle=True)
        _, student, distiller = run(
            accelerator, tmp_path / str(steps), train_loader=data, loss=loss
        )
        ends.append({**student.state_dict(), **distiller.state_dict()})
    torch.testing.assert_close(ends[1], ends[0])


def test_evaluation_counts_labeled_samples_only(accelerator):
    model = nn.Linear(6, 2)
    data = accelerator.prepare(loader(21, unlabeled=5))
    accuracy = evaluate(accelerator, model, data)
    inputs, labels = data.dataset.tensors
    expected = int((model(inputs).argmax(1) == labels)[5:].sum())
    assert (accuracy.correct, accuracy.total) == (expected, 16)

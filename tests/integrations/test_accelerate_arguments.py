"""What the loop is called with, be it bad: nothing is trained or written then."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from vid_loss import Distiller, Pair

pytest.importorskip("accelerate", reason="needs the accelerate extra")
pytest.importorskip("safetensors", reason="needs the accelerate extra")

from _accelerate import loader, make_accelerator, net, run
from accelerate.utils import set_seed
from vid_loss.integrations.accelerate import train
from vid_loss.integrations.accelerate._checks import check_loaders

pytestmark = pytest.mark.usefixtures("fresh_state")


class Stream(IterableDataset):
    """Nobody knows how long."""

    def __iter__(self):
        yield from loader(16).dataset


def test_a_folder_may_be_named_by_a_string(accelerator, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(accelerator, "runs/1", epochs=1)
    progress, _, _ = run(make_accelerator(), tmp_path / "runs" / "1", epochs=2)
    assert progress.epoch == 2
    assert (tmp_path / "runs" / "1" / "best.safetensors").is_file()


@pytest.mark.parametrize("output", [None, "", b"x", 3, ["runs"]])
def test_what_is_no_folder_is_named(accelerator, output, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TypeError, match="train, output: expected the name of a folder; got"):
        run(accelerator, output)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["train_loader", "validation_loader"])
@pytest.mark.parametrize("empty", [loader(7, drop_last=True), DataLoader([])])
def test_a_loader_without_batches_is_refused_before_anything_is_written(
    accelerator, tmp_path, name, empty
):
    with pytest.raises(ValueError, match=f"train, {name}: expected a batch or more; got none"):
        run(accelerator, tmp_path / "run", **{name: empty})
    assert not list(tmp_path.iterdir())


def test_batches_that_are_too_few_for_all_processes_are_refused():
    with pytest.raises(ValueError, match=r"train_loader: .* for each of 2 processes; got none"):
        check_loaders(loader(7, drop_last=True), loader(8), 2)


def test_loaders_are_looked_at_when_they_are_shared_out(accelerator, tmp_path, monkeypatch):
    prepare = accelerator.prepare

    def shared_out(*objects):
        model, optimizer, _, validation = prepare(*objects)
        return model, optimizer, loader(7, drop_last=True), validation

    monkeypatch.setattr(accelerator, "prepare", shared_out)
    with pytest.raises(ValueError, match="train_loader: expected a batch or more; got none"):
        run(accelerator, tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    assert not (tmp_path / "checkpoints").exists()


def test_a_stream_is_validated_on_and_not_trained_on(accelerator, tmp_path):
    stream = DataLoader(Stream(), batch_size=8)
    with pytest.raises(TypeError, match=r"train_loader: .*of Stream, which has no length"):
        run(accelerator, tmp_path, train_loader=stream)
    progress, _, _ = run(accelerator, tmp_path, validation_loader=stream, epochs=1)
    assert progress.best_percent > 0


BAD = [
    *(("optimizer", x, TypeError) for x in (None, "sgd", torch.optim.SGD, [1])),
    *(
        ("schedule", x, TypeError)
        for x in (None, "cosine", torch.optim.lr_scheduler.CosineAnnealingLR)
    ),
    *(("train_loader", x, TypeError) for x in (None, [1], loader(8).dataset, DataLoader)),
    *(("validation_loader", x, TypeError) for x in (None, "", (), {"a": 1})),
    *(("epochs", x, ValueError) for x in (None, "3", 1.5, -1, math.nan)),
    *(("task_loss", x, TypeError) for x in (None, "ce", nn.CrossEntropyLoss, torch.ones(2))),
    *(("max_grad_norm", x, ValueError) for x in ("1", -1.0, 0, math.nan, torch.ones(2))),
]


@pytest.mark.parametrize(("name", "value", "error"), BAD)
def test_what_cannot_be_meant_is_named(accelerator, tmp_path, name, value, error):
    with pytest.raises(error, match=f"train, {name}: expected "):
        run(accelerator, tmp_path / "run", **{name: value})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("models", "name"),
    [((None, None), "student"), ((nn.Linear, None), "student"), ((net(8, 2), "d"), "distiller")],
)
def test_models_that_are_none_are_named(accelerator, tmp_path, models, name):
    optimizer = torch.optim.SGD(net(8, 2).parameters(), lr=0.1)
    with pytest.raises(TypeError, match=f"train, {name}: expected a"):
        train(
            accelerator,
            *models,
            optimizer=optimizer,
            schedule=torch.optim.lr_scheduler.ConstantLR(optimizer),
            train_loader=loader(8),
            validation_loader=loader(8),
            epochs=1,
            output=tmp_path / "run",
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["task", "validation", "other"])
def test_a_pair_has_its_place_in_the_history(accelerator, tmp_path, name):
    set_seed(0)
    student, pair = net(8, 2), Pair("2:input", "2", name=name)
    distiller = Distiller(student, net(16, 5), [pair], example=torch.zeros(1, 6))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    distiller.add_to(optimizer)
    settings = {
        "optimizer": optimizer,
        "schedule": torch.optim.lr_scheduler.ConstantLR(optimizer),
        "train_loader": loader(8),
        "validation_loader": loader(8),
        "epochs": 1,
        "output": tmp_path,
    }
    if name == "other":
        assert name in train(accelerator, student, distiller, **settings).history[0]
        return
    with pytest.raises(ValueError, match=f"train, distiller: expected no pair named '{name}'"):
        train(accelerator, student, distiller, **settings)

"""Some positions of maps: the teacher's, of which the rest is dropped before the student runs."""

from functools import partial
from unittest import mock

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from _asserts import assert_same_state, state_of
from _hf import distil, logged
from _hf_vision import images, resnet
from torch import nn
from vid_loss.integrations.hf import VIDTrainer

from vid_loss import Pair, VIDLoss

LAYERS = "resnet.encoder.stages.0", "resnet.encoder.stages.1"
PAIRS = [Pair(x, x, loss=partial(VIDLoss, positions=0.25)) for x in LAYERS]
NAMES = [pair.label for pair in PAIRS]


class Twice(VIDTrainer):
    """Calls the model twice on each batch, as R-Drop does."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        first = super().compute_loss(model, inputs, *args, **kwargs)
        return (first + super().compute_loss(model, inputs, *args, **kwargs)) / 2


class AndStem(VIDTrainer):
    """Calls the model once more, which ends before any layer of a pair."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        with mock.patch.object(model, "forward", lambda pixel_values, **_: pixel_values.sum()):
            return loss + 0 * model(**inputs)


def trainer_of(folder, cls=VIDTrainer, **options):
    student, teacher = resnet(4, 0), resnet(8, 1)
    stem = student.resnet.embedder
    stem.pooler = nn.Sequential(stem.pooler, nn.Dropout(0.5))
    return distil(folder, student, teacher, PAIRS, images(rows=16), cls, **options)


def train(folder, cls=VIDTrainer, **options):
    trainer = trainer_of(folder, cls, **options)
    trainer.train()
    return trainer


@pytest.mark.parametrize("cls", [VIDTrainer, Twice, AndStem])
def test_the_log_has_the_terms_of_every_step(tmp_path, cls):
    trainer = train(tmp_path, cls)
    task, transfer = logged(trainer, "task_loss"), logged(trainer, "transfer_loss")
    torch.testing.assert_close(
        [a + b for a, b in zip(task, transfer, strict=True)],
        logged(trainer, "loss"),
        rtol=1e-3,
        atol=1e-3,
    )
    assert min(transfer) > 0
    for name in NAMES:
        assert len(logged(trainer, f"transfer/{name}")) == 4


def test_resume_is_exact(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    whole = train(tmp_path, **options)
    resumed = trainer_of(tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert logged(resumed, "loss") == logged(whole, "loss")
    assert_same_state(resumed.model, state_of(whole.model))

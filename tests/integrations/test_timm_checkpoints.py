"""Checkpoints and EMA of a task: the heads are beside the student."""

import copy

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("timm")
pytest.importorskip("timm.task", reason="needs timm >= 1.0.27")

from _timm import _batch, _heads, _model, _stepped, _task
from timm.optim import create_optimizer_v2  # after the skip
from timm.task import (  # after the skip
    load_task_ema_checkpoint,
    resume_task_checkpoint,
)
from timm.utils import CheckpointSaver  # after the skip


def test_checkpoint_keeps_heads_beside_the_student_and_round_trips(tmp_path):
    task = _task()
    task.setup_ema(decay=0.5)
    optimizer = _stepped(task, momentum=0.9)
    path = tmp_path / "checkpoint.pth.tar"
    saver = CheckpointSaver(
        task.get_trainable_module(), optimizer, checkpoint_dir=tmp_path, task=task
    )
    saver._save(path, epoch=1)

    checkpoint = torch.load(path, weights_only=True)
    plain = list(_model().state_dict())
    assert list(checkpoint["state_dict"]) == list(checkpoint["state_dict_ema"]) == plain

    fresh = _task(seed=5)
    fresh_optimizer = create_optimizer_v2(fresh.get_trainable_module(), "sgd", lr=0.1, momentum=0.9)
    assert resume_task_checkpoint(fresh, path, fresh_optimizer, log_info=False) == 2
    fresh.setup_ema(decay=0.5)
    load_task_ema_checkpoint(fresh, path)
    for ema in (False, True):
        assert_close(_heads(fresh, ema), _heads(task, ema), rtol=0, atol=0)
        assert_close(
            fresh.get_eval_model(ema=ema).state_dict(),
            task.get_eval_model(ema=ema).state_dict(),
            rtol=0,
            atol=0,
        )
    assert_close(fresh_optimizer.state_dict(), optimizer.state_dict(), rtol=0, atol=0)


def test_checkpoint_loads_into_a_plain_model(tmp_path):
    task = _task()
    optimizer = _stepped(task)
    saver = CheckpointSaver(
        task.get_trainable_module(), optimizer, checkpoint_dir=tmp_path, task=task
    )
    saver._save(tmp_path / "checkpoint.pth.tar", epoch=0)
    plain = _model(seed=7, checkpoint_path=str(tmp_path / "checkpoint.pth.tar"))
    assert_close(plain.state_dict(), task.get_eval_model().state_dict(), rtol=0, atol=0)


def test_checkpoint_of_other_pairs_names_both():
    state = _task(pairs={"layer2": "layer2"}).get_task_state()
    with pytest.raises(RuntimeError, match=r"'layer3->layer3'.*got one of \['layer2->layer2'\]"):
        _task().load_task_state(state)


def test_checkpoint_without_heads_leaves_them_and_warns(caplog):
    task = _task()
    before = copy.deepcopy(_heads(task))
    task.load_checkpoint_state(_model(seed=5).state_dict())
    assert_close(_heads(task), before, rtol=0, atol=0)
    assert "no heads" in caplog.text


def test_ema_state_needs_an_ema():
    task = _task()
    assert task.get_task_state(ema=True) == {}
    with pytest.raises(RuntimeError, match="setup_ema"):
        task.load_task_state(task.get_task_state(), ema=True)


def test_ema_averages_student_and_heads():
    task = _task()
    task.setup_ema(decay=0.5)
    before = copy.deepcopy(_heads(task))
    _stepped(task)
    for key, value in _heads(task).items():
        if value.is_floating_point():
            assert_close(_heads(task, ema=True)[key], (before[key] + value) / 2)


def test_ema_taps_its_own_student_and_shares_the_teacher():
    task = _task()
    task.setup_ema()
    averaged = task.get_trainable_module(ema=True).module
    task.get_trainable_module().student(_batch()[0])
    with pytest.raises(RuntimeError, match="has not run forward"):
        averaged.distiller(_batch()[0])
    expected = task(*_batch())["vid_loss"]
    _, transfer = averaged.train()(_batch()[0])
    assert_close(transfer, expected)
    assert not any(key.startswith("teacher") for key in averaged.state_dict())


def test_ema_elsewhere_leaves_the_teacher_in_place():
    task = _task()
    task.setup_ema()
    averaged = task.get_trainable_module(ema=True).module.to("meta")
    assert all(p.is_meta for p in averaged.parameters())
    assert not any(p.is_meta for p in task.teacher.parameters())
    task(*_batch())

"""Arguments of VIDTrainer that cannot be meant: each is named at construction."""

import math

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from _asserts import assert_same_state, hook_count, state_of
from _hf import logged
from _hf_net import Net, distil, rows

from vid_loss.teachers import Teachers

NO_MODULES = [None, "bert-base", b"x", 3, math.nan, True, object(), [Net(7)], {"a": 1}, Net, len]
NO_NUMBERS = [-1.0, math.nan, math.inf, "5e-3", [1], torch.ones(2), nn.Linear]


def distil_with(folder, **arguments):
    """A trainer whose arguments may be anything, also None and 0."""
    from _hf_net import PAIR, default_collate
    from _hf_net import arguments as training_arguments
    from vid_loss.integrations.hf import VIDTrainer

    given = {"teacher": Net(7), "pairs": PAIR, **arguments}
    args = training_arguments(folder, optim="sgd", max_steps=2)
    return VIDTrainer(
        model=Net(5), args=args, train_dataset=rows(), data_collator=default_collate, **given
    )


@pytest.mark.parametrize("teacher", NO_MODULES)
def test_a_teacher_that_is_no_module_is_named(tmp_path, teacher):
    with pytest.raises(
        TypeError, match=r"^VIDTrainer, teacher: expected an nn.Module; got"
    ) as said:
        distil_with(tmp_path, teacher=teacher)
    if teacher is Net:
        assert "got the class Net. Build it: Net(...)." in str(said.value)


def test_several_teachers_are_one_module(tmp_path):
    teachers = Teachers({"a": Net(7), "b": Net(6)})
    trainer = distil_with(tmp_path, teacher=teachers, pairs={"body": "b.body"})
    trainer.train()
    assert len(logged(trainer, "transfer_loss")) == 2


@pytest.mark.parametrize("example", ["x", 3, [1], torch.ones(2, 4), (torch.ones(2, 4),), Net])
def test_an_example_that_is_no_batch_is_named(tmp_path, example):
    with pytest.raises(TypeError, match=r"^VIDTrainer, example: expected a collated batch"):
        distil_with(tmp_path, example=example)


@pytest.mark.parametrize("inputs", ["", "x", 0, (), {"a": 1}, torch.ones(2)])
def test_teacher_inputs_that_cannot_be_called_are_named(tmp_path, inputs):
    with pytest.raises(TypeError, match=r"^VIDTrainer, teacher_inputs: expected a function"):
        distil_with(tmp_path, teacher_inputs=inputs)


@pytest.mark.parametrize("rate", NO_NUMBERS)
def test_a_rate_that_is_none_is_refused(tmp_path, rate):
    with pytest.raises(ValueError, match=r"^VIDTrainer, head_learning_rate: expected a number, 0"):
        distil_with(tmp_path, head_learning_rate=rate)


def test_a_rate_beside_an_optimizer_of_ones_own_is_refused(tmp_path):
    student = Net(5)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    line = r"got 0.5.*add_to\(optimizer, lr=0.5\)"
    with pytest.raises(ValueError, match=line):
        distil(tmp_path, student, optimizers=(optimizer, None), head_learning_rate=0.5)
    later = distil(tmp_path, student, head_learning_rate=0.5)
    later.optimizer = optimizer
    before = state_of(student)
    with pytest.raises(ValueError, match=line):
        later.train()
    assert_same_state(student, before)


def test_a_rate_holds_for_training_twice_with_the_trainers_own_optimizer(tmp_path):
    trainer = distil(tmp_path, head_learning_rate=0.5)
    for _ in range(2):
        trainer.train()
    assert trainer.optimizer.param_groups[-1]["initial_lr"] == 0.5


@pytest.mark.parametrize("trained", [False, True])
def test_a_closed_trainer_does_not_train(tmp_path, trained):
    student = Net(5)
    hooks = hook_count(student)
    trainer = distil(tmp_path, student)
    if trained:
        trainer.train()
    trainer.close()
    before = state_of(student)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"after close\(\).*Build another VIDTrainer"):
            trainer.train()
    assert trainer.distiller is None
    assert hook_count(student) == hooks
    assert_same_state(student, before)
    assert trainer.evaluate()["eval_loss"] > 0

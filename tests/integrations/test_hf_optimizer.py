"""The heads in the Trainer's optimizer."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from _asserts import assert_same_state, state_of
from _hf import logged
from _hf_net import Net, distil
from vid_loss.integrations.hf import VIDTrainer

from vid_loss.optimizer import HEAD_LEARNING_RATE, SGD_HEAD_STEP


def rates(trainer):
    """The learning rates of the student's parameters and of the heads'."""
    heads = {id(p) for p in trainer.distiller.parameters()}
    found = {True: set(), False: set()}
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            found[id(parameter) in heads].add(group["lr"])
    return found[False], found[True]


@pytest.mark.parametrize(
    ("options", "of_heads"),
    [
        ({"optim": "adamw_torch", "learning_rate": 5e-5}, HEAD_LEARNING_RATE),
        ({"optim": "adamw_torch", "learning_rate": 0.1}, 0.1),
        ({"optim": "sgd", "learning_rate": 5e-5}, SGD_HEAD_STEP / 3),
        ({"optim": "rmsprop", "learning_rate": 5e-5}, HEAD_LEARNING_RATE),
        ({"optim": "adamw_torch", "learning_rate": 5e-5, "head_learning_rate": 1e-4}, 1e-4),
        ({"optim": "sgd", "learning_rate": 5e-5, "head_learning_rate": 0.0}, 0.0),
    ],
)
def test_heads_have_a_learning_rate_of_their_own(tmp_path, options, of_heads):
    trainer = distil(tmp_path, **options)
    trainer.create_optimizer()
    assert rates(trainer) == ({options["learning_rate"]}, {of_heads})


def test_every_parameter_is_in_one_group_and_the_student_s_come_first(tmp_path):
    trainer = distil(tmp_path, optim="adamw_torch", weight_decay=0.1)
    groups = trainer.create_optimizer().param_groups
    held = [p for group in groups for p in group["params"]]
    assert len(held) == len({id(p) for p in held}) == len(list(trainer.model.parameters()))
    heads = {id(p) for p in trainer.distiller.parameters()}
    of_heads = [id(p) in heads for p in held]
    assert of_heads == sorted(of_heads)
    for group in groups:
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.1 if parameter.ndim > 1 else 0.0)


def test_a_schedule_scales_both_rates_alike_and_the_student_s_is_logged(tmp_path):
    seen = []

    class Looks(VIDTrainer):
        def training_step(self, *args, **kwargs):
            seen.append(rates(self))
            return super().training_step(*args, **kwargs)

    options = {"optim": "adamw_torch", "learning_rate": 1e-3, "lr_scheduler_type": "linear"}
    trainer = distil(tmp_path, cls=Looks, max_steps=4, warmup_steps=1, **options)
    trainer.train()
    ratios = [max(heads) / max(student) for student, heads in seen if max(student)]
    assert len({max(student) for student, _ in seen}) == 4
    assert ratios == pytest.approx([HEAD_LEARNING_RATE / 1e-3] * len(ratios))
    assert max(logged(trainer, "learning_rate")) == pytest.approx(1e-3)


def test_a_user_s_optimizer_keeps_its_groups(tmp_path):
    student = Net(5)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    trainer = distil(tmp_path, student, optimizers=(optimizer, None))
    optimizer.add_param_group({"params": list(trainer.distiller.parameters()), "lr": 0.5})
    trainer.train()
    assert [group["initial_lr"] for group in optimizer.param_groups] == [1e-3, 0.5]


def test_resume_restores_the_rates_and_the_state(tmp_path):
    options = {"optim": "adamw_torch", "learning_rate": 1e-4, "weight_decay": 0.1}
    options.update(save_strategy="steps", save_steps=2, max_steps=4)
    whole, resumed = distil(tmp_path, **options), distil(tmp_path, Net(5), **options)
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert logged(resumed, "loss") == logged(whole, "loss")
    assert rates(resumed) == rates(whole)
    assert_same_state(resumed.model, state_of(whole.model))


def test_heads_move_at_the_trainer_s_default_rate(tmp_path):
    trainer = distil(tmp_path, optim="adamw_torch", learning_rate=5e-5, max_steps=8)
    before = state_of(trainer.distiller.losses)
    trainer.train()
    moved = {k: (x - before[k]).abs().max() for k, x in state_of(trainer.distiller.losses).items()}
    assert max(moved.values()) > 8 * 5e-5 * 2  # further than that rate could take them

import warnings

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("lightning")

from _lightning import (  # after the skip
    RATE,
    Task,
    assert_equal,
    callback,
    fit,
    loader,
    plain_loop,
    states,
)
from lightning.pytorch.callbacks import ModelCheckpoint  # after the skip

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),  # advice on workers and the like
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),  # torch's own, by its use
]
BFLOAT16 = torch.bfloat16


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize(
    ("options", "loop"),
    [
        ({}, {}),
        ({"precision": "bf16-mixed"}, {"autocast": BFLOAT16}),
        ({"precision": "bf16-true"}, {"dtype": BFLOAT16}),
        (
            {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
            {"accumulate": 2, "clip": 0.1},
        ),
    ],
    ids=lambda options: " ".join(map(str, options)),
)
def test_training_is_the_plain_loops_bit_for_bit(options, loop):
    task, one = Task(), callback()
    trainer = fit(task, one, **options)
    student, distiller, losses = plain_loop(list(loader()) * 2, **loop)
    assert_equal(states(task.model, one.distiller), states(student, distiller))
    logged = trainer.callback_metrics
    assert_close(
        float(logged["task_loss"] + logged["transfer_loss"]), losses[-1], rtol=1e-4, atol=0
    )


def test_module_and_teacher_are_left_as_they_were_and_the_heads_can_be_read():
    task, one = Task(), callback()
    names, attributes = list(task.state_dict()), set(vars(task))
    fit(task, one)
    assert list(task.state_dict()) == names
    assert not {"training_step", "configure_optimizers"} & (set(vars(task)) - attributes)
    assert hooks(task) == hooks(one.teacher) == 0
    assert one.distiller.diagnostics()["3->3"].explained_variance != 0


@pytest.mark.parametrize("where", ["training_step", "configure_optimizers"])
def test_nothing_is_left_behind_when_the_module_raises(where):
    class Broken(Task):
        """Fails at one place."""

    def fail(self, *_):
        raise KeyError("mine")

    setattr(Broken, where, fail)
    task, one = Broken(), callback()
    with pytest.raises(KeyError, match="mine"):
        fit(task, one)
    assert hooks(task) == hooks(one.teacher) == 0
    assert not {"training_step", "configure_optimizers"} & set(vars(task))
    assert torch.optim.Optimizer.__init__.__qualname__ == "Optimizer.__init__"
    assert not hasattr(torch.optim.Optimizer.__init__, "__wrapped__")


def test_heads_have_groups_and_a_rate_of_their_own_and_the_scheduler_knows_them():
    task = Task()
    task.configure_optimizers = lambda: torch.optim.AdamW(task.parameters(), lr=RATE)
    groups = fit(task, callback()).optimizers[0].param_groups
    assert [group["lr"] for group in groups] == [RATE, 5e-3]
    task = Task()
    with pytest.warns(UserWarning, match="one max_lr for every group, 1.0e-02"):  # OneCycleLR's
        trainer = fit(task, callback(head_learning_rate=0.1))
    (scheduler,) = (config.scheduler for config in trainer.lr_scheduler_configs)
    assert len(scheduler.get_last_lr()) == 2
    assert "initial_lr" in trainer.optimizers[0].param_groups[1]


def test_terms_and_diagnostics_are_logged():
    metrics = fit(Task(), callback(), log_every_n_steps=3).callback_metrics
    of_pair = {f"{x}/3->3" for x in ("transfer", "explained_variance", "nats_per_element")}
    assert {"train_loss", "task_loss", "transfer_loss"} | of_pair <= set(metrics)
    assert_close(metrics["train_loss"], metrics["task_loss"])
    seldom = fit(Task(), callback(), log_every_n_steps=100).callback_metrics
    assert "transfer/3->3" in seldom
    assert "explained_variance/3->3" not in seldom  # to ask for it waits for a GPU


def test_a_killed_run_resumes_bit_for_bit_and_its_checkpoint_is_the_plain_modules(tmp_path):
    whole, half, resumed = callback(), callback(), callback()
    task, first, second = Task(), Task(), Task(seed=7)
    fit(task, whole)
    path = tmp_path / "half.ckpt"
    fit(first, half, epochs=1).save_checkpoint(path)
    fit(second, resumed, ckpt_path=path)
    assert_equal(states(second.model, resumed.distiller), states(task.model, whole.distiller))

    checkpoint = torch.load(path, weights_only=False)
    assert list(checkpoint["state_dict"]) == list(Task().state_dict())
    assert list(checkpoint["callbacks"]["VIDCallback"]) == ["distiller"]
    plain = Task.load_from_checkpoint(path, seed=5, weights_only=False)
    assert_equal(plain.state_dict(), first.state_dict())
    size = sum(p.numel() for p in half.teacher.parameters())
    saved = sum(x.numel() for x in checkpoint["callbacks"]["VIDCallback"]["distiller"].values())
    assert saved < size  # no teacher


def test_a_checkpoint_without_heads_is_not_resumed(tmp_path):
    path = tmp_path / "plain.ckpt"
    fit(Task(), epochs=1).save_checkpoint(path)
    with pytest.raises(ValueError, match=r"got one without.*load_state_dict"):
        fit(Task(), callback(), ckpt_path=path)


def test_evaluation_is_the_task_alone():
    task, one = Task(), callback()
    trainer = fit(task, one)
    before = states(task.model, one.distiller)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (result,) = trainer.validate(task, loader(), verbose=False)
    assert list(result) == ["val_loss"]
    assert_equal(states(task.model, one.distiller), before)


def test_weights_are_averaged_and_the_best_are_kept_as_those_of_the_module_alone(tmp_path):
    averaging = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging")
    averages = averaging.EMAWeightAveraging(decay=0.9)
    best = ModelCheckpoint(tmp_path, monitor="task_loss")
    task = Task()
    trainer = fit(task, callback(), averages, best, enable_checkpointing=True)
    average = torch.load(best.best_model_path, weights_only=False)["state_dict"]
    assert list(average) == list(Task().state_dict())
    assert hooks(task) == 0
    trainer.fit_loop.max_epochs = 3
    trainer.fit(task, ckpt_path=best.best_model_path)  # the same callback, once more
    assert hooks(task) == 0
    assert trainer.global_step == 18

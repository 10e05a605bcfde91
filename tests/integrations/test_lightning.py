import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

pytest.importorskip("lightning")

from _lightning import (  # after the skip
    EXAMPLE,
    RATE,
    Task,
    callback,
    fit,
    loader,
    plain_loop,
    run,
    states,
)
from _scripts import PAIRS, models  # after the skip
from lightning.pytorch.callbacks import ModelCheckpoint  # after the skip
from vid_loss.integrations.lightning import VIDCallback  # after the skip

from vid_loss import Distiller  # after the skip

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),  # advice on workers and the like
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),  # torch's own, by its use
]
BFLOAT16 = torch.bfloat16


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


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


class Variant(Task):
    """Returns what it likes."""

    kind = "mapping"

    def training_step(self, batch, index):
        images, labels = batch
        if self.kind == "skips" and index == 1:
            return None
        with torch.no_grad():
            self.model(images)  # such as one for pseudo labels: not compared
        loss = F.cross_entropy(self.model(images), labels)
        if self.kind == "twice":
            loss = (loss + F.cross_entropy(self.model(images + 1), labels)) / 2
        return {"loss": loss, "mine": 5} if self.kind == "mapping" else loss


@pytest.mark.parametrize("kind", ["mapping", "skips", "twice"])
def test_a_step_may_return_a_mapping_or_nothing_and_run_the_student_more_than_once(kind):
    task, one, seen = Variant(), callback(), []
    task.kind = kind
    task.on_train_batch_end = lambda outputs, *_: seen.append(outputs)
    fit(task, one, epochs=1)
    student, teacher = models()
    torch.manual_seed(11)
    distiller = Distiller(student, teacher, PAIRS, example=EXAMPLE)
    (images, labels), *_ = list(loader())
    with torch.no_grad():
        student(images)
    expected = F.cross_entropy(student(images), labels)
    transfer = distiller(images)
    if kind == "twice":
        expected = (expected + F.cross_entropy(student(images + 1), labels)) / 2
        transfer = (transfer + distiller(images + 1)) / 2
    assert_close(seen[0]["loss"], (expected + transfer).detach())
    assert len(seen) == 6
    assert ("mine" in seen[0]) == (kind == "mapping")


def test_pairs_are_matched_and_the_example_is_the_modules_if_there_are_none():
    task = Task()
    task.example_input_array = EXAMPLE
    one = VIDCallback(models()[1])
    fit(task, one, epochs=1)
    assert list(one.distiller.pairs)


def test_a_compiled_student_trains_to_the_same():
    task, one, eager = Task(), callback(), callback()
    task.model.compile(backend="eager")
    fit(task, one, epochs=1)
    plain = Task()
    fit(plain, eager, epochs=1)
    assert_close(states(task.model, one.distiller), states(plain.model, eager.distiller))


class Late(Task):
    """Builds its student when Lightning asks for it."""

    def __init__(self):
        super().__init__()
        del self.model

    def configure_model(self):
        if not hasattr(self, "model"):
            self.model, _ = models()
            self.setup("fit")  # seeds the heads again


def test_a_student_that_is_built_late_trains_to_the_same():
    task, one, other = Late(), callback(), callback()
    fit(task, one, epochs=1)
    plain = Task()
    fit(plain, other, epochs=1)
    assert_equal(states(task.model, one.distiller), states(plain.model, other.distiller))


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


class Manual(Task):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class Early(Task):
    def __init__(self):
        super().__init__()
        self.optimizer = torch.optim.SGD(self.parameters(), lr=0.1)

    def configure_optimizers(self):
        return self.optimizer


class Beside(Task):
    """Calls a part of the student only."""

    def forward(self, images):
        for layer in self.model:
            images = layer(images)
        return images


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (Manual, {}, "expected automatic optimization.*got Manual"),
        (Early, {}, "expected configure_optimizers to build an optimizer"),
        (Beside, {}, r"expected training_step to run self.model\(...\)"),
        (Task, {"student": "net"}, r"that is a module; got 'net'. There are \['model'\]"),
        (Task, {"example": None}, "expected a batch of the student's inputs"),
    ],
)
def test_what_cannot_be_distilled_is_named(module, options, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        fit(module(), callback(**options))


def test_a_student_that_stays_in_eval_mode_is_named():
    task = Task()
    task.model.eval()  # as from_pretrained() leaves one, and Lightning as it is
    with pytest.raises(RuntimeError, match="in train mode; it did not"):
        fit(task, callback())


# ---- Two processes ----


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run(tmp_path_factory.mktemp("lightning"))


def trained(state):
    """All but batch norm's statistics, which are each process's own."""
    ends = ("running_mean", "running_var", "num_batches_tracked")
    return {name: value for name, value in state.items() if not name.endswith(ends)}


@pytest.mark.parametrize("label", ["spawned", "whole", "half", "resumed", "accumulated", "sharded"])
def test_ranks_are_equal_to_the_last_bit(ranks, label):
    zero, one = (trained(results[label]["states"]) for results in ranks)
    assert any(name.endswith("running_var.var") or label == "sharded" for name in zero)
    assert_equal(zero, one)


def test_ddp_spawn_trains_as_ddp_does(ranks):
    assert_equal(ranks[0]["spawned"]["states"], ranks[0]["half"]["states"])


@pytest.mark.parametrize(
    ("label", "other"),
    [("whole", "plain"), ("whole", "resumed"), ("accumulated", "plain, accumulated")],
)
def test_ddp_is_the_plain_ddp_loop_and_resumes_bit_for_bit(ranks, label, other):
    assert_equal(ranks[0][label]["states"], ranks[0][other]["states"])


def test_fsdp2_is_refused_by_the_callback_and_trains_a_distillation_model(ranks):
    assert "DistillationModel in the module's configure_model" in ranks[0]["refused"]["message"]
    sharded = ranks[0]["sharded"]["states"]
    start = models()[0].state_dict()
    assert not torch.equal(sharded["student.0.weight"], start["0.weight"])
    assert any(name.startswith("distiller.losses") for name in sharded)

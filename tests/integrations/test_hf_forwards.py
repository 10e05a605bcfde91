"""What a user's teacher and compute_loss may do with the batch and the model in a step."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import torch.nn.functional as F
from _asserts import assert_same_state, state_of
from _hf import logged, without_estimates
from _hf_net import OUTPUTS, PAIR, Net, distil, plain, rows
from transformers import Trainer
from vid_loss.integrations.hf import VIDTrainer, VIDTrainerMixin

from vid_loss import Pair

# ---- A teacher, or its inputs, that change the batch in place ----


class Nested(Net):
    """A model of a batch whose tensors are in a dict and a list."""

    def forward(self, views, labels=None):
        return super().forward(views["all"][0], labels)


def writes(x):
    return x.mul_(10)


def replaces(views):
    views["all"][0] = views["all"][0] * 10
    return (views,)


def from_call(count, change):
    """Teacher inputs that are well behaved before that call."""
    calls = []

    def teacher_inputs(x):
        calls.append(None)
        return (change(x) if len(calls) >= count else x,)

    return teacher_inputs


class Writing(Net):
    """A teacher that rescales its input in place, in every forward after the first."""

    def forward(self, x, labels=None):
        return super().forward(writes(x) if self.seen else x, labels)


NESTED = [{"views": {"all": [row["x"]]}, "labels": row["labels"]} for row in rows()]
IN_PLACE = {
    "the teacher": lambda: (Net(5), Writing(7), None, rows()),
    "its inputs, the second time": lambda: (Net(5), Net(7), from_call(2, writes), rows()),
    "its inputs, the third time": lambda: (Net(5), Net(7), from_call(3, writes), rows()),
    "a tensor in a list in a dict": lambda: (
        Nested(5),
        Nested(7),
        lambda views: ({"all": [writes(views["all"][0])]},),
        NESTED,
    ),
    "a list in a dict": lambda: (Nested(5), Nested(7), replaces, NESTED),
}


@pytest.mark.parametrize("case", IN_PLACE)
def test_a_batch_that_is_changed_in_place_is_an_error_before_the_student_sees_it(tmp_path, case):
    student, teacher, teacher_inputs, data = IN_PLACE[case]()
    with pytest.raises(RuntimeError, match="changed them in place"):
        distil(tmp_path, student, teacher=teacher, teacher_inputs=teacher_inputs, data=data).train()
    given = torch.stack([row["x"] for row in rows()])
    for x in torch.cat(student.seen[1:] or [given]):  # the first sized the heads, and came before
        assert (x == given).all(1).any()


# ---- What a user's code sees of the model ----


@pytest.mark.parametrize("kind", OUTPUTS)
def test_user_code_sees_the_output_that_the_plain_trainer_shows_it(tmp_path, kind):
    seen = []

    def loss_of(outputs, labels, num_items_in_batch=None):
        parts = vars(outputs) if kind == "object" else outputs
        seen.append((type(outputs), len(parts), list(parts) if isinstance(parts, dict) else None))
        logits = outputs[-1] if isinstance(outputs, tuple) else dict(parts)["logits"]
        return F.cross_entropy(logits, labels)

    for make in (plain, distil):
        make(tmp_path, Net(5, kind), compute_loss_func=loss_of).train()
    assert len(seen) == 4
    assert seen[0] == seen[1] == seen[2] == seen[3]


class Unpacks(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, logits = model(**inputs)
        return (loss, (loss, logits)) if return_outputs else loss


class Alone(Trainer):
    """Knows of no outputs."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(inputs["x"], labels=inputs["labels"])[0]


class Renames(Trainer):
    """Returns another output than the model's."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        return (outputs[0], {"scores": outputs[1]}) if return_outputs else outputs[0]


class LooksAgain(Trainer):
    """Returns the output of a forward without gradients, as a Trainer with metrics may."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = model(**inputs)[0]
        with torch.no_grad():
            outputs = model(2 * inputs["x"], inputs["labels"])
        return (loss, outputs) if return_outputs else loss


class Halves(Trainer):
    """Calls the model twice, on what is not in the batch."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        parts = zip(inputs["x"].chunk(2), inputs["labels"].chunk(2), strict=True)
        outputs = [model(x=x, labels=labels) for x, labels in parts]
        loss = torch.stack([loss for loss, _ in outputs]).mean()
        return (loss, outputs[0]) if return_outputs else loss


@pytest.fixture
def expected(tmp_path):
    """A run of the Trainer's own compute_loss."""
    trainer = distil(tmp_path, Net(5, "tuple"), pairs=without_estimates(PAIR))
    trainer.train()
    return trainer


@pytest.mark.parametrize("user", [Unpacks, Alone, Renames, LooksAgain, Halves])
def test_a_compute_loss_gets_the_transfer_terms_of_its_forwards(tmp_path, expected, user):
    ours = type("Ours", (VIDTrainerMixin, user), {})
    trainer = distil(tmp_path, Net(5, "tuple"), ours, pairs=without_estimates(PAIR))
    trainer.train()
    # Of two halves of a batch, the mean is the whole batch's.
    for key in ("loss", "task_loss", "transfer_loss", "transfer/body->body"):
        assert logged(trainer, key) == pytest.approx(logged(expected, key), rel=1e-5), key
    assert_close(trainer, expected)


def assert_close(trainer, expected):
    for name, value in expected.model.state_dict().items():
        torch.testing.assert_close(trainer.model.state_dict()[name], value)


def test_the_teacher_runs_on_what_each_forward_is_given(tmp_path):
    teacher = Net(7)
    trainer = distil(
        tmp_path, Net(5, "tuple"), type("Ours", (VIDTrainerMixin, Halves), {}), teacher=teacher
    )
    teacher.seen.clear()
    trainer.model.seen.clear()
    trainer.train()
    assert len(teacher.seen) == 4
    for mine, theirs in zip(trainer.model.seen, teacher.seen, strict=True):
        assert torch.equal(mine, theirs)


def test_a_compute_loss_that_was_set_on_the_trainer_is_the_task_s(tmp_path, expected):
    def mine(model, inputs, num_items_in_batch=None):
        return 2 * model(**inputs)[0]

    trainer = distil(tmp_path, Net(5, "tuple"), pairs=without_estimates(PAIR))
    trainer.compute_loss = mine
    trainer.train()
    assert logged(trainer, "transfer_loss")[0] == logged(expected, "transfer_loss")[0]
    assert logged(trainer, "task_loss")[0] == 2 * logged(expected, "task_loss")[0]
    assert trainer.compute_loss is mine


def test_a_compute_loss_that_was_wrapped_is_kept(tmp_path, expected):
    trainer = distil(tmp_path, Net(5, "tuple"), pairs=without_estimates(PAIR))
    theirs = trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: 1 * theirs(*args, **kwargs)
    trainer.train()
    assert logged(trainer, "loss") == logged(expected, "loss")


def test_after_training_compute_loss_is_the_trainer_s_own(tmp_path, expected):
    assert "compute_loss" not in vars(expected)


def test_a_compute_loss_that_runs_another_model_is_told_so(tmp_path):
    class Aside(VIDTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return Net(5)(**inputs)["loss"]

    with pytest.raises(RuntimeError, match="expected it to call the model that it is given"):
        distil(tmp_path, cls=Aside).train()


def test_a_forward_that_raises_leaves_nothing_on_the_model(tmp_path):
    class Fails(VIDTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(x=inputs["x"], labels=inputs["labels"] + 99)["loss"]

    student = Net(5)
    trainer = distil(tmp_path, student, Fails)
    hooks = len(student._forward_hooks), len(student._forward_pre_hooks)
    with pytest.raises(IndexError):
        trainer.train()
    assert (len(student._forward_hooks), len(student._forward_pre_hooks)) == hooks
    assert student.train()(x=torch.ones(2, 4)).keys() == {"loss", "logits"}


def test_weight_zero_of_a_user_s_compute_loss_is_the_plain_trainer(tmp_path):
    expected = plain(tmp_path, Net(5, "tuple"), Unpacks)
    ours = type("Ours", (VIDTrainerMixin, Unpacks), {})
    trainer = distil(tmp_path, Net(5, "tuple"), ours, pairs=[Pair("body", "body", weight=0.0)])
    for one in (expected, trainer):
        one.train()
    trainer.close()
    assert_same_state(trainer.model, state_of(expected.model))

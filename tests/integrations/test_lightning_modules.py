"""Modules of many kinds: what can be distilled trains as by itself, what cannot is named."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

pytest.importorskip("lightning")

from _lightning import (  # after the skip
    EXAMPLE,
    Task,
    assert_equal,
    callback,
    fit,
    loader,
    samples,
    states,
)
from _scripts import PAIRS, models  # after the skip
from torch import nn  # after the skip
from torch.utils.data import DataLoader  # after the skip
from vid_loss.integrations.lightning import VIDCallback  # after the skip

from vid_loss import Distiller  # after the skip
from vid_loss.cache import FeatureCache  # after the skip

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),  # advice on workers and the like
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),  # torch's own, by its use
]


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
    compiled, expected = states(task.model, one.distiller), states(plain.model, eager.distiller)
    for name in ("0.bias", "1.running_mean"):
        # Batch norm takes the bias away: its gradient is rounding, which Adam makes a step of.
        del compiled[name], expected[name]
    assert_close(compiled, expected)


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


@pytest.mark.parametrize("same", [True, False])
def test_heads_go_on_where_the_module_does_in_another_fit(same):
    task, one, begun = Task(), callback(), []
    fit(task, one, epochs=1)
    ended = states(task.model, one.distiller)
    task = task if same else Task(seed=7)
    task.on_train_start = lambda: begun.append(states(task.model, one.distiller))
    fit(task, one, epochs=1)
    heads = [name for name in ended if name.startswith("heads.")]
    assert heads
    assert all(torch.equal(begun[0][name], ended[name]) for name in heads) == same
    assert not any(
        torch.equal(states(task.model, one.distiller)[name], begun[0][name])
        for name in heads
        if name.endswith("weight")
    )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        *(
            ({"teacher": x}, TypeError, "teacher: expected an nn.Module; got")
            for x in (None, "resnet18", 3, [nn.Linear(1, 1)], {"a": 1}, Task, torch.ones(2))
        ),
        *(
            ({"head_learning_rate": x}, ValueError, "head_learning_rate: expected a number, 0 or")
            for x in (-1.0, float("nan"), float("inf"), "0.1", [1], torch.ones(2))
        ),
        *(({"student": x}, TypeError, "student: expected an attribute") for x in (None, 3, [1])),
        *(({"teacher_inputs": x}, TypeError, "teacher_inputs: expected a fun") for x in ("x", 0)),
    ],
)
def test_what_cannot_be_meant_is_said_at_construction(options, error, message):
    with pytest.raises(error, match=f"^VIDCallback, {message}"):
        VIDCallback(**{"teacher": nn.Linear(1, 1), "pairs": PAIRS, **options})


def test_a_student_that_stays_in_eval_mode_is_named():
    task = Task()
    task.model.eval()  # as from_pretrained() leaves one, and Lightning as it is
    with pytest.raises(RuntimeError, match="in train mode; it did not"):
        fit(task, callback())


class WithPlaces(Task):
    """Its batches are dicts, which name the samples."""

    def train_dataloader(self):
        rows = enumerate(samples())
        rows = [{"images": x, "labels": y, "sample_index": i} for i, (x, y) in rows]
        return DataLoader(rows, batch_size=4)

    def training_step(self, batch, _):
        return F.cross_entropy(self(batch["images"]), batch["labels"])


class OfWholeBatches(nn.Sequential):
    """Takes what it has no use for, as the models of transformers do."""

    def forward(self, images, **_):
        return super().forward(images)


class WithWholeBatches(WithPlaces):
    """Gives its student the places as well."""

    def __init__(self):
        super().__init__()
        self.model = OfWholeBatches(*self.model)

    def training_step(self, batch, _):
        return F.cross_entropy(self.model(**batch), batch["labels"])


@pytest.mark.parametrize("module", [WithPlaces, WithWholeBatches])
def test_a_cache_changes_no_bit_and_runs_the_teacher_once_per_sample(tmp_path, module):
    pytest.importorskip("safetensors")
    tasks, ran = [module(), module()], []
    caches = None, FeatureCache(tmp_path, dtype=torch.float32)
    for task, cache in zip(tasks, caches, strict=True):
        one = callback(cache=cache, teacher_inputs=lambda images, **_: images)
        ran.clear()
        one.teacher.register_forward_hook(lambda _, args, output: ran.append(len(args[0])))
        fit(task, one)
    assert_equal(*(task.state_dict() for task in tasks))
    assert sum(x for x in ran if x == 4) == len(samples())
    with pytest.raises(ValueError, match=r"a dict with 'sample_index'.*as the batch.*; got list"):
        fit(Task(), callback(cache=caches[1]))

import types

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from _asserts import assert_same_state, hook_count, state_of
from _hf import (
    LAYERS,
    PAIR,
    Wordy,
    arguments,
    bert,
    bert_teacher,
    distil,
    logged,
    texts,
    weighted,
    without_estimates,
)
from _hf_ranks import pretend_fsdp
from accelerate import Accelerator
from transformers import Trainer
from vid_loss.integrations.hf import VIDTrainer


@pytest.mark.parametrize("clip", [1e-3, 1.0])
def test_weight_zero_is_the_plain_trainer_to_the_last_bit(tmp_path, clip):
    plain_student, student = bert(), bert()
    options = {"max_grad_norm": clip, "weight_decay": 0.1}
    plain = Trainer(
        model=plain_student,
        args=arguments(tmp_path, **options),
        train_dataset=texts(),
        eval_dataset=texts(),
    )
    plain.train()
    trainer = distil(tmp_path, student, pairs=weighted(0.0), **options)
    trainer.train()
    assert logged(plain, "loss") == logged(trainer, "loss")
    assert logged(plain, "grad_norm") == logged(trainer, "grad_norm")
    assert plain.evaluate()["eval_loss"] == trainer.evaluate()["eval_loss"]
    trainer.close()
    expected = plain_student.state_dict()
    assert list(expected) == list(student.state_dict())
    for name, value in student.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_evaluation_loss_is_the_task_loss_alone(tmp_path):
    student = bert()
    plain = Trainer(model=student, args=arguments(tmp_path), eval_dataset=texts())
    expected = plain.evaluate()["eval_loss"]
    assert distil(tmp_path, student).evaluate()["eval_loss"] == expected


def test_training_moves_student_and_heads_and_leaves_the_teacher(tmp_path):
    teacher = bert_teacher()
    before = state_of(teacher)
    trainer = distil(tmp_path, teacher=teacher)
    heads = state_of(trainer.distiller.losses)
    trainer.train()
    assert_same_state(teacher, before)
    assert all(p.grad is None for p in teacher.parameters())
    for name, value in trainer.distiller.losses.state_dict().items():
        assert not torch.equal(value, heads[name]), name


@pytest.mark.parametrize("stop", [False, True])
def test_teacher_can_stop_after_its_last_pair(tmp_path, stop):
    teacher, later = bert_teacher(), []
    teacher.bert.encoder.layer[2].register_forward_hook(lambda *_: later.append(stop))
    pairs = {"bert.encoder.layer.0": "bert.encoder.layer.1"}
    trainer = distil(tmp_path, teacher=teacher, pairs=pairs, stop_teacher=stop)
    later.clear()
    trainer.train()
    assert (later == []) == stop
    plain = distil(tmp_path, teacher=bert_teacher(), pairs=pairs)
    plain.train()
    assert logged(trainer, "loss") == logged(plain, "loss")
    # Whole again for anybody else.
    batch = {"input_ids": torch.ones(1, 4, dtype=torch.long), "output_hidden_states": True}
    torch.testing.assert_close(teacher.eval()(**batch), bert_teacher().eval()(**batch))


def test_teacher_can_run_in_lower_precision(tmp_path):
    teacher, seen = bert_teacher(), []
    teacher.classifier.register_forward_hook(lambda _, args, output: seen.append(output.dtype))
    distil(tmp_path, teacher=teacher, teacher_dtype=torch.bfloat16).train()
    assert set(seen) == {torch.bfloat16}


def test_close_leaves_the_student_as_it_was(tmp_path):
    student = bert()
    keys, hooks, ignored = list(student.state_dict()), hook_count(student), set()
    trainer = distil(tmp_path, student)
    trainer.train()
    trainer.close()
    assert trainer.distiller is None
    assert list(student.state_dict()) == keys
    assert hook_count(student) == hooks
    assert set(student._keys_to_ignore_on_save or ()) == ignored


def test_a_second_trainer_takes_the_student_over(tmp_path):
    student = bert()
    first = distil(tmp_path, student)
    hooks = hook_count(student)
    second = distil(tmp_path, student, max_steps=1)
    assert hook_count(student) == hooks
    assert student.vid_heads is second.distiller.losses is not first.distiller.losses
    second.train()


def test_vectors_of_the_heads_are_not_decayed(tmp_path):
    trainer = distil(tmp_path, weight_decay=0.1, pairs=without_estimates(PAIR))
    groups = trainer.create_optimizer().param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    names = [name for name, _ in trainer.distiller.losses.named_parameters()]
    assert any("raw_var" in name for name in names)
    for name, parameter in trainer.distiller.losses.named_parameters():
        assert decay[id(parameter)] == (0.1 if parameter.ndim > 1 else 0.0), name


def test_an_optimizer_without_the_heads_is_refused_with_the_line_to_add(tmp_path):
    student = bert()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    trainer = VIDTrainer(
        student,
        arguments(tmp_path),
        train_dataset=texts(),
        teacher=bert_teacher(),
        pairs=PAIR,
        optimizers=(optimizer, None),
    )
    before = state_of(student)
    with pytest.raises(RuntimeError, match=r"distiller\.add_to\(optimizer\)") as caught:
        trainer.train()
    assert_same_state(student, before)
    assert "trainer.distiller.add_to(" in str(caught.value)
    optimizer.add_param_group({"params": trainer.distiller.parameters()})
    trainer.train()


def test_a_user_s_create_optimizer_that_forgets_the_heads_is_refused(tmp_path):
    class Forgetful(VIDTrainer):
        def create_optimizer(self, model=None):
            self.optimizer = torch.optim.SGD(self.model.bert.parameters(), lr=0.1)
            return self.optimizer

    with pytest.raises(RuntimeError, match="expected the heads in the optimizer"):
        distil(tmp_path, cls=Forgetful).train()


def test_data_parallel_is_refused(tmp_path, monkeypatch):
    args = arguments(tmp_path)
    monkeypatch.setattr(type(args), "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match="torchrun or accelerate launch"):
        VIDTrainer(bert(), args, train_dataset=texts(), teacher=bert_teacher(), pairs=PAIR)


@pytest.mark.filterwarnings("ignore:.*FSDP:FutureWarning")
def test_fsdp_1_is_refused_when_the_trainer_is_made(tmp_path, monkeypatch, fresh_state):
    monkeypatch.setattr(Accelerator, "__init__", Accelerator.__init__)  # put back afterwards
    pretend_fsdp(version=1)
    with pytest.raises(ValueError, match=r"expected FSDP 2; got version 1.*Set fsdp_version: 2"):
        distil(tmp_path)


def test_a_teacher_on_the_meta_device_is_refused(tmp_path):
    with torch.device("meta"):
        teacher = bert_teacher()
    with pytest.raises(ValueError, match="teacher: expected weights in memory"):
        distil(tmp_path, teacher=teacher)


def test_a_pair_that_the_forward_never_reaches_is_refused(tmp_path):
    student = bert()
    student.spare = nn.Linear(16, 16)
    hooks = hook_count(student)
    with pytest.raises(RuntimeError, match="'spare' of the student was not reached"):
        distil(tmp_path, student, pairs={"spare": LAYERS[1]})
    assert hook_count(student) == hooks


def test_an_empty_train_set_is_refused(tmp_path):
    with pytest.raises(ValueError, match="train_dataset: expected a row"):
        VIDTrainer(
            bert(), arguments(tmp_path), train_dataset=[], teacher=bert_teacher(), pairs=PAIR
        )


def test_a_teacher_with_other_arguments_is_refused_with_the_remedy(tmp_path):
    with pytest.raises(ValueError, match=r"expected a batch with \['words'\].*teacher_inputs="):
        distil(tmp_path, teacher=Wordy(), pairs={"bert.encoder.layer.1": "embed"})


def test_a_misspelt_argument_is_refused(tmp_path):
    with pytest.raises(TypeError, match="paris"):
        VIDTrainer(bert(), arguments(tmp_path), teacher=bert_teacher(), paris=PAIR)


def test_the_missing_extra_is_named(monkeypatch):
    import importlib
    import sys

    monkeypatch.setitem(sys.modules, "transformers", types.ModuleType("transformers"))
    monkeypatch.delitem(sys.modules, "vid_loss.integrations.hf")
    with pytest.raises(ImportError, match=r'pip install "vid-loss\[hf\]"'):
        importlib.import_module("vid_loss.integrations.hf")

import copy
import os
import pickle

import pytest
import torch
import torch.distributed.checkpoint

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from _asserts import assert_same_state, state_of
from _hf import PAIR, arguments, bert, bert_teacher, distil, logged, texts, weighted
from safetensors.torch import load_file
from transformers import BertForSequenceClassification, Trainer
from transformers.utils import ModelOutput
from vid_loss.integrations.hf import export_student


def plain_again(folder):
    """What from_pretrained makes of a folder, and what it says of its keys."""
    model, info = BertForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model


def test_saved_model_is_the_plain_student_with_the_heads_beside_it(tmp_path):
    trainer = distil(tmp_path)
    trainer.train()
    trainer.save_model()
    heads = state_of(trainer.distiller.losses)
    assert list(load_file(tmp_path / "model.safetensors")) == sorted(bert().state_dict())
    saved = load_file(tmp_path / "vid_heads.safetensors")
    for name, value in heads.items():
        assert torch.equal(saved[name], value), name
    trainer.close()
    assert_same_state(plain_again(tmp_path), state_of(trainer.model))


def test_save_pretrained_of_the_student_leaves_the_heads_out(tmp_path):
    student = bert()
    distil(tmp_path, student)
    student.save_pretrained(tmp_path / "direct")
    plain_again(tmp_path / "direct")


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}])
def test_resume_is_exact_with_dropout_on(tmp_path, options):
    options = {"save_strategy": "steps", "save_steps": 2, "weight_decay": 0.1, **options}
    whole = distil(tmp_path, bert(), **options)
    whole.train()
    resumed = distil(tmp_path, bert(seed=9), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert logged(resumed, "loss") == logged(whole, "loss")
    assert_same_state(resumed.model, state_of(whole.model))


def cut(folder, step, *, state):
    """As a kill leaves a checkpoint: without the Trainer's state, or in the middle of it."""
    file = folder / f"checkpoint-{step}" / "trainer_state.json"
    whole = file.read_text()
    file.unlink()
    if state:
        file.write_text(whole[: len(whole) // 2])


@pytest.mark.parametrize("state", [False, True], ids=["no state", "half a state"])
def test_what_a_kill_has_cut_is_named_and_passed_over(tmp_path, state):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}
    whole = distil(tmp_path, bert(), **options)
    whole.train()
    (tmp_path / "checkpoint-20x").mkdir()  # somebody else's
    cut(tmp_path, 3, state=state)
    cut(tmp_path, 4, state=state)
    resumed = distil(tmp_path, bert(seed=9), **options)
    with pytest.warns(UserWarning, match=r"got checkpoint-4, checkpoint-3 in .* from checkpoint-2"):
        resumed.train(resume_from_checkpoint=True)
    assert_same_state(resumed.model, state_of(whole.model))


def test_where_no_checkpoint_is_whole_it_says_so(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    distil(tmp_path, **options).train()
    cut(tmp_path, 1, state=False)
    with pytest.raises(ValueError, match=r"expected a whole checkpoint .* got checkpoint-1, cut"):
        distil(tmp_path, **options).train(resume_from_checkpoint=True)


def test_resuming_warns_of_no_missing_key(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr("transformers.trainer.logger.warning", lambda *a: warnings.append(a))
    options = {"save_strategy": "steps", "save_steps": 2}
    distil(tmp_path, **options).train()
    distil(tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert not [text for text in warnings if "keys" in str(text)]


def test_best_model_comes_back_with_its_heads(tmp_path):
    options = {
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
    }
    trainer = distil(tmp_path, pairs=weighted(1.0), max_steps=3, **options)
    # What it is not trained for gets worse, so that the best model is not the last.
    trainer.train_dataset = [{**row, "labels": 0} for row in texts()]
    trainer.eval_dataset = [{**row, "labels": 1} for row in texts()]
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best.endswith("checkpoint-1")
    saved = load_file(f"{best}/vid_heads.safetensors")
    for name, value in trainer.distiller.losses.state_dict().items():
        assert torch.equal(saved[name], value), name
    trainer.close()
    assert_same_state(plain_again(best), state_of(trainer.model))


def test_a_checkpoint_without_heads_is_refused(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    Trainer(bert(), arguments(tmp_path, **options), train_dataset=texts()).train()
    with pytest.raises(FileNotFoundError, match=r"expected vid_heads\.safetensors"):
        distil(tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_student_that_is_not_of_transformers_is_saved_without_heads(tmp_path):
    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = bert()

        def forward(self, input_ids, attention_mask, labels=None):
            return self.inner(input_ids, attention_mask, labels=labels, return_dict=False)

    pairs = {"inner.bert.encoder.layer.1": PAIR["bert.encoder.layer.1"]}
    trainer = distil(tmp_path, Wrapped(), pairs=pairs)
    trainer.train()
    trainer.save_model()
    assert list(load_file(tmp_path / "model.safetensors")) == sorted(Wrapped().state_dict())


def test_pickle_and_copy_of_the_student_take_no_teacher_along(tmp_path):
    student = bert()
    trainer = distil(tmp_path, student)
    for twin in (copy.deepcopy(student), pickle.loads(pickle.dumps(student))):
        batch = {k: torch.stack([torch.as_tensor(r[k]) for r in texts(2)]) for k in texts()[0]}
        trainer._transfer.heads.prepared = {}, None
        assert isinstance(twin.train()(**batch), ModelOutput)


def test_push_to_hub_sends_a_folder_with_the_plain_student_in_it(tmp_path, monkeypatch):
    sent = []

    def upload_folder(*_, folder_path, **__):
        sent.append(folder_path)

    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload_folder)
    # transformers 4 holds a function of its own.
    monkeypatch.setattr("transformers.trainer.upload_folder", upload_folder, raising=False)
    trainer = distil(tmp_path, max_steps=1)
    trainer.hub_model_id = "someone/student"  # or it would ask the hub for a repository
    trainer.train()
    trainer.push_to_hub()
    assert sent == [str(tmp_path)]
    trainer.close()
    assert_same_state(plain_again(tmp_path), state_of(trainer.model))


def test_export_needs_a_sharded_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="SHARDED_STATE_DICT"):
        export_student(tmp_path, bert_teacher(), tmp_path / "out")


def sharded(folder):
    """A checkpoint as FSDP writes it, with the heads in it."""
    shards = folder / "pytorch_model_fsdp_0"
    student = bert(seed=3)
    state = {**student.state_dict(), "vid_heads.0.raw_var": torch.zeros(2)}
    torch.distributed.checkpoint.save({"model": state}, checkpoint_id=shards, no_dist=True)
    return shards / ".metadata", student


# torch says so for a single process.
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_a_sharded_checkpoint_is_exported(tmp_path):
    _, student = sharded(tmp_path)
    export_student(tmp_path, bert(), tmp_path / "out")
    assert_same_state(plain_again(tmp_path / "out"), state_of(student))


class Calls:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize(
    "author",
    [
        lambda path: pickle.dumps(Calls(os.mkdir, str(path))),
        lambda path: pickle.dumps(Calls(eval, f"__import__('os').mkdir({str(path)!r})")),
        # As the names of what an allowed module imports.
        lambda path: (
            b"ctorch.distributed.checkpoint.metadata\nos.mkdir\n(V" + str(path).encode() + b"\ntR."
        ),
        lambda path: b"\x80\x04\x8c\x05torch\x8c\x08os.mkdir\x93(V" + str(path).encode() + b"\ntR.",
        lambda path: b"ctorch\nload\n(V" + str(path).encode() + b"\ntR.",
        lambda path: b"no pickle",
        lambda path: b"",
    ],
)
def test_the_author_of_a_sharded_checkpoint_runs_no_code(tmp_path, author):
    metadata, _ = sharded(tmp_path)
    metadata.write_bytes(author(tmp_path / "proof"))
    with pytest.raises(
        ValueError, match=r"expected metadata in .*\.metadata .* Nothing of it was r"
    ):
        export_student(tmp_path, bert(), tmp_path / "out")
    assert not (tmp_path / "proof").exists()
    assert not (tmp_path / "out").exists()

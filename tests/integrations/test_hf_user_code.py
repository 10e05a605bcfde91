import logging

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from _hf import (
    NAME,
    PAIR,
    Wordy,
    arguments,
    bert,
    bert_teacher,
    distil,
    logged,
    texts,
    weighted,
)
from transformers import Trainer
from vid_loss.integrations.hf import VIDTrainer, VIDTrainerMixin
from vid_loss.integrations.hf._inputs import takes_any


class OwnLoss:
    """A compute_loss as people write it."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = 3.0 * F.cross_entropy(outputs.logits, labels)
        return (loss, outputs) if return_outputs else loss


class OwnInFront(OwnLoss, VIDTrainer):
    pass


class OwnBehind(VIDTrainerMixin, OwnLoss, Trainer):
    pass


@pytest.mark.parametrize("cls", [OwnInFront, OwnBehind])
def test_a_compute_loss_of_one_s_own_is_kept(tmp_path, cls):
    class Plain(OwnLoss, Trainer):
        pass

    plain = Plain(bert(), arguments(tmp_path), train_dataset=texts(), eval_dataset=texts())
    trainer = distil(tmp_path, cls=cls, pairs=weighted(0.0))
    for one in (plain, trainer):
        torch.manual_seed(0)  # dropout
        one.train()
    assert logged(trainer, "loss") == logged(plain, "loss")
    assert logged(trainer, "transfer_loss") == [0.0] * 4
    assert trainer.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]


def test_model_init_gets_heads_for_every_model(tmp_path):
    trainer = distil(tmp_path, model_init=lambda: bert())
    first = trainer.distiller
    trainer.train()
    assert trainer.distiller is not first
    assert trainer.model.vid_heads is trainer.distiller.losses
    assert len(logged(trainer, "transfer_loss")) == 4


@pytest.mark.parametrize("keep", [True, False])
def test_columns_of_the_teacher_reach_it_and_not_the_student(tmp_path, keep):
    rows = [{**row, "words": row["input_ids"].flip(0)} for row in texts()]
    pairs = {"bert.encoder.layer.1": "embed"}
    trainer = distil(tmp_path, bert(), Wordy(), pairs, rows, remove_unused_columns=keep)
    # A student that takes anything is given everything then, as by the Trainer.
    everything = not keep and takes_any(bert().forward)
    assert trainer._transfer.columns.teacher_only == (set() if everything else {"words"})
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0


def test_teacher_inputs_make_the_teacher_s_call(tmp_path):
    seen = []

    def teacher_inputs(input_ids, attention_mask):
        seen.append(tuple(input_ids.shape))
        return input_ids, attention_mask

    trainer = VIDTrainer(
        bert(),
        arguments(tmp_path, max_steps=1),
        train_dataset=texts(),
        teacher=Wordy(),
        pairs={"bert.encoder.layer.1": "embed"},
        teacher_inputs=teacher_inputs,
    )
    trainer.train()
    assert seen == [(2, 8), (4, 8)]


def test_pairs_left_out_are_matched_and_logged(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="vid_loss.integrations.hf._build"):
        trainer = distil(tmp_path, pairs=None, max_steps=1)
    assert NAME in trainer.distiller.pairs
    assert "none were given; matched" in caplog.text
    assert NAME in caplog.text
    trainer.train()


def test_an_example_stands_in_for_the_train_set(tmp_path):
    batch = {
        key: torch.stack([torch.as_tensor(row[key]) for row in texts(2)]) for key in texts()[0]
    }
    trainer = VIDTrainer(
        bert(), arguments(tmp_path), teacher=bert_teacher(), pairs=PAIR, example=batch
    )
    assert len(trainer.distiller.losses) == 1


def test_without_any_data_it_still_evaluates_and_refuses_to_train(tmp_path):
    trainer = VIDTrainer(
        bert(), arguments(tmp_path), eval_dataset=texts(), teacher=bert_teacher(), pairs=PAIR
    )
    assert trainer.evaluate()["eval_loss"] > 0
    with pytest.raises(ValueError, match="VIDTrainer, example: expected a collated batch"):
        trainer.train()


def test_sizing_the_heads_draws_no_random_number(tmp_path):
    class Random(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            torch.rand(1)
            return texts()[index]

    distil(tmp_path)  # seeds
    expected = torch.get_rng_state()
    distil(tmp_path, rows=Random())
    assert torch.equal(torch.get_rng_state(), expected)

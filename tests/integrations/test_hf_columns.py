"""Which columns of a batch the student is given, beside a teacher with columns of its own."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import torch.nn.functional as F
from _hf_net import distil, plain
from torch import nn
from transformers import Trainer
from vid_loss.integrations.hf import VIDTrainerMixin


class Words(nn.Module):
    """A text model that keeps the names of what it is given."""

    def __init__(self, width):
        super().__init__()
        torch.manual_seed(width)
        self.body, self.head = nn.Embedding(32, width), nn.Linear(width, 3)
        self.given = []

    def forward(self, input_ids, attention_mask=None, labels=None, num_items_in_batch=None):
        self.given.append((input_ids, attention_mask, labels))
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        hidden = self.body(input_ids) * mask.unsqueeze(-1)
        logits = self.head(hidden.mean(1))
        loss = {} if labels is None else {"loss": F.cross_entropy(logits, labels)}
        return {**loss, "logits": logits}


class Adapted(nn.Module):
    """A student whose forward names nothing, as a PEFT model's."""

    def __init__(self, width):
        super().__init__()
        self.inner = Words(width)
        self.given = self.inner.given

    def get_base_model(self):
        return self.inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


class TextTeacher(Words):
    """Has a column of its own."""

    def forward(self, input_ids, attention_mask=None, words=None):
        return super().forward(input_ids, attention_mask)


class OwnColumns(Trainer):
    """Names the columns of its data set, as TRL's do; the mask is its collator's."""

    def _set_signature_columns_if_needed(self):
        if self._signature_columns is None:
            self._signature_columns = ["input_ids", "labels"]


def pad(texts):
    width = max(len(row["input_ids"]) for row in texts)
    ids = [row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in texts]
    batch = {"input_ids": torch.tensor(ids), "labels": torch.tensor([r["labels"] for r in texts])}
    batch["attention_mask"] = (batch["input_ids"] > 0).long()
    if "words" in texts[0]:
        batch["words"] = batch["input_ids"]
    return batch


TEXTS = [{"input_ids": [1] * n, "labels": n % 3} for n in (3, 5, 7, 9)] * 2
WITH_WORDS = [{**row, "words": 1} for row in TEXTS]


@pytest.mark.parametrize("data", [TEXTS, WITH_WORDS])
@pytest.mark.parametrize(
    ("base", "student"), [(Trainer, Words), (OwnColumns, Words), (OwnColumns, Adapted)]
)
def test_the_student_is_given_what_the_plain_trainer_gives_it(tmp_path, base, student, data):
    name = "body" if student is Words else "inner.body"
    options = {"data": data, "data_collator": pad, "logging_strategy": "no"}
    expected = plain(tmp_path, student(5), base, **options)
    trainer = distil(
        tmp_path,
        student(5),
        type("Ours", (VIDTrainerMixin, base), {}),
        teacher=TextTeacher(7),
        pairs={name: "body"},
        **options,
    )
    for one in (expected, trainer):
        one.model.given.clear()
        one.train()
        one.evaluate()
    assert len(expected.model.given) == len(trainer.model.given) == 3
    for mine, theirs in zip(trainer.model.given, expected.model.given, strict=True):
        for x, y in zip(mine, theirs, strict=True):
            assert x is y is None or torch.equal(x, y)

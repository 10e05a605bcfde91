"""Unusual data sets and collators: the first rows size the heads, and are trained on."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import numpy as np
from _hf import PAIR, arguments, bert, bert_teacher, logged, texts
from _hf_net import distil as distil_net
from _hf_net import plain as plain_net
from _hf_net import rows
from torch.utils.data import IterableDataset, default_collate
from vid_loss.integrations.hf import VIDTrainer

from vid_loss import Pair

NOTHING = [Pair("body", "body", weight=0.0)]


class Stream(IterableDataset):
    """Goes on where the last pass has left it."""

    def __init__(self):
        self.rows = iter(rows(32))

    def __iter__(self):
        return self.rows


class Generated(Stream):
    def __iter__(self):
        yield from self.rows


class Counted(IterableDataset):
    """Keeps its place in a number."""

    def __init__(self):
        self.place = 0

    def __iter__(self):
        while self.place < 32:
            self.place += 1
            yield rows(32)[self.place - 1]


class Shuffled(IterableDataset):
    """May be gone through again, in another order."""

    def __iter__(self):
        yield from (rows(32)[i] for i in torch.randperm(32).tolist())


class OwnOrder(Shuffled):
    def __init__(self):
        self.generator = torch.Generator().manual_seed(5)

    def __iter__(self):
        yield from (rows(32)[i] for i in torch.randperm(32, generator=self.generator).tolist())


@pytest.mark.parametrize("dataset", [Stream, Generated, Counted, Shuffled, OwnOrder])
def test_an_iterable_train_set_gives_the_rows_that_it_gives_the_plain_trainer(tmp_path, dataset):
    expected, trainer = (
        plain_net(tmp_path, data=dataset(), max_steps=6),
        distil_net(tmp_path, data=dataset(), max_steps=6, pairs=NOTHING),
    )
    for one in (expected, trainer):
        one.model.seen.clear()
        torch.manual_seed(1)
        one.train()
    assert len(trainer.model.seen) == len(expected.model.seen) == 6
    for mine, theirs in zip(trainer.model.seen, expected.model.seen, strict=True):
        assert torch.equal(mine, theirs)
    assert logged(trainer, "loss") == logged(expected, "loss")


class Noisy:
    """Adds noise of its own generator, as a collator that masks words does."""

    def __init__(self, generator):
        self.generator = generator

    def __call__(self, rows):
        batch = default_collate(rows)
        if self.generator is None:
            self.generator = torch.Generator().manual_seed(3)
        if isinstance(self.generator, torch.Generator):
            noise = torch.randn(batch["x"].shape, generator=self.generator)
        else:
            noise = torch.tensor(self.generator.normal(size=batch["x"].shape)).float()
        return {**batch, "x": batch["x"] + noise}


def in_a_function(generator):
    noisy = Noisy(generator())
    return lambda rows: noisy(rows)


@pytest.mark.parametrize("wrap", [lambda generator: Noisy(generator()), in_a_function])
@pytest.mark.parametrize(
    "generator",
    [
        lambda: torch.Generator().manual_seed(1),
        lambda: np.random.default_rng(1),
        lambda: np.random.RandomState(1),
        lambda: None,
    ],
    ids=["torch", "numpy", "numpy's old", "made at first use"],
)
def test_a_collator_s_own_generator_is_not_drawn_from(tmp_path, generator, wrap):
    expected = plain_net(tmp_path, data_collator=wrap(generator))
    trainer = distil_net(tmp_path, data_collator=wrap(generator), pairs=NOTHING)
    for one in (expected, trainer):
        one.train()
    assert logged(trainer, "loss") == logged(expected, "loss")


def unpadded():
    return [{**row, "input_ids": row["input_ids"][: 3 + i % 4]} for i, row in enumerate(texts())]


def without_padding(rows):
    return {
        "input_ids": torch.tensor([row["input_ids"].tolist() for row in rows]),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


def test_a_batch_size_of_one_needs_no_padding(tmp_path):
    options = {"train_dataset": unpadded(), "data_collator": without_padding}
    options.update(teacher=bert_teacher(), pairs=PAIR)
    args = arguments(tmp_path, per_device_train_batch_size=1)
    trainer = VIDTrainer(bert(), args, **options)
    trainer.train()
    assert len(logged(trainer, "transfer_loss")) == 4
    args = arguments(tmp_path, per_device_train_batch_size=2)
    with pytest.raises(ValueError, match=r"make a batch of the first 2 rows .*Pass example="):
        VIDTrainer(bert(), args, **options)


def test_rows_that_the_model_does_not_run_on_are_told_from_a_pair_that_does_not_fit(tmp_path):
    def too_long(rows):
        return {"input_ids": torch.ones(len(rows), 99, dtype=torch.long)}

    options = {"teacher": bert_teacher(), "data_collator": too_long, "train_dataset": texts()}
    with pytest.raises(ValueError, match=r"example: .*to evaluate alone, leave train_dataset out"):
        VIDTrainer(bert(), arguments(tmp_path), pairs=PAIR, **options)
    trainer = VIDTrainer(
        bert(),
        arguments(tmp_path),
        pairs=PAIR,
        teacher=bert_teacher(),
        eval_dataset=texts(),
    )
    assert trainer.evaluate()["eval_loss"] > 0

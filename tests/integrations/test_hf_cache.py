"""VIDTrainer with the teacher's features on disk."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("safetensors")

from _hf import bert_teacher, distil, logged, no_dropout_bert, texts
from tokenizers import Tokenizer, models
from transformers import DataCollatorWithPadding, PreTrainedTokenizerFast
from vid_loss.integrations.hf import VIDTrainer

from vid_loss.cache import FeatureCache, FixedAugmentations


def indexed(rows):
    return [{**row, "sample_index": i} for i, row in enumerate(rows)]


def as_hf(rows):
    datasets = pytest.importorskip("datasets")
    columns = {key: [torch.as_tensor(row[key]).tolist() for row in rows] for key in rows[0]}
    dataset = datasets.Dataset.from_dict(columns | {"unused": ["text"] * len(rows)})
    return dataset.map(lambda row, i: {"sample_index": i}, with_indices=True)


def counted(teacher):
    """The samples that a teacher was run on, noted by a hook."""
    samples = []
    teacher.register_forward_pre_hook(
        lambda _, args, kwargs: samples.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    return samples


def train(folder, cache=None, rows=None, **options):
    teacher = bert_teacher()
    samples = counted(teacher)
    options = {"max_steps": 8, "weight_decay": 0.0, **options}
    trainer = distil(
        folder,
        no_dropout_bert(),
        teacher,
        rows=rows or (texts() if cache is None else indexed(texts())),
        cache=cache,
        **options,
    )
    samples.clear()
    trainer.train()
    return trainer, samples


def same(one, other):
    assert logged(one, "loss") == logged(other, "loss")
    for name, weight in one.model.state_dict().items():
        assert torch.equal(weight, other.model.state_dict()[name]), name


@pytest.mark.parametrize("data", [indexed, as_hf], ids=["rows", "datasets"])
def test_a_cache_changes_no_bit_and_the_teacher_runs_in_the_first_epoch_alone(tmp_path, data):
    rows = data(texts())
    without, every = train(tmp_path / "1", rows=rows)
    cache = FeatureCache(tmp_path / "features", dtype=torch.float32)
    with_it, samples = train(tmp_path / "2", cache, rows)
    same(without, with_it)
    assert sum(every) == 2 * 16
    # Of the first batch, and of the first that is read, one sample alone is given to it again.
    assert sum(x for x in samples if x > 1) == 16
    assert samples.count(1) <= 3


def test_half_precision_is_near(tmp_path):
    without, _ = train(tmp_path / "1")
    with_it, _ = train(tmp_path / "2", FeatureCache(tmp_path / "features"))
    near = {"rtol": 2e-3, "atol": 0}
    one, other = (torch.tensor(logged(x, "loss")) for x in (without, with_it))
    assert not torch.equal(one, other)
    torch.testing.assert_close(one, other, **near)


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 3, "max_steps": 12},  # the last batch has one row
        {"remove_unused_columns": False},
        {"dataloader_num_workers": 1},
        {"eval_strategy": "steps", "eval_steps": 3},
    ],
    ids=lambda options: next(iter(options)),
)
def test_a_cache_changes_nothing_of_a_trainers_options(tmp_path, options):
    without, _ = train(tmp_path / "1", **options)
    with_it, _ = train(tmp_path / "2", FeatureCache(tmp_path / "f", dtype=torch.float32), **options)
    same(without, with_it)
    assert logged(without, "eval_loss") == logged(with_it, "eval_loss")


def test_a_run_resumes_with_the_files_of_the_one_before(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 4}
    whole, _ = train(tmp_path / "1", FeatureCache(tmp_path / "1/f", dtype=torch.float32), **options)
    teacher = bert_teacher()
    samples = counted(teacher)
    again = distil(
        tmp_path / "1",
        no_dropout_bert(),
        teacher,
        rows=indexed(texts()),
        cache=FeatureCache(tmp_path / "1/f", dtype=torch.float32),
        max_steps=8,
    )
    samples.clear()
    again.train(resume_from_checkpoint=str(tmp_path / "1/checkpoint-4"))
    same(whole, again)
    assert all(x == 1 for x in samples)


class TakesAll(torch.nn.Module):
    """A student whose forward takes any column, and notes which."""

    def __init__(self):
        super().__init__()
        self.bert = no_dropout_bert().bert
        self.head = torch.nn.Linear(16, 3)
        self.given = set()

    def forward(self, labels=None, **columns):
        self.given |= columns.keys()
        read = {name: columns[name] for name in ("input_ids", "attention_mask")}
        logits = self.head(self.bert(**read).pooler_output)
        loss = None if labels is None else torch.nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits} if labels is not None else {"logits": logits}


@pytest.mark.parametrize("unused", [True, False])
def test_no_student_is_given_the_index(tmp_path, unused):
    student = TakesAll()
    rows, options = indexed(texts()), {"remove_unused_columns": unused}
    if unused:
        options["label_names"] = ["labels"]
        student = no_dropout_bert()
        student.given = set()
        student.register_forward_pre_hook(
            lambda _, args, kwargs: student.given.update(kwargs), with_kwargs=True
        )
    cache = FeatureCache(tmp_path / "features")
    trainer = distil(tmp_path, student, rows=rows, cache=cache, **options)
    trainer.train()
    trainer.evaluate()
    trainer.predict(rows)
    assert "input_ids" in student.given
    assert "sample_index" not in student.given


def collator(padding):
    vocabulary = Tokenizer(models.WordLevel({"[PAD]": 0}, unk_token="[PAD]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="[PAD]")
    length = 8 if padding == "max_length" else None
    return DataCollatorWithPadding(tokenizer, padding=padding, max_length=length)


def ragged(lengths=(8, 8, 5, 8, 6, 8, 8, 7)):
    rows = texts(len(lengths))  # tokens that are cut here are padding, or become it
    return indexed(
        [
            {**x, "input_ids": x["input_ids"][:n], "attention_mask": x["attention_mask"][:n]}
            for x, n in zip(rows, lengths, strict=True)
        ]
    )


def test_rows_that_are_padded_to_one_length_are_cached(tmp_path):
    options = {"rows": ragged(), "data_collator": collator("max_length"), "max_steps": 6}
    without, _ = train(tmp_path / "1", **options)
    with_it, samples = train(
        tmp_path / "2", FeatureCache(tmp_path / "f", dtype=torch.float32), **options
    )
    same(without, with_it)
    assert sum(x for x in samples if x > 1) == 8


def test_rows_that_are_padded_to_the_longest_of_a_batch_are_refused(tmp_path):
    """Whether the first epoch has had all lengths or, as its batches fell, one alone."""
    for name, lengths in (("new", (8, 5) * 4), ("old", (8, 8, 8, 5, 5, 5, 5, 8))):
        options = {"rows": ragged(lengths), "data_collator": collator(True), "max_steps": 40}
        with pytest.raises(ValueError, match=r"FeatureCache.*padding=.max_length"):
            train(tmp_path, FeatureCache(tmp_path / name), per_device_train_batch_size=2, **options)


class Pixels(torch.utils.data.Dataset):
    """Rows with noise that is drawn anew each time."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        row = texts(8)[index]
        return {**row, "input_ids": row["input_ids"].roll(int(torch.randint(8, ())))}


def test_augmented_rows_are_refused_and_fixed_ones_are_served(tmp_path):
    class Indexed(Pixels):
        def __getitem__(self, index):
            return {**super().__getitem__(index), "sample_index": index}

    with pytest.raises(ValueError, match=r"random augmentation.*FixedAugmentations"):
        train(tmp_path, FeatureCache(tmp_path / "free"), Indexed(), max_steps=20)
    views = FixedAugmentations(Pixels(), views=3)
    _, samples = train(tmp_path, FeatureCache(tmp_path / "fixed"), views, max_steps=40)
    assert 8 < sum(x for x in samples) < 3 * 8 + 10


@pytest.mark.parametrize("rows", [texts, lambda: as_hf(texts()).remove_columns("sample_index")])
def test_a_missing_index_is_named_at_construction_with_the_line_to_write(tmp_path, rows):
    line = r"expected a column 'sample_index' .*; got \['input_ids.*train_set.map\(lambda row, i: "
    with pytest.raises(ValueError, match=line):
        distil(tmp_path, rows=rows(), cache=FeatureCache(tmp_path))


def test_a_folder_for_a_cache_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"cache: expected a FeatureCache or None; got 'features'"):
        distil(tmp_path, cache="features")


class TwoForwards(VIDTrainer):
    """Its loss runs the model on the batch, then on the half of its own tokens."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        half = {**inputs, "input_ids": inputs["input_ids"] // 2}
        return model(**inputs).loss + model(**half).loss


def test_a_second_forward_on_other_samples_is_refused(tmp_path):
    cache, rows = FeatureCache(tmp_path), indexed(texts())
    trainer = distil(tmp_path, rows=rows, cache=cache, cls=TwoForwards)
    with pytest.raises(ValueError, match=r"VIDTrainer, cache: .* runs the model on one batch; got"):
        trainer.train()

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from _hf import (
    LAYERS,
    LLAMA_PAIR,
    NAME,
    PAIR,
    bert_teacher,
    distil,
    llama,
    llama_teacher,
    logged,
    no_dropout_bert,
    sentences,
    texts,
    weighted,
    without_estimates,
)

from vid_loss import KDLoss, Pair


def test_log_has_task_and_transfer_loss_and_each_pair(tmp_path):
    pairs = [*weighted(10.0), Pair("classifier", "classifier", loss=KDLoss(), name="kd")]
    trainer = distil(tmp_path, pairs=pairs, logging_steps=2, gradient_accumulation_steps=2)
    trainer.train()
    loss, task, transfer = (logged(trainer, k) for k in ("loss", "task_loss", "transfer_loss"))
    vid, kd = logged(trainer, f"transfer/{NAME}"), logged(trainer, "transfer/kd")
    assert len(loss) == len(task) == len(vid) == 2
    for i in range(2):
        assert task[i] + transfer[i] == pytest.approx(loss[i], rel=1e-5)
        assert 10.0 * vid[i] + kd[i] == pytest.approx(transfer[i], rel=1e-5)
    found = trainer.distiller.diagnostics()[NAME]
    for metric in ("explained_variance", "nats_per_element", "channels_on_floor"):
        assert logged(trainer, f"{metric}/{NAME}")[-1] == pytest.approx(getattr(found, metric))


def test_masked_tokens_count_nowhere(tmp_path):
    rows, scrambled = texts(), texts()
    for row in scrambled:
        row["input_ids"] = torch.where(row["attention_mask"].bool(), row["input_ids"], 31)
    values = []
    for data in (rows, scrambled):
        trainer = distil(tmp_path, no_dropout_bert(), rows=data, max_steps=2)
        trainer.train()
        values.append(logged(trainer, "transfer_loss"))
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_a_pair_may_count_the_padding_too(tmp_path):
    everywhere = [Pair(*LAYERS, mask=lambda input_ids: torch.ones_like(input_ids))]
    masked, unmasked = (
        distil(tmp_path, no_dropout_bert(), pairs=pairs, max_steps=1)
        for pairs in (PAIR, everywhere)
    )
    masked.train()
    unmasked.train()
    assert logged(masked, "task_loss") == logged(unmasked, "task_loss")
    assert logged(masked, "transfer_loss") != logged(unmasked, "transfer_loss")


def mean_loss(outputs, labels, num_items_in_batch=None):
    return F.cross_entropy(outputs.logits, labels)


def scaled_loss(outputs, labels, num_items_in_batch=None):
    count = len(labels) if num_items_in_batch is None else num_items_in_batch
    return F.cross_entropy(outputs.logits, labels, reduction="sum") / count


MODES = {
    "a model that ignores num_items_in_batch": (no_dropout_bert, bert_teacher, PAIR, {}),
    "a model that divides by it": (llama, llama_teacher, LLAMA_PAIR, {}),
    "label smoothing": (no_dropout_bert, bert_teacher, PAIR, {"label_smoothing_factor": 0.1}),
    "a function that ignores it": (
        no_dropout_bert,
        bert_teacher,
        PAIR,
        {"compute_loss_func": mean_loss},
    ),
    "a function that divides by it": (
        no_dropout_bert,
        bert_teacher,
        PAIR,
        {"compute_loss_func": scaled_loss},
    ),
}


@pytest.mark.parametrize("mode", MODES)
def test_accumulation_changes_neither_loss_nor_its_parts(tmp_path, mode):
    build, teacher, pairs, options = MODES[mode]
    # Without padding: a mean over tokens is taken for each micro-batch.
    # With estimates that run from batch to batch the terms depend on how rows are batched.
    rows, pairs = sentences() if build is llama else texts(padding=0), without_estimates(pairs)
    runs = []
    for accumulation in (1, 2, 4):
        student = build()
        trainer = distil(
            tmp_path,
            student,
            teacher(),
            pairs,
            rows,
            per_device_train_batch_size=8 // accumulation,
            gradient_accumulation_steps=accumulation,
            max_steps=2,
            optim="sgd",
            **options,
        )
        trainer.train()
        runs.append((trainer, student.state_dict()))
    first, expected = runs[0]
    for trainer, state in runs[1:]:
        for key in ("loss", "task_loss", "transfer_loss"):
            assert logged(trainer, key) == pytest.approx(logged(first, key), rel=1e-5), key
        for name, value in state.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)

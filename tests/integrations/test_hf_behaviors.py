"""What the Trainer of transformers does besides training: at weight 0 all of it to the last bit."""

import copy
import pickle

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from _asserts import assert_same_state, hook_count, state_of
from _hf import LAYERS, NAME, PAIR, arguments, bert, bert_teacher, logged, texts, weighted
from safetensors.torch import load_file
from torch.utils.data import IterableDataset
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments
from vid_loss.integrations.hf import VIDTrainer

FIELDS = TrainingArguments.__dataclass_fields__
LENGTHS = (
    {"train_sampling_strategy": "group_by_length"}
    if "train_sampling_strategy" in FIELDS
    else {"group_by_length": True}  # as it was called before transformers 5
)
EVAL = {"eval_strategy": "steps", "eval_steps": 1}
BEST = {**EVAL, "save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True}


class Unsized(IterableDataset):
    def __iter__(self):
        yield from texts(32)


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


SETTINGS = {
    "best model at the end": {**BEST, "save_total_limit": 1},
    "early stopping": {
        **BEST,
        "callbacks": lambda: [EarlyStoppingCallback(1)],
        "learning_rate": 0.3,
        "max_steps": 8,
    },
    "evaluation first": {**EVAL, "eval_on_start": True},
    "metrics": {**EVAL, "compute_metrics": lambda: accuracy},
    "rows of like lengths": LENGTHS,
    "label smoothing": {"label_smoothing_factor": 0.1},
    "NEFTune": {"neftune_noise_alpha": 5.0},
    "a batch size that is found": {"auto_find_batch_size": True},
    "an optimizer class": {
        "optimizer_cls_and_kwargs": lambda: (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9})
    },
    "Adafactor": {"optim": "adafactor"},
    "a schedule with a warm-up": {"lr_scheduler_type": "cosine", "warmup_steps": 2},
    "whole epochs, the last batch small": {
        "max_steps": -1,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 7,
    },
    "without a length": {"train_dataset": Unsized},
    "a loader's workers": {"dataloader_num_workers": 1},
    "another data seed": {"data_seed": 9, "seed": 3},
    "a model for each run": {"model_init": lambda: lambda: bert()},
    "bfloat16": {"bf16": True},
}
# What has no other way through the heads and the loss than a plain run.
ALIKE = {
    "evaluation first",
    "metrics",
    "a schedule with a warm-up",
    "another data seed",
    "a loader's workers",
    "best model at the end",
}
OF_TRAINER = (
    "callbacks",
    "compute_metrics",
    "model_init",
    "optimizer_cls_and_kwargs",
    "train_dataset",
)


def build(folder, weight=None, rows=None, **options):
    """The plain Trainer, or at a weight the distilling one."""
    rows = rows or texts()
    given = {key: options.pop(key)() for key in OF_TRAINER if key in options}
    if "model_init" not in given:
        given["model"] = bert()
    cls = Trainer
    if weight is not None:
        cls = VIDTrainer
        given.update(teacher=bert_teacher(), pairs=weighted(weight))
    args = arguments(folder, **{"max_steps": 3, **options})
    return cls(args=args, eval_dataset=rows, **{"train_dataset": rows, **given})


def of_evaluation(trainer):
    timing = ("runtime", "per_second")
    return [
        {key: x for key, x in entry.items() if key.startswith("eval_") and not key.endswith(timing)}
        for entry in trainer.state.log_history
    ]


@pytest.mark.parametrize("setting", SETTINGS)
def test_at_weight_zero_it_is_the_plain_trainer_to_the_last_bit(tmp_path, setting):
    plain = build(tmp_path / "plain", **SETTINGS[setting])
    trainer = build(tmp_path / "ours", 0.0, **SETTINGS[setting])
    for one in (plain, trainer):
        torch.manual_seed(0)
        one.train()
    for key in ("loss", "grad_norm", "learning_rate"):
        assert logged(trainer, key) == logged(plain, key) != [], key
    assert of_evaluation(trainer) == of_evaluation(plain)
    assert trainer.state.global_step == plain.state.global_step
    assert_same_state(trainer.model, state_of(plain.model))
    saved = [
        sorted(x.name for x in folder.glob("checkpoint-*"))
        for folder in (tmp_path / "plain", tmp_path / "ours")
    ]
    assert saved[0] == saved[1]


@pytest.mark.parametrize("setting", sorted(SETTINGS.keys() - ALIKE))
def test_it_distils(tmp_path, setting):
    trainer = build(tmp_path, 1.0, **SETTINGS[setting])
    heads = state_of(trainer.distiller.losses) if "model_init" not in SETTINGS[setting] else {}
    trainer.train()
    transfer = logged(trainer, f"transfer/{NAME}")
    assert len(transfer) == len(logged(trainer, "loss"))
    assert min(transfer) > 0.2
    for key, value in state_of(trainer.distiller.losses).items():
        assert not (key in heads and torch.equal(value, heads[key])), key


# Of these the plain Trainer makes another run, too.
INEXACT = "weights alone", "without skipping rows", "rows of like lengths"
RESUMED = {
    "as it is": {},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "weights alone": {"save_only_model": True},
    "without skipping rows": {"ignore_data_skip": True},
    "rows of like lengths": LENGTHS,
    "without a length": {"train_dataset": Unsized},
    "an optimizer class": {
        "optimizer_cls_and_kwargs": lambda: (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9})
    },
    "a model for each run": {"model_init": lambda: lambda: bert()},
}


@pytest.mark.parametrize("setting", RESUMED)
def test_a_resumed_run_is_the_whole_run(tmp_path, setting):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, **RESUMED[setting]}
    whole, resumed = (build(tmp_path, 1.0, **options) for _ in range(2))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert len(load_file(tmp_path / "checkpoint-4" / "vid_heads.safetensors")) > 0
    if setting in INEXACT:
        assert resumed.state.global_step == 4
        return
    assert logged(resumed, "loss") == logged(whole, "loss")
    for one, other in ((resumed.model, whole.model), (resumed.distiller, whole.distiller)):
        assert_same_state(one, state_of(other))


def test_training_twice_goes_on(tmp_path):
    runs = [build(tmp_path), build(tmp_path, 0.0), build(tmp_path, 1.0)]
    for trainer in runs:
        for seed in (0, 1):
            torch.manual_seed(seed)
            trainer.train()
    assert logged(runs[1], "loss") == logged(runs[0], "loss")
    assert_same_state(runs[1].model, state_of(runs[0].model))
    assert len(logged(runs[2], "transfer_loss")) == 3  # of the second run, as the Trainer's log is


def test_predictions_are_the_plain_trainer_s(tmp_path):
    runs = [build(tmp_path), build(tmp_path, 0.0)]
    found = []
    for trainer in runs:
        torch.manual_seed(0)
        trainer.train()
        found.append(trainer.predict(texts()).predictions)
    assert (found[0] == found[1]).all()


def test_an_empty_evaluation_set_is_one_to_the_plain_trainer_too(tmp_path):
    found = [build(tmp_path, weight).evaluate(eval_dataset=[]) for weight in (None, 0.0)]
    assert found[0].keys() == found[1].keys()
    assert "eval_loss" not in found[0]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_of_the_closed_student_is_a_plain_model(tmp_path, copied):
    trainer = build(tmp_path, 1.0)
    trainer.train()
    trainer.close()
    twin = copied(trainer.model)
    assert hook_count(twin) == hook_count(bert())
    assert_same_state(twin, state_of(trainer.model))
    assert twin(input_ids=texts()[0]["input_ids"][None]).logits.shape == (1, 3)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # Optuna's own
def test_a_search_of_hyperparameters_gives_each_trial_its_heads(tmp_path):
    pytest.importorskip("optuna")
    seen = []

    class Looks(VIDTrainer):
        def create_optimizer(self, *args):
            seen.append((id(self.distiller), self.args.learning_rate))
            return super().create_optimizer(*args)

    trainer = Looks(
        model_init=lambda: bert(),
        args=arguments(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=2),
        train_dataset=texts(),
        eval_dataset=texts(),
        teacher=bert_teacher(),
        pairs=PAIR,
    )
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2)},
        n_trials=2,
        backend="optuna",
    )
    assert len({distiller for distiller, _ in seen}) == len({rate for _, rate in seen}) == 2
    assert best.hyperparameters["learning_rate"] in [rate for _, rate in seen]


def test_a_found_batch_size_is_found_anew_with_the_teacher_beside(tmp_path):
    class Small(VIDTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            if len(inputs["labels"]) > 2:
                raise RuntimeError("CUDA out of memory. Not really.")
            return super().training_step(model, inputs, *args, **kwargs)

    args = arguments(tmp_path, max_steps=2, auto_find_batch_size=True)
    trainer = Small(bert(), args, train_dataset=texts(), teacher=bert_teacher(), pairs=PAIR)
    trainer.train()
    assert len(logged(trainer, f"transfer/{LAYERS[0]}->{LAYERS[1]}")) == 2

"""The trainer of sentence-transformers with the mixin in front."""

import pytest
import torch

pytest.importorskip("sentence_transformers", minversion="6.2")

import datasets
from _asserts import assert_same_state, state_of
from _hf import arguments, logged
from _words import texts, tokenizer
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer import losses, modules
from transformers import BertConfig, BertModel
from vid_loss.integrations.hf import VIDTrainerMixin

from vid_loss import Pair

# The library's own, on the way to its next names.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
datasets.disable_progress_bars()
LAYERS = "0.model.encoder.layer.1", "0.model.encoder.layer.2"


class Distilling(VIDTrainerMixin, SentenceTransformerTrainer):
    """The README's."""


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """Makes a SentenceTransformer, which its library only builds from files."""

    def make(width=16, layers=2, seed=0):
        torch.manual_seed(seed)
        folder = tmp_path_factory.mktemp("bert")
        config = BertConfig(
            vocab_size=32,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=2 * width,
            max_position_embeddings=16,
        )
        BertModel(config).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        words = modules.Transformer(str(folder), max_seq_length=16)
        return SentenceTransformer(modules=[words, modules.Pooling(width)], device="cpu")

    return make


ONE, TWO, THREE = texts(16, 1), texts(16, 2, least=3), texts(16, 3)
PAIRS = datasets.Dataset.from_dict({"anchor": ONE, "positive": TWO})
TRIPLES = datasets.Dataset.from_dict({"anchor": ONE, "positive": TWO, "negative": THREE})
LABELLED = datasets.Dataset.from_dict({"one": ONE, "two": TWO, "label": [0, 1, 2, 0] * 4})


def classes(model):
    torch.manual_seed(3)
    return losses.SoftmaxLoss(model, 16, 3)


def ranks(model):
    return losses.MultipleNegativesRankingLoss(model)


LOSSES = {
    "two columns": (ranks, PAIRS, {}),
    "three columns": (losses.TripletLoss, TRIPLES, {}),
    "a loss with parameters": (classes, LABELLED, {}),
    "accumulation": (ranks, PAIRS, {"gradient_accumulation_steps": 2}),
    "Matryoshka": (lambda m: losses.MatryoshkaLoss(m, ranks(m), [16, 8]), PAIRS, {}),
    "a data set and a loss each": (
        lambda m: {"a": ranks(m), "b": classes(m)},
        datasets.DatasetDict(a=PAIRS, b=LABELLED),
        {},
    ),
}


def build(folder, encoder, case, weight=None):
    loss, data, options = LOSSES[case]
    student, own, cls = encoder(), {}, SentenceTransformerTrainer
    if weight is not None:
        own = {"teacher": encoder(24, 3, seed=1), "pairs": [Pair(*LAYERS, weight=weight)]}
        cls = Distilling
    options = {"max_steps": 2, **options}
    return cls(
        model=student,
        args=arguments(folder, SentenceTransformerTrainingArguments, **options),
        train_dataset=data,
        loss=loss(student),
        **own,
    )


@pytest.mark.parametrize("case", LOSSES)
def test_at_weight_zero_it_is_the_plain_trainer_to_the_last_bit(tmp_path, encoder, case):
    plain, trainer = (build(tmp_path, encoder, case, weight) for weight in (None, 0.0))
    for one in (plain, trainer):
        torch.manual_seed(0)
        one.train()
    assert logged(trainer, "loss") == logged(plain, "loss")
    assert logged(trainer, "grad_norm") == logged(plain, "grad_norm")
    assert_same_state(trainer.model, state_of(plain.model))
    if case == "a loss with parameters":
        assert torch.equal(trainer.loss.classifier.weight, plain.loss.classifier.weight)


@pytest.mark.parametrize("case", LOSSES)
def test_it_distils_every_column(tmp_path, encoder, case):
    trainer = build(tmp_path, encoder, case, 1.0)
    seen = {True: [], False: []}
    for model in (trainer.teacher, trainer.model):

        def note(_, args, of=seen[model is trainer.teacher]):
            of.append(args[0])

        model[0].model.embeddings.word_embeddings.register_forward_pre_hook(note)
    before = state_of(trainer.distiller.losses)
    trainer.train()
    assert min(logged(trainer, "transfer_loss")) > 0.3
    after = state_of(trainer.distiller.losses)
    assert not any(torch.equal(after[key], before[key]) for key in before)
    assert len(seen[True]) == len(seen[False]) >= 4
    for of_teacher, of_student in zip(seen[True], seen[False], strict=True):
        assert of_teacher is of_student


def test_a_column_s_padding_counts_nowhere(tmp_path, encoder):
    trainer = build(tmp_path, encoder, "two columns", 1.0)
    (loss,) = trainer.distiller.losses.values()
    given, counted = [], []
    trainer.model.register_forward_pre_hook(lambda _, args: given.append(args[0]["attention_mask"]))
    loss.register_forward_pre_hook(lambda *call: counted.append(call[-1]["mask"]), with_kwargs=True)
    trainer.train()
    assert len(counted) == len(given) == 4
    for ours, mask in zip(counted, given, strict=True):
        assert torch.equal(ours != 0, mask != 0)
    assert any((mask == 0).any() for mask in given)


def test_a_teacher_of_transformers_gets_each_column_by_its_own_names(tmp_path, encoder):
    student = encoder()
    trainer = Distilling(
        model=student,
        args=arguments(tmp_path, SentenceTransformerTrainingArguments, max_steps=1),
        train_dataset=PAIRS,
        loss=ranks(student),
        teacher=encoder(24, 3, seed=1)[0].model,
        pairs=[Pair(LAYERS[0], "encoder.layer.2", weight=1.0)],
    )
    trainer.train()
    assert min(logged(trainer, "transfer_loss")) > 0.3


def test_a_saved_model_is_the_plain_one_and_a_resumed_run_the_whole_one(tmp_path, encoder):
    runs = [build(tmp_path, encoder, "two columns", 1.0) for _ in range(2)]
    for trainer in runs:
        trainer.args.max_steps, trainer.args.save_strategy, trainer.args.save_steps = 3, "steps", 2
    runs[0].train()
    runs[1].train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert logged(runs[1], "loss") == logged(runs[0], "loss")
    loaded = SentenceTransformer(str(tmp_path / "checkpoint-3"), device="cpu")
    assert_same_state(loaded, state_of(runs[0].model))
    assert (tmp_path / "checkpoint-3" / "vid_heads.safetensors").is_file()


def test_a_loss_that_runs_the_model_in_backward_is_told_so(tmp_path, encoder):
    LOSSES["cached"] = losses.CachedMultipleNegativesRankingLoss, PAIRS, {}
    trainer = build(tmp_path, encoder, "cached", 1.0)
    with pytest.raises(RuntimeError, match="Cached in their names"):
        trainer.train()

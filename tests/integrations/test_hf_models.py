"""VIDTrainer with the architectures, precisions and options that change what a hook sees."""

import os
from unittest import mock

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import transformers
from _hf import (
    LLAMA_PAIR,
    PAIR,
    arguments,
    bert,
    bert_teacher,
    distil,
    llama,
    llama_teacher,
    logged,
    sentences,
    texts,
)
from _hf_vision import images, last_layer, resnet, swin, vit
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainingArguments
from vid_loss.integrations.hf import VIDTrainer, VIDTrainerMixin

from vid_loss import KDLoss, Pair


@pytest.fixture(autouse=True)
def own_environment():
    """A Trainer tells Accelerate of precision and compiler by variables that outlive it."""
    with mock.patch.dict(os.environ):
        yield


def bert_case():
    return bert(), bert_teacher(), PAIR, texts()


def llama_case():
    pairs = [Pair(*next(iter(LLAMA_PAIR.items()))), Pair("lm_head", "lm_head", loss=KDLoss())]
    return llama(), llama_teacher(), pairs, sentences()


def vit_case():
    student, teacher = vit(16, 1, 0), vit(24, 2, 1)
    return student, teacher, {last_layer(student): last_layer(teacher)}, images()


def resnet_case():
    stage = "resnet.encoder.stages.1"
    return resnet(8, 0), resnet(12, 1), {stage: stage, "classifier.1:input": "classifier"}, images()


def swin_case():
    # A block's tokens, and the last stage's, the first of its outputs.
    block, stage = "swin.encoder.layers.0.blocks.0[0]", "swin.encoder.layers.1[0]"
    return swin(8, 0), swin(12, 1), {block: block, stage: stage}, images()


def vit_to_resnet_case():
    student, teacher = resnet(8, 0), vit(24, 2, 1)
    pair = Pair(
        "resnet.encoder.stages.1",
        last_layer(teacher),
        teacher_transform=lambda x: x[:, 1:].mT.unflatten(2, (4, 4)),
    )
    return student, teacher, [pair], images()


@pytest.mark.parametrize(
    "case", [bert_case, llama_case, vit_case, resnet_case, swin_case, vit_to_resnet_case]
)
def test_two_steps(tmp_path, case):
    student, teacher, pairs, rows = case()
    trainer = distil(tmp_path, student, teacher, pairs, rows, max_steps=2)
    heads = {k: x.clone() for k, x in trainer.distiller.losses.named_parameters()}
    trainer.train()
    assert len(logged(trainer, "transfer_loss")) == 2
    assert torch.tensor(logged(trainer, "loss")).isfinite().all()
    for name, parameter in trainer.distiller.losses.named_parameters():
        assert not torch.equal(parameter, heads[name]), name
    trainer.save_model()
    _, info = type(student).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_a_vit_teacher_for_a_resnet_student_says_which_transform_is_missing(tmp_path):
    student, teacher = resnet(8, 0), vit(24, 2, 1)
    pairs = {"resnet.encoder.stages.1": last_layer(teacher)}
    with pytest.raises(ValueError, match="Turn the map into tokens: student_transform"):
        distil(tmp_path, student, teacher, pairs, images())


def t5(width, seed):
    torch.manual_seed(seed)
    config = transformers.T5Config(
        vocab_size=32,
        d_model=width,
        d_kv=8,
        d_ff=width,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


class Translator(VIDTrainerMixin, Seq2SeqTrainer):
    """Distils, and generates in evaluation."""


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_seq2seq(tmp_path, side):
    layer = f"{side}.final_layer_norm"
    rows = [{**row, "labels": row["input_ids"][:5]} for row in sentences()]
    args = arguments(tmp_path, Seq2SeqTrainingArguments, predict_with_generate=True, max_steps=2)
    trainer = Translator(
        t5(16, 0),
        args,
        train_dataset=rows,
        eval_dataset=rows,
        teacher=t5(24, 1),
        pairs={layer: layer},
    )
    trainer.train()
    assert len(logged(trainer, "transfer_loss")) == 2
    assert trainer.evaluate()["eval_loss"] > 0


# ---- Precision, compilation, checkpointing ----


def test_bf16_trains_heads_in_float32(tmp_path):
    exact, rounded = (distil(tmp_path, bf16=bf16, max_steps=2) for bf16 in (False, True))
    for trainer in (exact, rounded):
        torch.manual_seed(0)
        trainer.train()
    assert all(p.dtype == torch.float32 for p in rounded.distiller.parameters())
    values = logged(rounded, "transfer_loss")
    assert values != logged(exact, "transfer_loss")
    assert values == pytest.approx(logged(exact, "transfer_loss"), rel=0.05)


def checkpointing(use_reentrant):
    """The options, which are called otherwise since transformers 5."""
    names = TrainingArguments.__dataclass_fields__
    name = next(x for x in ("activation_checkpointing", "gradient_checkpointing") if x in names)
    return {name: True, f"{name}_kwargs": {"use_reentrant": use_reentrant}, "max_steps": 2}


def test_non_reentrant_checkpointing_changes_nothing(tmp_path):
    runs = []
    for options in ({"max_steps": 2}, checkpointing(use_reentrant=False)):
        trainer = distil(tmp_path, bert(), **options)
        trainer.train()
        runs.append(trainer)
    assert logged(runs[0], "loss") == logged(runs[1], "loss")
    assert logged(runs[0], "grad_norm") == pytest.approx(logged(runs[1], "grad_norm"), rel=1e-5)


def test_reentrant_checkpointing_is_right_or_refused(tmp_path):
    expected = distil(tmp_path, bert(), max_steps=2)
    expected.train()
    trainer = distil(tmp_path, bert(), **checkpointing(use_reentrant=True))
    try:
        trainer.train()
    except RuntimeError as error:  # transformers 4 reads the layer inside the checkpoint
        assert "use_reentrant=False" in str(error)  # noqa: PT017  # it may also not be raised
    else:
        assert logged(trainer, "loss") == logged(expected, "loss")
        norms = logged(trainer, "grad_norm"), logged(expected, "grad_norm")
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)


# Dynamo looks at the .grad of the features, which are no leaves, and hides that where it can.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_torch_compile_changes_no_value(tmp_path):
    runs = []
    for compiled in (False, True):
        student = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        options = {"torch_compile_backend": "aot_eager"} if compiled else {}
        trainer = distil(
            tmp_path, student, max_steps=2, optim="sgd", torch_compile=compiled, **options
        )
        trainer.train()
        runs.append(trainer)
    for key in ("loss", "transfer_loss", "grad_norm"):
        assert logged(runs[0], key) == pytest.approx(logged(runs[1], key), rel=1e-4), key
    assert isinstance(runs[1], VIDTrainer)
    assert runs[1].evaluate()["eval_loss"] > 0

from pathlib import Path

import pytest

pytest.importorskip("accelerate", reason="needs the hf extra")
pytest.importorskip("transformers", reason="needs the hf extra")

import hf_text_classification as program
import torch
from hf_text_classification import build_student, encode, main, pairs_of, read_options
from paper.datasets.package_texts import SECTIONS
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast

WORDS = [*SECTIONS, "a", "the", "of", "for", *map(str, range(20))]


@pytest.fixture
def encoder(tmp_path):
    """A tiny BERT of four layers with its tokenizer; its folder."""
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(tmp_path / "encoder")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(tmp_path / "encoder")
    return str(tmp_path / "encoder")


@pytest.fixture
def options(tmp_path, encoder):
    """A few texts per section, and as few steps."""
    packages = [
        f"Package: {section}{i}\nSection: {section}\nDescription: {i} of the {section}"
        for section in SECTIONS
        for i in range(16)
    ]
    (tmp_path / "packages").write_text("\n\n".join(packages) + "\n")
    files = ("--encoder", encoder, "--packages", str(tmp_path / "packages"))
    few = ["--texts-per-class=2", "--teacher-steps=2", "--student-steps=2", "--seeds=2"]
    return read_options([*files, *few, "--output", str(tmp_path / "out")])


def test_a_line_per_method_and_the_teacher_is_trained_once(options, capsys, monkeypatch):
    main(options)
    out = capsys.readouterr().out
    lines = [x.split()[0] for x in out.splitlines() if " ± " in x]
    assert lines == ["student", "kd", "vid", "kd+vid"]
    assert "teacher, on 48 texts: " in out
    # Both methods with VID, two seeds, two pairs.
    assert out.count(": explained variance ") == 8
    assert out.count(", seed 1: ") == 4
    assert "2 texts per class, 24 test texts" in out
    kept = Path(options.output, "teacher-2/model.safetensors")
    written = kept.stat().st_mtime_ns
    options.methods, options.student, options.validation = ["vid"], "small", True
    main(options)
    assert "24 validation texts" in capsys.readouterr().out
    assert kept.stat().st_mtime_ns == written


def test_the_student_is_cut_out_of_the_encoder(options, encoder):
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    student = build_student(options, encoder, tokenizer)
    whole = BertModel.from_pretrained(encoder)
    assert student.config.num_hidden_layers == 2
    for i in range(2):
        for own, other in zip(
            student.bert.encoder.layer[i].parameters(),
            whole.encoder.layer[i].parameters(),
            strict=True,
        ):
            torch.testing.assert_close(own, other)
    options.student = "small"
    small = build_student(options, encoder, tokenizer)
    assert small.config.vocab_size == len(tokenizer)
    assert small.config.hidden_size == 128


def test_blocks_are_paired_by_depth_and_lambdas_reach_their_pairs(options, encoder):
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    options.kd, options.vid, options.layers = 0.5, 0.25, 4
    teacher = build_student(options, encoder, tokenizer)
    options.layers = 2
    student = build_student(options, encoder, tokenizer)
    example = dict(tokenizer(["the a", "of the a"], padding=True, return_tensors="pt"))
    pairs = pairs_of("kd+vid", student, teacher, example, options)
    assert [(x.student, x.teacher, x.weight) for x in pairs] == [
        ("classifier", "classifier", 0.5),
        ("bert.encoder.layer.0", "bert.encoder.layer.1", 0.25),
        ("bert.encoder.layer.1", "bert.encoder.layer.3", 0.25),
    ]
    assert len(pairs_of("kd", student, teacher, example, options)) == 1


def test_rows_are_cut_and_have_their_section(encoder):
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    (row,) = encode([("the " * 100, SECTIONS[3])], tokenizer)
    assert row["labels"] == 3
    assert len(row["input_ids"]) == program.LENGTH == 32

import re

import pytest

pytest.importorskip("transformers")

import huggingface_hub  # after the skip
from _hf import LAYERS, NAME, bert_teacher, distil  # after the skip

from vid_loss import KDLoss, Pair  # after the skip

PAIRS = [
    Pair(*LAYERS, weight=2.0),
    Pair("classifier", "classifier", weight=0.5, loss=KDLoss(temperature=4)),
]


def cells(text):
    """Returns the table of the section, by student layer."""
    rows = re.findall(r"^\| `(\S+)` \| (.*) \|$", text, re.MULTILINE)
    return {layer: rest.split(" | ") for layer, rest in rows}


@pytest.fixture
def trained(tmp_path):
    teacher = bert_teacher()
    teacher.config._name_or_path = "someone/large-bert"
    trainer = distil(tmp_path / "student", teacher=teacher, pairs=PAIRS, max_steps=2)
    trainer.train()
    return trainer


def test_the_card_names_teacher_pairs_lambda_loss_and_diagnostics(trained, tmp_path):
    trained.create_model_card(model_name="student", tags=["mine"])
    path = tmp_path / "student" / "README.md"
    text = path.read_text()
    size = sum(p.numel() for p in trained.teacher.parameters())
    assert f"`someone/large-bert`, a BertForSequenceClassification of {size:,} parameters" in text
    found, terms = trained.distiller.diagnostics()[NAME], trained.distiller.terms
    rows = cells(text)
    assert rows[LAYERS[0]] == [
        f"`{LAYERS[1]}`",
        "VIDLoss",
        "2",
        f"{float(terms[NAME]):.4g}",
        f"{found.explained_variance:.4g}",
        f"{found.nats_per_element:.4g}",
        f"{found.channels_on_floor:.4g}",
    ]
    assert rows["classifier"][:3] == ["`classifier`", "KDLoss", "0.5"]
    assert text.index("## Distillation") < text.index("## Training procedure")
    assert text.count("## Distillation") == 1
    assert "mine" in huggingface_hub.ModelCard.load(path).data.tags


def test_a_second_card_has_one_section_and_a_closed_trainer_none(trained, tmp_path):
    path = tmp_path / "student" / "README.md"
    trained.create_model_card()
    trained.create_model_card()
    assert path.read_text().count("## Distillation") == 1
    trained.close()
    trained.create_model_card()
    assert "## Distillation" not in path.read_text()


def test_a_teacher_from_a_folder_is_named_by_its_class(trained, tmp_path):
    trained.teacher.config._name_or_path = str(tmp_path)
    trained.create_model_card()
    text = (tmp_path / "student" / "README.md").read_text()
    assert "The teacher is a BertForSequenceClassification" in text
    assert str(tmp_path) not in text.partition("## Distillation")[2].partition("## Training")[0]


def test_push_to_hub_sends_it(trained, monkeypatch):
    sent = {}

    def upload_folder(*_, folder_path, **__):
        sent["card"] = huggingface_hub.ModelCard.load(f"{folder_path}/README.md").text

    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr("transformers.trainer.upload_folder", upload_folder, raising=False)
    trained.hub_model_id = "someone/student"
    trained.push_to_hub()
    assert "## Distillation" in sent["card"]

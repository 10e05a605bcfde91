"""What the README shows is run as it stands."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

README = Path(__file__).parents[2] / "README.md"
BLOCK = re.compile(r"^```(?P<language>python|diff)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^## (?P<title>.*)$", re.MULTILINE)


def blocks():
    text = README.read_text()
    for match in BLOCK.finditer(text):
        titles = HEADING.findall(text[: match.start()])
        line = text[: match.start()].count("\n") + 2
        name = titles[-1] if titles else "first"
        yield pytest.param(name, match["language"], match["code"], id=f"{name}, line {line}")


class Net(nn.Module):
    """Has the names that the README's examples tap."""

    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1)
        self.layer3 = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU())
        self.layer4 = nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, padding=1), nn.ReLU())
        self.fc = nn.Linear(2 * width, 5)

    def forward(self, x):
        return self.fc(self.layer4(self.layer3(self.conv1(x))).mean((2, 3)))


def plain_script(_):
    """What a reader with a loop of their own has."""
    student, teacher = Net(4), Net(8)
    images, labels = torch.randn(4, 3, 8, 8), torch.randint(0, 5, (4,))
    return {
        "student": student,
        "teacher": teacher,
        "images": images,
        "labels": labels,
        "loader": [(images, labels)] * 2,
        "dataset": TensorDataset(images, labels),
        "criterion": F.cross_entropy,
        "optimizer": torch.optim.SGD(student.parameters(), lr=0.1),
        "torch": torch,
    }


def hugging_face_script(folder):
    transformers = pytest.importorskip("transformers")
    student, teacher = (
        transformers.BertForSequenceClassification(
            transformers.BertConfig(
                vocab_size=20,
                hidden_size=8,
                num_hidden_layers=layers,
                num_attention_heads=2,
                intermediate_size=8,
            )
        )
        for layers in (2, 4)
    )
    row = {"input_ids": [1, 2, 3], "attention_mask": [1, 1, 1], "labels": 1}
    args = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True
    )
    rows = [row] * 4
    names = {"student": student, "teacher": teacher, "args": args}
    return {**names, "train_set": rows, "eval_set": rows}


def accelerate_script(folder):
    pytest.importorskip("accelerate")
    script = plain_script(folder)
    samples = TensorDataset(script["images"], script["labels"])
    loader = DataLoader(samples, batch_size=2)
    return {**script, "train_loader": loader, "validation_loader": loader, "epochs": 1}


def timm_script(folder):
    timm = pytest.importorskip("timm")
    student, teacher = (
        timm.create_model(name, num_classes=5) for name in ("resnet10t", "resnet14t")
    )
    images, labels = torch.randn(4, 3, 32, 32), torch.randint(0, 5, (4,))
    return {"student": student, "teacher": teacher, "loader": [(images, labels)]}


SCRIPTS = {
    "Hugging Face Trainer": hugging_face_script,
    "Accelerate, and transfer between data sets": accelerate_script,
    "timm": timm_script,
}


@pytest.mark.parametrize(("section", "language", "code"), list(blocks()))
def test_block_runs(section, language, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    script = SCRIPTS.get(section, plain_script)(tmp_path)
    before = {name: p.clone() for name, p in script["student"].named_parameters()}
    if language == "diff":
        assert not re.search(r"^[^+ -]", code, re.MULTILINE)
        code = "\n".join(line[1:] for line in code.splitlines() if not line.startswith("-"))
    exec(compile(code, str(README), "exec"), script)
    if "optimizer.step()" in code or "train(" in code:
        after = dict(script["student"].named_parameters())
        moved = [name for name, value in before.items() if not torch.equal(value, after[name])]
        assert moved, "the block trains, and the student did not move"


def test_the_diff_comes_before_line_25():
    assert "```diff" in "\n".join(README.read_text().splitlines()[:25])


def test_every_local_link_leads_somewhere():
    targets = re.findall(r"\]\((?!http|#)([^)]+)\)", README.read_text())
    assert targets
    for target in targets:
        assert (README.parent / target).exists(), target

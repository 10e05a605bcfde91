"""What the README shows is run as it stands."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from _asserts import hook_count
from torch import nn

README = Path(__file__).parent.parent / "README.md"
BLOCK = re.compile(r"^```(?P<language>python|diff)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks():
    text = README.read_text()
    for match in BLOCK.finditer(text):
        line = text[: match.start()].count("\n") + 2
        yield pytest.param(match["language"], match["code"], id=f"line {line}")


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


@pytest.fixture
def script():
    """The script that a reader of the README already has."""
    torch.manual_seed(0)
    student, teacher = Net(4), Net(8)
    images, labels = torch.randn(4, 3, 8, 8), torch.randint(0, 5, (4,))
    return {
        "student": student,
        "teacher": teacher,
        "images": images,
        "labels": labels,
        "loader": [(images, labels)] * 2,
        "criterion": F.cross_entropy,
        "optimizer": torch.optim.SGD(student.parameters(), lr=0.1),
        "torch": torch,
    }


@pytest.mark.parametrize(("language", "code"), list(blocks()))
def test_block_runs(language, code, script):
    before = {name: p.clone() for name, p in script["student"].named_parameters()}
    if language == "diff":
        assert not re.search(r"^[^+ -]", code, re.MULTILINE)
        code = "\n".join(line[1:] for line in code.splitlines() if not line.startswith("-"))
    exec(compile(code, str(README), "exec"), script)
    if "optimizer.step()" in code:
        moved = [
            n for n, p in script["student"].named_parameters() if not torch.equal(p, before[n])
        ]
        assert moved, "the block trains, and the student did not move"


def test_the_diff_comes_before_line_25():
    assert "```diff" in "\n".join(README.read_text().splitlines()[:25])


def test_every_local_link_leads_somewhere():
    for target in re.findall(r"\]\((?!http|#)([^)]+)\)", README.read_text()):
        assert (README.parent / target).exists(), target


def test_the_script_fixture_has_no_hooks_of_its_own(script):
    assert hook_count(script["student"]) == 0

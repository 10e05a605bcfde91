"""A layer that runs several times in a forward: what is told instead can be tapped."""

import re

import pytest
import torch
from torch import nn

from vid_loss import Distiller, list_layers

pytestmark = pytest.mark.usefixtures("seed")


def block(width):
    return nn.Sequential(nn.Linear(width, width), nn.GELU())


class Loop(nn.Module):
    """One block, three times."""

    def __init__(self, width):
        super().__init__()
        self.stem, self.block = nn.Linear(3, width), block(width)

    def forward(self, x):
        x = self.stem(x)
        for _ in range(3):
            x = self.block(x)
        return x


class Twice(nn.Module):
    """One block under two names."""

    def __init__(self, width):
        super().__init__()
        self.stem = nn.Linear(3, width)
        self.blocks = nn.ModuleList([block(width)] * 2)

    def forward(self, x):
        x = self.stem(x)
        for part in self.blocks:
            x = part(x)
        return x


class Inside(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.body, self.fc = inner(width), nn.Linear(width, 2)

    def forward(self, x):
        return self.fc(self.body(x))


class Marked(Loop):
    """As the message has it."""

    def __init__(self, width):
        super().__init__(width)
        self.marks = nn.ModuleList(nn.Identity() for _ in range(3))

    def forward(self, x):
        x = self.stem(x)
        for i in range(3):
            x = self.block(x)
            x = self.marks[i](x)
        return x


def told(build, layer, x):
    student, teacher = build(4), build(6)
    with pytest.raises(RuntimeError, match=r"reached \d times in one forward.*what runs once") as e:
        Distiller(student, teacher, {layer: layer}, example=x)
    assert f"Layer '{layer}' of the student" in str(e.value)
    return str(e.value)


def trains(build, layer, x):
    """Whether a pair of that layer gives the student a gradient."""
    student = build(4)
    distiller = Distiller(student, build(6), {layer: layer}, example=x)
    args, kwargs = ((), x) if isinstance(x, dict) else ((x,), {})
    student(*args, **kwargs)
    distiller(*args, **kwargs).backward()
    return any(p.grad is not None and p.grad.any() for p in student.parameters())


X = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("inner", "layer"), [(Loop, "block"), (Twice, "blocks.0"), (Loop, "block.0")]
)
def test_the_layers_around_it_are_told(inner, layer):
    def build(width):
        return Inside(width, inner)

    message = told(build, f"body.{layer}", X)
    around = re.search(r"a layer around it that does, (.*?); or", message)[1]
    assert around == ("'body.block' or 'body'" if layer == "block.0" else "'body'")
    assert trains(build, "body", X)
    notes = {row.name: row.note for row in list_layers(build(4), X)}
    assert "list_layers(student, example)" in message
    assert notes["body"] == ""
    assert ("called 3 times" if inner is Loop else "called 2 times") in notes.values()


def test_of_a_model_without_a_layer_around_it_the_output_is_told():
    message = told(Loop, "block", X)
    assert 'Tap what runs once: what the student returns, ""; or an nn.Identity' in message
    assert trains(Loop, "", X)


def test_a_mark_for_each_call_is_told_and_can_be_tapped():
    message = told(Loop, "block", X)
    assert "self.marks = nn.ModuleList(nn.Identity() for _ in range(3)), write" in message
    assert "x = self.marks[i](x) after call i, tap 'marks.0' and so on" in message
    assert trains(Marked, "marks.0", X)
    assert trains(Marked, "marks.2", X)


@pytest.mark.parametrize(("layer", "other"), [("blocks.0", "blocks.1"), ("blocks.1", "blocks.0")])
def test_another_name_of_the_same_layer_is_told(layer, other):
    found = told(Twice, layer, X)
    assert f"'{layer}' of the student, which is '{other}' as well, was reached 2 times" in found


def albert(width, cls="AlbertModel", **options):
    transformers = pytest.importorskip("transformers")
    config = transformers.AlbertConfig(
        hidden_size=width,
        embedding_size=4,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=width,
        vocab_size=30,
        **options,
    )
    return getattr(transformers, cls)(config)


@pytest.mark.parametrize(
    ("cls", "base"), [("AlbertModel", ""), ("AlbertForSequenceClassification", "albert.")]
)
def test_what_is_told_of_albert_can_be_tapped(cls, base):
    batch = {"input_ids": torch.arange(12).view(2, 6), "attention_mask": torch.ones(2, 6)}

    def build(width):
        return albert(width, cls)

    message = told(build, f"{base}encoder.albert_layer_groups.0", batch)
    around = f"'{base}encoder'" + (" or 'albert'" if base else "")
    assert f"a layer around it that does, {around}; or hidden states" in message
    assert "with student.config.output_hidden_states = True set before" in message
    assert trains(build, f"{base}encoder", batch)

    def with_states(width):
        return albert(width, cls, output_hidden_states=True)

    (layer,) = re.findall(r"'(\[.*?\])'", message)
    assert trains(with_states, layer, batch)

"""Layers that return more than a tensor: what is in there is named as in the code."""

from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from vid_loss import Distiller, list_layers


@dataclass
class Out:
    logits: Tensor
    features: Tensor
    note: str = ""


class Kept:
    """A class of one's own, in which nothing can be looked for."""

    def __init__(self, features):
        self.features = features


Named = namedtuple("Named", "logits features")  # as users write it

MAKERS = {
    "dataclass": lambda logits, features: Out(logits, features),
    "named tuple": lambda logits, features: Named(logits, features),
    "dict": lambda logits, features: {"logits": logits, "features": features},
}


class Net(nn.Module):
    def __init__(self, width, make):
        super().__init__()
        self.body, self.make = nn.Linear(4, width), make

    def forward(self, x):
        features = self.body(x)
        return self.make(features.sum(1, keepdim=True), features)


class Whole(nn.Sequential):
    """So that the layer with such an output is inside."""

    def forward(self, x):
        return self[0](x)


def loss_of(make, layer):
    torch.manual_seed(0)
    student, teacher = Whole(Net(5, make)), Whole(Net(7, make))
    x = torch.randn(6, 4)
    distiller = Distiller(student, teacher, {layer: layer}, example=x)
    student(x)
    return distiller(x).item()


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_an_entry_is_taken_by_its_name(make):
    assert loss_of(make, '0["features"]') == loss_of(make, "0.body")


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_an_output_of_several_is_described_by_what_can_be_typed(make):
    with pytest.raises(TypeError, match=r"Choose one of 0\[") as caught:
        loss_of(make, "0")
    spec = str(caught.value).split("Choose one of ")[1].split(" (")[0]
    assert loss_of(make, spec) == loss_of(make, '0["logits"]')


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_the_table_of_layers_has_the_entries_as_they_are_typed(make):
    names = [layer.name for layer in list_layers(Whole(Net(5, make)), torch.randn(2, 4))]
    entries = [name for name in names if name.startswith("0[")]
    losses = [loss_of(make, name) for name in entries]
    assert losses == [loss_of(make, '0["logits"]'), loss_of(make, "0.body")]


def test_what_cannot_be_looked_into_is_no_feature():
    with pytest.raises(TypeError, match=r"got Kept without a tensor in it\. Tap another layer"):
        loss_of(lambda logits, features: Kept(features), "0")

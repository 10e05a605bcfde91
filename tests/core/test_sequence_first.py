"""Models whose own inputs are (L, N, C): noticed, and right once their features are turned."""

import pytest
import torch
from torch import nn

from vid_loss import Distiller, Pair

SWAP = {f"{owner}_transform": lambda x: x.transpose(0, 1) for owner in ("student", "teacher")}


class Recurrent(nn.Module):
    """nn.LSTM as torch builds it, which knows nothing of what comes later."""

    def __init__(self, width, batch_first):
        super().__init__()
        self.layer = nn.LSTM(5, width, batch_first=batch_first)
        self.mean = 1 if batch_first else 0

    def forward(self, x):
        return self.layer(x)[0].mean(self.mean)


class Attentive(nn.Module):
    """A transformer's layer, and padding (N, L) as torch wants it in both orders."""

    def __init__(self, width, batch_first):
        super().__init__()
        self.embed = nn.Linear(5, width)
        self.layer = nn.TransformerEncoderLayer(width, 1, width, 0.0, batch_first=batch_first)

    def forward(self, x, padding=None):
        return self.layer(self.embed(x), src_key_padding_mask=padding)


class Words(nn.Module):
    """Identifiers (L, N), as language models of old."""

    def __init__(self, width, batch_first):
        super().__init__()
        self.embed = nn.Embedding(9, width)
        self.layer = nn.GRU(width, width, bidirectional=True, batch_first=batch_first)

    def forward(self, ids):
        return self.layer(self.embed(ids))[0]


def pair_of(kind, batch_first):
    torch.manual_seed(0)
    return kind(4, batch_first), kind(6, batch_first)


def example(kind, samples, length):
    """Batch first."""
    generator = torch.Generator().manual_seed(1)
    if kind is Words:
        return torch.randint(9, (samples, length), generator=generator)
    return torch.randn(samples, length, 5, generator=generator)


LAYER = {Recurrent: "layer[0]", Attentive: "layer", Words: "layer[0]"}
kinds = pytest.mark.parametrize("kind", LAYER)


@pytest.mark.parametrize("size", [(4, 9), (6, 6), (2, 7), (1, 5)])
@kinds
def test_features_of_sequence_first_inputs_are_named_with_what_turns_them(kind, size):
    layer, x = LAYER[kind], example(kind, *size).transpose(0, 1)
    message = r"student feature: expected the batch as its first .* is dimension 1. Move it: stu"
    with pytest.raises(ValueError, match=message):
        Distiller(*pair_of(kind, False), [Pair(layer, layer)], example=x)
    Distiller(*pair_of(kind, False), [Pair(layer, layer, **SWAP)], example=x)


@pytest.mark.parametrize("size", [(4, 9), (6, 6), (2, 7), (1, 5), (3, 1)])
@kinds
def test_the_same_models_with_the_batch_first_are_left_alone(kind, size):
    layer, x = LAYER[kind], example(kind, *size)
    Distiller(*pair_of(kind, True), [Pair(layer, layer)], example=x)


@pytest.mark.parametrize("length", [9, 4])
def test_turned_features_and_a_mask_give_what_the_batch_first_model_gives(length):
    x = example(Attentive, 4, length)
    mask = torch.ones(4, length, dtype=torch.bool)
    mask[0, length // 2 :] = mask[2, 1:] = False
    pair = {"mask": lambda x, padding: ~padding, "name": "pair"}
    values = []
    for batch_first in (True, False):
        student, teacher = pair_of(Attentive, batch_first)
        given = {"x": x if batch_first else x.transpose(0, 1), "padding": ~mask}
        turned = {} if batch_first else SWAP
        torch.manual_seed(2)
        pairs = [Pair("layer", "layer", **pair, **turned)]
        distiller = Distiller(student, teacher, pairs, example=given)
        student(**given)
        loss = distiller(**given)
        loss.backward()
        values.append([loss, student.embed.weight.grad])
    torch.testing.assert_close(*values)


def test_the_last_states_beside_sequence_first_inputs_have_their_layers_first():
    x = torch.randn(7, 3, 5)

    def deep():
        model = Recurrent(4, False)
        model.layer = nn.LSTM(5, 4, num_layers=2)
        return model

    with pytest.raises(ValueError, match=r"'layer\[1\]\[0\]', student feature: .*is dimension 1"):
        Distiller(deep(), deep(), {"layer[1][0]": "layer[1][0]"}, example=x)
    last = {f"{owner}_transform": lambda h: h[-1] for owner in ("student", "teacher")}
    Distiller(deep(), deep(), [Pair("layer[1][0]", "layer[1][0]", **last)], example=x)


def test_a_model_that_mixes_its_samples_is_believed():
    class Mixed(Recurrent):
        def forward(self, x):
            return super().forward(x - x.mean((0, 1)))

    torch.manual_seed(0)
    models = Mixed(4, False), Mixed(6, False)
    Distiller(*models, {"layer[0]": "layer[0]"}, example=torch.randn(6, 4, 5))

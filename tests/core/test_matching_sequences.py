"""Signals, recurrent layers and tokens, and what of them is not chosen."""

from functools import partial

import pytest
import torch
from _matching import IMAGES, bert, names, resnet, train_two_steps
from torch import nn

from vid_loss import Distiller, match_layers

pytestmark = pytest.mark.usefixtures("seed")


class SignalNet(nn.Module):
    """Convolutions over time; the features are (N, C, L)."""

    def __init__(self, width, blocks):
        super().__init__()
        self.stem = nn.Conv1d(2, width, 5, 2, 2)
        self.stages = nn.Sequential(
            *(
                nn.Sequential(nn.Conv1d(width, width, 3, stride, 1), nn.BatchNorm1d(width))
                for stride in (1, 2, 2)
                for _ in range(blocks)
            )
        )
        self.fc = nn.Linear(width, 3)

    def forward(self, x):
        return self.fc(self.stages(self.stem(x).relu()).mean(2))


@pytest.mark.parametrize("widths", [(8, 16), (16, 16), (20, 20)])  # at 20, C is also a length
def test_signals_are_paired_with_their_channels_second(widths):
    student, teacher = SignalNet(widths[0], 1), SignalNet(widths[1], 2)
    signals = torch.randn(4, 2, 40)
    pairs = match_layers(student, teacher, signals)
    assert len(pairs) > 1
    assert {pair.channel_dim for pair in pairs} == {(1, 1)}
    distiller = Distiller(student, teacher, pairs, example=signals)
    assert all(loss.teacher_channels == widths[1] for loss in distiller.losses.values())
    train_two_steps(student, teacher, pairs, signals)


NORMS = [nn.BatchNorm1d, nn.SyncBatchNorm, nn.InstanceNorm1d, partial(nn.GroupNorm, 2)]


@pytest.mark.parametrize("norm", NORMS)
def test_what_the_matcher_calls_a_signal_is_one_to_the_distiller(norm):
    student, teacher = (
        nn.Sequential(
            *(
                nn.Sequential(nn.Conv1d(i, o, 3, 2, 1), norm(o))
                for i, o in ((1, c), (c, c), (c, 2 * c))
            )
        )
        for c in (4, 8)
    )
    signals = torch.randn(2, 1, 64)
    pairs = match_layers(student, teacher, signals)
    assert {pair.channel_dim for pair in pairs} == {(1, 1)}
    with pytest.raises(ValueError, match="channel_dim=1"):
        Distiller(student, teacher, {"1": "1"}, example=signals)
    Distiller(student, teacher, pairs, example=signals)


class Recurrent(nn.Module):
    """Two layers over (L, N, C); its last state is (2, N, C)."""

    def __init__(self, width):
        super().__init__()
        self.rnn = nn.GRU(2, width, num_layers=2)
        self.fc = nn.Linear(width, 3)

    def forward(self, x):
        return self.fc(self.rnn(x.transpose(0, 1))[0][-1])


@pytest.mark.parametrize("batch", [1, 2])
def test_the_state_of_a_recurrent_layer_is_not_taken_for_tokens(batch):
    student, teacher, x = Recurrent(4), Recurrent(8), torch.randn(batch, 5, 2)
    pairs = match_layers(student, teacher, x)
    assert names(pairs) == {"fc:input": "fc"}
    Distiller(student, teacher, pairs, example=x)


class SequenceFirst(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.project = nn.Linear(5, width)
        layer = nn.TransformerEncoderLayer(width, 2, width)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.fc = nn.Linear(width, 3)

    def forward(self, x):
        return self.fc(self.encoder(self.project(x).transpose(0, 1)).mean(0))


def test_tokens_whose_batch_is_not_first_are_not_chosen():
    x = torch.randn(1, 9, 5)
    pairs = match_layers(SequenceFirst(4), SequenceFirst(8), x)
    assert not any("encoder" in pair.student for pair in pairs)
    Distiller(SequenceFirst(4), SequenceFirst(8), pairs, example=x)


def test_tokens_of_other_lengths_do_not_fit_and_are_not_chosen():
    student, teacher = bert(2, 8), bert(3, 16)
    text = {"input_ids": torch.arange(12).view(2, 6), "attention_mask": torch.ones(2, 6)}

    def shorter(input_ids, attention_mask):
        return {"input_ids": input_ids[:, :4], "attention_mask": attention_mask[:, :4]}

    pairs = match_layers(student, teacher, text, teacher_inputs=shorter)
    assert [pair.student for pair in pairs] == ["classifier:input"]
    Distiller(student, teacher, pairs, example=text, teacher_inputs=shorter)


def test_stages_of_another_batch_do_not_fit_and_are_not_chosen():
    def two_views(images):
        return torch.cat([images, images.flip(3)])

    with pytest.raises(ValueError, match="fit together; got none"):
        match_layers(resnet(18), resnet(34), IMAGES, teacher_inputs=two_views)

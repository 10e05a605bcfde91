"""Which dimension is the batch, and which the channels: known from the example, or asked for."""

import pytest
import torch
from _models import cnn_pair, images
from torch import nn

from vid_loss import Distiller, KDLoss, Pair, match_layers


class Encoder(nn.Module):
    """A transformer block that keeps its tokens first or second; (N, L, 5) in both cases."""

    def __init__(self, width, batch_first):
        super().__init__()
        self.batch_first = batch_first
        self.embed = nn.Linear(5, width)
        self.block = nn.TransformerEncoderLayer(width, 1, width, 0.0, batch_first=batch_first)
        self.rnn = nn.GRU(width, width, num_layers=3, batch_first=True)

    def forward(self, x):
        x = self.embed(x)
        x = self.block(x) if self.batch_first else self.block(x.transpose(0, 1)).transpose(0, 1)
        return self.rnn(x)[0].mean(1)


class Signals(nn.Module):
    def __init__(self, width, *after):
        super().__init__()
        self.conv = nn.Conv1d(2, width, 5, 2, 2)
        self.block = nn.Sequential(nn.Conv1d(width, width, 3, 1, 1), *after)
        self.act = nn.ReLU()
        self.fc = nn.Linear(width, 3)

    def forward(self, x):
        return self.fc(self.act(self.block(self.conv(x))).mean(2))


def swapped(x):
    return x.transpose(0, 1)


def encoders(student_first, teacher_first):
    torch.manual_seed(0)
    return Encoder(4, student_first), Encoder(6, teacher_first)


def built(models, pair, *shape):
    return Distiller(*models, [pair], example=torch.randn(shape))


# Four samples of 9 tokens; as many tokens as samples; one sample; one token; one of one.
SIZES = [(4, 9), (6, 6), (1, 5), (4, 1), (1, 1)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("wrong", ["student", "teacher", "both"])
def test_a_batch_that_is_not_first_is_named_with_what_moves_it(wrong, size):
    models = encoders(wrong == "teacher", wrong == "student")
    owner = "teacher" if wrong == "teacher" else "student"
    message = rf"{owner} feature: expected the batch as its first .*{owner}_transform=lambda x: x"
    with pytest.raises(ValueError, match=message):
        built(models, Pair("block", "block"), *size, 5)
    swap = {f"{x}_transform": swapped for x in ("student", "teacher") if wrong in (x, "both")}
    built(models, Pair("block", "block", **swap), *size, 5)
    # And one that was moved away from its place is noticed as well.
    with pytest.raises(ValueError, match="expected the batch as its first dimension"):
        built(encoders(True, True), Pair("block", "block", student_transform=swapped), *size, 5)


@pytest.mark.parametrize("size", SIZES)
def test_a_batch_that_is_first_is_right_at_any_size(size):
    built(encoders(True, True), Pair("block", "block"), *size, 5)


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_the_last_states_of_a_recurrent_network_have_their_layers_first(batch):
    models = encoders(True, True)
    with pytest.raises(ValueError, match=r"'rnn\[1\]', student feature: .*it is dimension 1"):
        built(models, Pair("rnn[1]", "rnn[1]"), batch, 7, 5)
    last = {"student_transform": lambda h: h[-1], "teacher_transform": lambda h: h[-1]}
    built(models, Pair("rnn[1]", "rnn[1]", **last), batch, 7, 5)


class Windows(nn.Module):
    """Folds windows into the batch, as Swin does: not first in size, and yet right."""

    def __init__(self, width):
        super().__init__()
        self.layer = nn.Linear(1, width)

    def forward(self, x):
        return self.layer(x.view(-1, 4, 1)).view(len(x), -1).mean(1)


def test_windows_in_the_batch_are_a_batch():
    torch.manual_seed(0)
    built((Windows(4), Windows(6)), Pair("layer", "layer"), 4, 16)


def test_a_model_that_takes_no_other_batch_is_believed():
    student, teacher = encoders(True, True)

    def refuse(_, args):
        if len(args[0]) != 6:
            raise RuntimeError("six, please")

    student.register_forward_pre_hook(refuse)
    built((student, teacher), Pair("block", "block"), 6, 6, 5)


def test_a_keyword_batch_is_measured_too():
    student, teacher = encoders(False, True)
    example = {"x": torch.randn(6, 6, 5)}
    with pytest.raises(ValueError, match="student feature: expected the batch as its first"):
        Distiller(student, teacher, {"block": "block"}, example=example)


SIGNALS = {
    "a convolution": ("conv", ()),
    "its norm": ("block", (nn.BatchNorm1d(8),)),
    "what goes into it": ("block:input", ()),
    "an activation": ("act", ()),
    "a block with a norm of its own": ("block", (nn.GroupNorm(2, 8), nn.Dropout(0.1))),
}


@pytest.mark.parametrize(("layer", "after"), SIGNALS.values(), ids=SIGNALS)
def test_a_signal_is_asked_for_its_channels(layer, after):
    torch.manual_seed(0)
    models = Signals(8, *after), Signals(8, *after)
    message = rf"Pair '{layer}' -> '{layer}', channel_dim: expected .* student's \(4, 8, 20\)"
    with pytest.raises(ValueError, match=message):
        built(models, Pair(layer, layer), 4, 2, 40)
    distiller = built(models, Pair(layer, layer, channel_dim=1), 4, 2, 40)
    assert distiller.losses[f"{layer}->{layer}"].teacher_channels == 8
    x = torch.randn(4, 2, 60)  # and another length is the same pair
    models[0](x)
    assert distiller(x).isfinite()
    tokens = built(models, Pair(layer, layer, channel_dim=-1), 4, 2, 40)  # whoever insists
    assert tokens.losses[f"{layer}->{layer}"].teacher_channels == 20


def test_what_is_matched_says_where_its_channels_are():
    torch.manual_seed(0)
    models = Signals(8), Signals(8, nn.BatchNorm1d(8))
    x = torch.randn(4, 2, 40)
    pairs = match_layers(*models, x)
    distiller = Distiller(*models, pairs, example=x)
    assert {loss.teacher_channels for loss in distiller.losses.values()} == {8}


class Sandwich(nn.Module):
    """Tokens between convolutions of signals, with an Identity that tells nothing of itself."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv1d(2, width, 4, 4)
        self.signal = nn.Identity()
        self.tokens = nn.Identity()
        self.mixed = nn.ModuleList([nn.Linear(width, width), nn.Conv1d(width, width, 1)])

    def forward(self, x):
        x = self.signal(self.conv(x))
        return self.tokens(x.mT).mean(1)


def test_of_a_layer_that_tells_nothing_shorter_samples_do():
    torch.manual_seed(0)
    models = Sandwich(8), Sandwich(8)
    built(models, Pair("tokens", "tokens"), 4, 2, 32)
    with pytest.raises(ValueError, match=r"channel_dim: .* it looks like a signal \(N, C, L\)"):
        built(models, Pair("signal", "signal"), 4, 2, 32)


def runs(models, pairs, *shape):
    """How often each model has run to build a distiller."""
    counts = [0, 0]
    for i, model in enumerate(models):
        model.register_forward_pre_hook(lambda *_, i=i: counts.__setitem__(i, counts[i] + 1))
    Distiller(*models, pairs, example=torch.randn(shape))
    return counts


def test_a_model_runs_as_often_as_there_is_something_to_find_out():
    block = {"block": "block"}
    # Whether the batch is where a layer of (L, N, C) has it; and what tells of equal sizes.
    swap = Pair("block", "block", student_transform=swapped)
    assert runs(encoders(True, True), block, 4, 9, 5) == [1, 1]
    assert runs(encoders(True, True), block, 6, 6, 5) == [2, 2]
    assert runs(encoders(False, True), [swap], 6, 6, 5) == [3, 2]
    torch.manual_seed(0)
    several = [Pair(x, x, name=f"{x}{i}") for x in ("tokens",) for i in range(4)]
    assert runs((Sandwich(8), Sandwich(8)), several, 4, 2, 32) == [2, 2]


def test_maps_and_vectors_of_any_size_are_left_alone():
    student, teacher = cnn_pair()
    for batch in (1, 4, 8):  # 4 and 8 are numbers of channels, and 8 of rows
        pairs = [Pair("stage1", "stage1"), Pair("fc", "fc", loss=KDLoss())]
        Distiller(student, teacher, pairs, example=images(batch))

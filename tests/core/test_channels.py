"""Where the channels of maps and volumes are: told by layers and sides, or asked for."""

import re

import pytest
import torch
from torch import nn

from vid_loss import Distiller, Pair

# Some of these models have nothing to train before the layer, and that is said.
pytestmark = pytest.mark.filterwarnings("ignore:Distiller. expected student features that come")


class Second(nn.LayerNorm):
    """A norm over the second dimension, as many models have one, of a class that has the last."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Moved(nn.Module):
    def __init__(self, dims):
        super().__init__()
        self.dims = dims

    def forward(self, x):
        return x.permute(self.dims)


LAST, FIRST = Moved((0, 2, 3, 1)), Moved((0, 3, 1, 2))


class Net(nn.Module):
    """One layer between what makes its input and what takes the mean of its output."""

    def __init__(self, layer, before=None):
        super().__init__()
        self.before = nn.Identity() if before is None else before
        self.layer = layer
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.layer(self.before(x)).flatten(1).mean(1) * self.scale


def block(width):
    """ConvNeXt's: channels last inside, second outside."""
    return nn.Sequential(
        nn.Conv2d(width, width, 3, padding=1),
        LAST,
        nn.LayerNorm(width),
        nn.Linear(width, 4 * width),
    )


def build(layer, *shape, before=None, pair=None):
    torch.manual_seed(0)
    student, teacher = Net(layer, before), Net(layer, before)
    pair = Pair("layer", "layer") if pair is None else pair
    x = torch.randn(shape)
    distiller = Distiller(student, teacher, [pair], example=x)
    student(x)
    distiller(x).backward()
    distiller.close()
    return distiller.losses[pair.label].teacher_channels


# A layer, the shape of the input, and how many channels it has.
CHANNELS_LAST = {
    "square": (block(4), (2, 4, 6, 6), 16),
    "wide": (block(4), (2, 4, 6, 10), 16),
    "tall, and other strides": (nn.Sequential(nn.Conv2d(3, 9, 2, 2), LAST), (2, 3, 20, 8), 9),
    "a linear layer whose width is that of the map": (nn.Linear(5, 8), (2, 8, 8, 5), 8),
    "a norm": (nn.LayerNorm(5), (2, 7, 9, 5), 5),
    "of series with several variables": (
        nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.LayerNorm(16)),
        (2, 3, 4, 6),
        16,
    ),
    "and more variables than channels": (nn.Linear(6, 8), (2, 24, 12, 6), 8),
    "a volume": (nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 12)), (2, 3, 6, 8, 5), 12),
    "a permutation": (LAST, (2, 3, 20, 12), 3),
}
CHANNELS_SECOND = {
    "as many as rows, in a wide map": (nn.Conv2d(3, 8, 1), (2, 3, 8, 12), 8),
    "and its norm": (nn.BatchNorm2d(8), (2, 8, 8, 12), 8),
    "a block with as many": (
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.BatchNorm2d(8)),
        (2, 3, 8, 12),
        8,
    ),
    "an activation of as many": (nn.ReLU(), (2, 8, 8, 12), 8),
    "channels last inside": (nn.Sequential(block(4), FIRST), (2, 4, 6, 10), 16),
    "channels last inside, one size": (nn.Sequential(block(2), FIRST), (2, 2, 8, 8), 8),
    "a norm that moves them": (Second(8), (2, 8, 8, 12), 8),
    "more pixels out of channels": (
        nn.Sequential(nn.Conv2d(3, 36, 1), nn.PixelShuffle(2)),
        (2, 3, 18, 18),
        9,
    ),
    "larger than the image": (
        nn.Sequential(nn.Conv2d(3, 32, 1), nn.PixelShuffle(2)),
        (2, 3, 16, 16),
        8,
    ),
    "joined": (nn.Sequential(nn.Conv2d(3, 16, 1), nn.Upsample(scale_factor=2)), (2, 3, 8, 8), 16),
    "a single position": (nn.AdaptiveAvgPool2d(1), (2, 3, 8, 12), 3),
    "a volume": (nn.Conv3d(2, 6, 1), (2, 2, 4, 6, 6), 6),
    "a volume's block": (nn.Sequential(nn.Conv3d(2, 6, 1), nn.ReLU()), (2, 2, 6, 6, 8), 6),
}


@pytest.mark.parametrize(("layer", "shape", "channels"), CHANNELS_LAST.values(), ids=CHANNELS_LAST)
def test_a_map_whose_channels_are_last_is_asked_for_them(layer, shape, channels):
    with pytest.raises(ValueError, match=r"looks like channels last.*Pass channel_dim=-1 for") as e:
        build(layer, *shape)
    assert "channel_dim=1 for channels second, (N, C, ...)." in str(e.value)
    assert not re.search("[HWDTVL],", str(e.value))  # it may be a map, a volume or a series
    assert build(layer, *shape, pair=Pair("layer", "layer", channel_dim=-1)) == channels
    build(layer, *shape, pair=Pair("layer", "layer", channel_dim=1))  # whoever insists


@pytest.mark.parametrize(
    ("layer", "shape", "channels"), CHANNELS_SECOND.values(), ids=CHANNELS_SECOND
)
def test_a_map_whose_channels_are_second_is_taken(layer, shape, channels):
    assert build(layer, *shape) == channels


def test_what_goes_into_a_layer_is_asked_for_by_its_own_width():
    pair = Pair("layer:input", "layer:input")
    with pytest.raises(ValueError, match=r"\(2, 6, 10, 4\) are: it looks like channels last"):
        build(nn.Linear(4, 6), 2, 6, 10, 4, pair=pair)
    assert build(nn.Sequential(nn.Conv2d(4, 10, 1)), 2, 4, 6, 10, pair=pair) == 4


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_transform_or_features_from_elsewhere_are_known_by_their_sides_alone(side):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 7, 7)
    nets, first = (Net(nn.Conv2d(5, 6, 1)), Net(nn.Conv2d(5, 6, 1))), Moved((0, 2, 3, 1))
    pair = Pair("layer", "layer", **{f"{side}_transform": first})
    with pytest.raises(ValueError, match=rf"{side}'s \(2, 7, 7, 6\) are: it looks like"):
        Distiller(*nets, [pair], example=x)
    with pytest.raises(ValueError, match=r"teacher's \(2, 7, 7, 96\) are: it looks like"):
        Distiller(
            nets[0],
            None,
            {"layer": "layer"},
            example=x,
            teacher_features={"layer": torch.randn(2, 7, 7, 96)},
        )


def test_one_of_many_resolutions_may_look_like_that_in_training():
    torch.manual_seed(0)
    student, teacher = Net(nn.Sequential(nn.Conv2d(3, 7, 1))), Net(nn.Conv2d(3, 7, 1))
    distiller = Distiller(student, teacher, {"layer": "layer"}, example=torch.randn(2, 3, 5, 9))
    x = torch.randn(2, 3, 7, 7)
    student(x)
    assert distiller(x).isfinite()

import pytest
import torch
from _cache import Plain, ask, tokens
from torch import nn

from vid_loss.cache import FeatureCache


@pytest.mark.parametrize(
    ("value", "where"),
    [
        (1e6, slice(None)),
        (1e-9, slice(None)),
        (1e-9, slice(0, 1)),
    ],
    ids=["overflow", "underflow", "underflow of one channel"],
)
@pytest.mark.parametrize("tokenwise", [False, True])
def test_a_feature_that_float16_cannot_hold_is_refused(tmp_path, value, where, tokenwise):
    teacher = Plain()
    teacher.body = Channels(value, where)
    x = tokens() if tokenwise else tokens()[:, 0]
    cache = FeatureCache(tmp_path)
    with pytest.raises(ValueError, match=r"layer 'body' .*float16 can hold; got .*float32"):
        ask(cache, teacher, x, range(4))
    cache.flush()
    assert list(tmp_path.iterdir()) == []
    exact = FeatureCache(tmp_path, dtype=torch.float32)
    assert torch.equal(ask(exact, teacher, x, range(4)), teacher(x))


class Channels(nn.Identity):
    def __init__(self, value, where):
        super().__init__()
        self.value, self.where = value, where

    def forward(self, x):
        x = x.clone()
        x[..., self.where] = self.value * (1 + x[..., self.where].abs())
        return x


def test_small_values_in_a_channel_that_has_others_are_kept(tmp_path):
    """As behind a GELU, whose tails come to nothing."""
    teacher = Plain()
    teacher.body = nn.Sequential(nn.Hardtanh(-1, 1), nn.GELU())
    teacher.out.weight.data *= 100
    ask(FeatureCache(tmp_path), teacher, tokens(), range(4))

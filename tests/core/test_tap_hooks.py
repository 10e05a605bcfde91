"""What a tap leaves behind: hooks, copies, pickles, and layers that run again."""

import copy
import gc
import io

import pytest
import torch
from _asserts import hook_count
from _models import TinyCNN, images
from torch import nn
from torch.utils.checkpoint import checkpoint

from vid_loss import FeatureTap


def test_the_last_forward_counts():
    model = TinyCNN(4)
    with FeatureTap(model, ["fc"], record="training") as tap:
        model(images(8))
        output = model(images(3))
        assert tap.collect()["fc"] is output


def test_a_tap_may_record_the_forwards_that_it_makes_alone():
    model = TinyCNN(4)
    tap = FeatureTap(model, ["fc"], record="read")
    expected = model(images())
    with pytest.raises(RuntimeError, match="has not run forward"):
        tap.collect()
    torch.testing.assert_close(tap.read(images())["fc"], expected)


def test_close_removes_every_hook_and_may_be_repeated():
    model = TinyCNN(4)
    with FeatureTap(model, ["stage1", "fc:input", ""]) as tap:
        assert hook_count(model) > 0
    assert hook_count(model) == 0
    assert tap.closed
    tap.close()
    with pytest.raises(RuntimeError, match="tap is closed"):
        tap.collect()


def test_close_leaves_the_hooks_of_others_alone():
    model = TinyCNN(4)
    calls = []
    model.fc.register_forward_hook(lambda *_: calls.append(1))
    FeatureTap(model, ["fc"]).close()
    model(images())
    assert calls == [1]


def test_nothing_is_left_behind_when_the_body_raises():
    model = TinyCNN(4)
    with pytest.raises(ZeroDivisionError, match="body"), FeatureTap(model, ["fc"]):
        raise ZeroDivisionError("body")
    assert hook_count(model) == 0


def test_a_forward_that_raises_leaves_no_feature():
    model = TinyCNN(4)
    tap = FeatureTap(model, ["stage1"])
    model.fc = nn.Linear(1, 1)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        model(images())
    assert not tap._recorder.last.captures
    assert not tap._recorder.last.armed
    with pytest.raises(RuntimeError, match="has not run forward"):
        tap.collect()


def test_a_dropped_tap_takes_its_hooks_along():
    model = TinyCNN(4)
    tap = FeatureTap(model, ["fc"])
    del tap
    gc.collect()
    assert hook_count(model) == 0


def test_a_copy_of_the_model_writes_nowhere():
    model = TinyCNN(4)
    tap = FeatureTap(model, ["fc"])
    output = model(images())
    copied = copy.deepcopy(model)
    copied(images(2))
    assert tap.collect()["fc"] is output
    copied(images(2))
    with pytest.raises(RuntimeError, match="has not run forward"):
        tap.collect()


def test_a_pickled_model_is_a_plain_model():
    model = TinyCNN(4)
    tap = FeatureTap(model, ["fc", "stage1:input"])
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    torch.testing.assert_close(loaded.eval()(images()), model.eval()(images()))
    tap.close()


def test_a_copy_of_a_tap_taps_the_copied_model():
    model = TinyCNN(4)
    tap = FeatureTap(model, ["fc"], record="training")
    twin = copy.deepcopy({"model": model, "tap": tap})
    output = twin["model"](images())
    assert twin["tap"].collect()["fc"] is output


def test_wrappers_are_looked_through():
    model = TinyCNN(4)
    with FeatureTap(torch.compile(model, backend="eager"), ["fc"]) as tap:
        assert tap.model is model


class Checkpointed(nn.Module):
    """A middle that is recomputed in backward."""

    def __init__(self, use_reentrant):
        super().__init__()
        self.first = nn.Linear(2, 4)
        self.middle = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        self.use_reentrant = use_reentrant

    def forward(self, x):
        return checkpoint(self.middle, self.first(x), use_reentrant=self.use_reentrant)


def test_checkpointing_without_reentry_gives_the_same_gradients():
    torch.manual_seed(0)
    model = Checkpointed(use_reentrant=False)
    tap = FeatureTap(model, ["middle.0"], record="training")
    model(torch.ones(3, 2))
    feature = tap.collect()["middle.0"]
    (feature.square().sum()).backward()
    expected = torch.autograd.grad(
        model.middle[0](model.first(torch.ones(3, 2))).square().sum(), model.first.weight
    )[0]
    torch.testing.assert_close(model.first.weight.grad, expected)
    with pytest.raises(RuntimeError, match="has not run forward"):  # backward recorded nothing
        tap.collect()


def test_reentrant_checkpointing_in_the_middle_is_refused_and_at_its_end_is_fine():
    model = Checkpointed(use_reentrant=True)
    with FeatureTap(model, ["middle.0"], record="training") as tap:
        model(torch.ones(3, 2))
        with pytest.raises(RuntimeError, match=r"without its gradient.*use_reentrant=False"):
            tap.collect()
    with FeatureTap(model, [""], record="training") as tap:
        model(torch.ones(3, 2)).sum().backward()
        tap.collect()[""]


def test_frozen_lower_layers_are_legitimate():
    model = TinyCNN(4)
    model.stage1.requires_grad_(False)
    with FeatureTap(model, ["stage1"], record="training") as tap:
        model(images())
        assert not tap.collect()["stage1"].requires_grad


def test_recording_in_inference_mode():
    model = TinyCNN(4)
    with FeatureTap(model, ["fc"]) as tap, torch.inference_mode():
        model(images())
        assert tap.collect()["fc"].shape == (8, 3)

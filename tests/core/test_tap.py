import copy
import gc
import io
from collections import OrderedDict

import pytest
import torch
from _asserts import hook_count
from _models import TinyCNN, images
from torch import nn
from torch.utils.checkpoint import checkpoint

from vid_loss import FeatureTap
from vid_loss.taps._layers import LayerSpec


class Parts(nn.Module):
    """Returns whatever it is told to, around a linear layer."""

    def __init__(self, pack):
        super().__init__()
        self.inner = nn.Linear(2, 3)
        self.outer = _Pack(pack)

    def forward(self, x):
        return self.outer(self.inner(x))


class _Pack(nn.Module):
    def __init__(self, pack):
        super().__init__()
        self.pack = pack

    def forward(self, x):
        return self.pack(x)


def tap_once(model, layer, x=None):
    with FeatureTap(model, [layer]) as tap:
        model(torch.ones(4, 2) if x is None else x)
        return tap.collect()[layer]


@pytest.mark.parametrize(
    ("text", "name", "of_input", "entries"),
    [
        ("layer4", "layer4", False, ()),
        ("blocks.3.mlp", "blocks.3.mlp", False, ()),
        ("fc:input", "fc", True, ()),
        ("encoder[1]", "encoder", False, (1,)),
        ("encoder[-1]", "encoder", False, (-1,)),
        ('encoder["hidden"]', "encoder", False, ("hidden",)),
        ("encoder['hidden']", "encoder", False, ("hidden",)),
        ('head:input["x"]', "head", True, ("x",)),
        ("", "", False, ()),
        ('["logits"]', "", False, ("logits",)),
        ('["hidden_states"][2]', "", False, ("hidden_states", 2)),
    ],
)
def test_layer_specs_are_read(text, name, of_input, entries):
    assert LayerSpec.parse(text) == LayerSpec(text, name, of_input, entries)


@pytest.mark.parametrize("text", ["fc:output", "fc[", "fc[a]", "fc:input:input"])
def test_other_layer_specs_are_refused(text):
    with pytest.raises(ValueError, match=r"expected 'name', 'name:input'"):
        LayerSpec.parse(text)


def test_a_layer_is_named_not_given():
    with pytest.raises(TypeError, match="expected a module's name; got Linear"):
        FeatureTap(nn.Linear(2, 2), [nn.Linear(2, 2)])


def test_reads_outputs_inputs_and_the_model_itself():
    model = TinyCNN(4)
    with FeatureTap(model, ["stage1", "fc:input", "fc", "", ":input"]) as tap:
        output = model(images())
        features = tap.collect()
    assert features["stage1"].shape == (8, 4, 8, 8)
    torch.testing.assert_close(model.fc(features["fc:input"]), output)
    assert features["fc"] is output
    assert features[""] is output
    assert torch.equal(features[":input"], images())


@pytest.mark.parametrize(
    ("pack", "layer"),
    [
        (lambda x: (x, x + 1), "outer[0]"),
        (lambda x: [x + 1, x], "outer[-1]"),
        (lambda x: OrderedDict(hidden=x, other=x + 1), 'outer["hidden"]'),
        (lambda x: (x,), "outer"),
        (lambda x: (x, None), "outer"),
        (lambda x: {"hidden": x, "loss": None}, "outer"),
        (lambda x: {"states": (x + 1, x)}, 'outer["states"][1]'),
    ],
)
def test_picks_an_entry_and_needs_no_index_for_a_single_tensor(pack, layer):
    model = Parts(pack)
    torch.testing.assert_close(tap_once(model, layer), model.inner(torch.ones(4, 2)))


@pytest.mark.parametrize(
    ("pack", "layer", "message"),
    [
        (
            lambda x: (x, x),
            "outer",
            r"got tuple. Choose one of outer\[0\] \(4, 3\), outer\[1\]",
        ),
        (lambda x: {"a": x, "b": x}, "outer", r"Choose one of outer\[\"a\"\] \(4, 3\)"),
        (lambda x: (x, x), "outer[2]", r"expected an entry 2; got tuple. Choose"),
        (lambda x: (x, x), 'outer["a"]', r"expected an entry 'a'; got tuple. Choose"),
        (lambda x: (x, (x, x)), "outer[1]", r"got tuple. Choose one of outer\[1\]\[0\] \(4, 3\)"),
        (lambda x: ((x, x), (x, x)), "outer", r"outer\[0\] \.\.\., outer\[1\] \.\.\."),
        (lambda x: x, "outer[0]", r"got a tensor of shape \(4, 3\). Drop the index."),
        (lambda x: "text", "outer", "got str without a tensor in it. Tap another layer"),
    ],
)
def test_says_what_a_layer_returned_instead_of_one_tensor(pack, layer, message):
    model = Parts(pack)
    with pytest.raises(TypeError, match=message):
        tap_once(model, layer)
    assert hook_count(model) == 0


def test_reads_inputs_given_by_position_or_by_name():
    class Two(nn.Module):
        def forward(self, a, b):
            return a + b

    class Caller(nn.Module):
        def __init__(self):
            super().__init__()
            self.two = Two()

        def forward(self, x):
            return self.two(x, b=x + 1) if self.training else self.two(a=x, b=x + 1)

    model, x = Caller(), torch.ones(4, 2)
    assert torch.equal(tap_once(model, "two:input", x), x)
    assert torch.equal(tap_once(model, "two:input[0]", x), x)
    assert torch.equal(tap_once(model, 'two:input["b"]', x), x + 1)
    with pytest.raises(TypeError, match=r'Choose one of two:input\["a"\]'):
        tap_once(model.eval(), "two:input", x)


def test_unknown_layer_lists_the_closest_names():
    with pytest.raises(ValueError, match=r"'stagr2' of the model.*closest are 'stage2'"):
        FeatureTap(TinyCNN(4), ["stagr2"])
    nested = nn.ModuleDict({"backbone": TinyCNN(4)})
    with pytest.raises(ValueError, match=r"closest are 'backbone.stage2'"):
        FeatureTap(nested, ["stage2"])
    assert hook_count(nested) == 0


def test_collect_says_that_no_forward_was_recorded():
    model = TinyCNN(4)
    tap = FeatureTap(model, ["fc"], record="training", owner="student")
    message = "student has not run forward in train mode with gradients on"
    with pytest.raises(RuntimeError, match=message):
        tap.collect()
    model.eval()(images())
    with pytest.raises(RuntimeError, match=message):
        tap.collect()
    model.train()
    with torch.no_grad():
        model(images())
    with pytest.raises(RuntimeError, match=message):
        tap.collect()
    model(images())
    tap.collect()
    with pytest.raises(RuntimeError, match=message):  # a feature serves one loss
        tap.collect()


def test_evaluation_keeps_no_tensor_alive():
    model = TinyCNN(4).eval()
    tap = FeatureTap(model, ["stage1"], record="training")
    model(images())
    assert not tap._recorder.last.captures


def test_a_layer_called_outside_the_models_forward_is_not_recorded():
    model = TinyCNN(4)
    tap = FeatureTap(model, ["stage1"])
    model.stage1(images())
    with pytest.raises(RuntimeError, match="has not run forward"):
        tap.collect()


def test_a_layer_that_is_not_reached_is_named():
    model = TinyCNN(4)
    model.spare = nn.Linear(2, 2)
    with FeatureTap(model, ["fc", "spare"], owner="student") as tap:
        model(images())
        with pytest.raises(RuntimeError, match="Layer 'spare' of the student was not reached"):
            tap.collect()


def test_a_layer_that_is_reached_twice_is_named():
    shared = nn.Linear(2, 2)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    with pytest.raises(RuntimeError, match="Layer '0' of the model was reached 2 times"):
        tap_once(model, "0")
    with pytest.raises(RuntimeError, match="Layer '2' of the model was reached 2 times"):
        tap_once(model, "2")


@pytest.mark.parametrize("inplace", [True, False])
def test_a_feature_changed_in_place_is_named_with_the_layer_to_tap(inplace):
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=inplace))
    if not inplace:
        tap_once(model, "1", images())
        return
    with pytest.raises(
        RuntimeError, match=r"'1' of the model was changed in place.* in-place layer is '2'"
    ):
        tap_once(model, "1", images())
    assert (tap_once(model, "2", images()) >= 0).all()


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

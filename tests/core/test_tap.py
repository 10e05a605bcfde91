from collections import OrderedDict

import pytest
import torch
from _asserts import hook_count
from _models import TinyCNN, images
from torch import nn

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
    with pytest.raises(RuntimeError, match=r"Layer '0' of the model, .* was reached 2 times"):
        tap_once(model, "0")
    with pytest.raises(RuntimeError, match=r"Layer '2' of the model, .* was reached 2 times"):
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

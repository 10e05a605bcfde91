import pytest
import torch
from torch import nn

from vid_loss import FeatureTap, list_layers


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 3)

    def forward(self, x):
        y = self.linear(x)
        return {"first": y, "second": y + 1, "length": 3}


def shapes(model, example):
    return {layer.name: layer.shape for layer in list_layers(model, example)}


def test_layers_are_listed_in_the_order_of_their_calls():
    model = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.ReLU(), nn.Linear(3, 4)))
    table = list_layers(model, torch.zeros(5, 2))
    assert [layer.name for layer in table] == ["", "0", "1", "1.0", "1.1"]
    assert [layer.type for layer in table[:2]] == ["Sequential", "Linear"]
    assert table[-1].shape == (5, 4)


@pytest.mark.parametrize("example", [torch.zeros(5, 2), (torch.zeros(5, 2),), None])
def test_an_example_may_be_a_tensor_a_tuple_or_a_dict(example):
    example = {"input": torch.zeros(5, 2)} if example is None else example
    assert shapes(nn.Linear(2, 3), example) == {"": (5, 3)}


def test_each_tensor_of_an_output_is_named_as_a_tap_takes_it():
    model = nn.Sequential(TwoOutputs())
    names = [
        layer.name for layer in list_layers(model, torch.zeros(5, 2)) if layer.type == "TwoOutputs"
    ]
    assert names == ["0['first']", "0['second']"]
    with FeatureTap(model, names) as tap:
        model(torch.zeros(5, 2))
        assert list(tap.collect()) == names


def test_what_cannot_be_tapped_is_noted():
    shared = nn.ReLU()
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True), nn.Linear(2, 2), shared, shared)
    notes = {layer.name: layer.note for layer in list_layers(model, torch.zeros(1, 2))}
    assert notes["0"] == "changed in place afterwards"
    assert notes["3"] == "called 2 times"
    assert notes["1"] == notes["2"] == ""


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout())
    model[0].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    example = torch.randn(5, 2)
    random_state = torch.get_rng_state()
    list_layers(model, example)
    assert [module.training for module in model.modules()] == [True, False, True, True]
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    torch.testing.assert_close(torch.get_rng_state(), random_state)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_no_hook_is_left_when_the_forward_raises():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(4, 4))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        list_layers(model, torch.zeros(5, 2))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert model.training


def test_a_wrapper_is_looked_through():
    model = nn.DataParallel(nn.Sequential(nn.Linear(2, 3)))
    assert list(shapes(model, torch.zeros(5, 2))) == ["", "0"]


def test_the_table_prints_in_aligned_columns():
    text = repr(list_layers(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), torch.zeros(4, 2)))
    assert text.splitlines() == [
        "name  type        shape   note",
        "      Sequential  (4, 3)",
        "0     Linear      (4, 3)",
        "1     ReLU        (4, 3)",
    ]


def test_the_table_in_a_notebook_escapes_its_cells():
    page = list_layers(nn.Sequential(TwoOutputs()), torch.zeros(5, 2))._repr_html_()
    assert page.startswith("<table><tr><th>name</th>")
    assert "<td>0[&#x27;first&#x27;]</td><td>TwoOutputs</td><td>(5, 3)</td>" in page


def test_an_example_of_another_type_is_refused():
    with pytest.raises(TypeError, match=r"list_layers, example: expected a tensor.*got list"):
        list_layers(nn.Linear(2, 3), [torch.zeros(5, 2)])


def test_depth_leaves_out_what_is_nested_deeper():
    model = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.ReLU(), nn.Sequential(nn.Tanh())))

    def names(depth):
        return [layer.name for layer in list_layers(model, torch.zeros(5, 2), depth=depth)]

    assert names(1) == ["", "0", "1"]
    assert names(2) == ["", "0", "1", "1.0", "1.1"]
    assert names(None) == [*names(2), "1.1.0"]
    with pytest.raises(ValueError, match="depth: expected 1 or more, or None; got 0"):
        names(0)


def test_what_is_not_floating_point_is_noted():
    class Ids(nn.Module):
        def forward(self, x):
            return x.argmax(1)

    (layer,) = list_layers(Ids(), torch.zeros(5, 2))
    assert layer.note == "int64, not floating point"

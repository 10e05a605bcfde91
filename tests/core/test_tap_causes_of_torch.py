"""What torch does to a feature: TorchScript, export, no_grad, changes in place, compile."""

import warnings

import pytest
import torch
from _asserts import hook_count
from _models import TinyCNN, cnn_pair, images
from torch import nn
from torch.utils.checkpoint import checkpoint

from vid_loss import Distiller, FeatureTap

pytestmark = pytest.mark.usefixtures("seed")


def in_torchscript(model, how):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript as such
        if how == "script":
            return torch.jit.script(model)
        if how == "trace":
            return torch.jit.trace(model, images())
        return nn.Sequential(torch.jit.script(model.stage1), model.stage2)


@pytest.mark.parametrize(
    ("how", "layer", "what"),
    [
        ("script", "stage1", "it is TorchScript"),
        ("script", "", "it is TorchScript"),
        ("trace", "stage1", "it is TorchScript"),
        ("part", "0.0", "its layer '0.0' is TorchScript"),
    ],
)
def test_torchscript_takes_no_hooks(how, layer, what):
    student, teacher = cnn_pair()
    scripted = in_torchscript(teacher.eval(), how)
    with pytest.raises(TypeError, match=f"FeatureTap, teacher: .*{what}.*Load the Python model"):
        Distiller(student, scripted, {"stage1": layer}, example=images())
    assert hook_count(student) == 0


@pytest.mark.parametrize("how", ["script", "trace"])
def test_the_output_of_torchscript_can_be_tapped_as_the_message_says(how):
    class Wrapped(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)

    scripted = in_torchscript(TinyCNN(4).eval(), how)
    with FeatureTap(Wrapped(scripted), [""]) as tap:
        torch.testing.assert_close(tap.read(images())[""], scripted(images()))


@pytest.mark.parametrize("how", ["export", "fx"])
def test_an_exported_teacher_runs_operations_and_no_layers(how):
    student, teacher = cnn_pair()
    teacher.eval()
    if how == "export":
        graph = torch.export.export(teacher, (images(),)).module()
    else:
        graph = torch.fx.symbolic_trace(teacher)
    close = "none" if how == "export" else r"stage\d\.\d"
    message = rf"'stage1' of the teacher .*exported or traced graph.*the closest: {close}"
    with pytest.raises(RuntimeError, match=message):
        Distiller(student, graph, {"stage1": "stage1"}, example=images())


class FreezesItsStem(nn.Module):
    def __init__(self, by):
        super().__init__()
        self.stem, self.fc, self.by = nn.Linear(2, 4), nn.Linear(4, 3), by

    def forward(self, x):
        if self.by == "checkpoint":
            return self.fc(checkpoint(nn.Sequential(self.stem, nn.Tanh()), x, use_reentrant=True))
        with torch.no_grad():
            x = self.stem(x)
        return self.fc(x)


@pytest.mark.parametrize(
    ("by", "message"),
    [
        ("checkpoint", "inside a reentrant checkpoint"),
        ("no_grad", "the student itself runs it with gradients off"),
    ],
)
def test_the_students_own_no_grad_is_told_from_a_reentrant_checkpoint(by, message):
    student = FreezesItsStem(by)
    tap = FeatureTap(student, ["stem"], record="training", owner="student")
    student(torch.ones(3, 2, requires_grad=True))
    with pytest.raises(RuntimeError, match=f"'stem' of the student was read without.*{message}"):
        tap.collect()
    with FeatureTap(student, ["fc"], record="training") as later:
        student(torch.ones(3, 2, requires_grad=True))
        later.collect()


def test_in_place_changes_are_explained_by_what_is_beside_the_layer_and_the_advice_helps():
    """A block of torchvision's: its second norm is changed by +=, its first by a shared ReLU."""
    models = pytest.importorskip("torchvision").models
    model, x = models.resnet18(num_classes=4).eval(), torch.randn(1, 3, 32, 32)

    def read(layer):
        with FeatureTap(model, [layer], owner="student") as tap:
            return tap.read(x)[layer]

    def message_of(layer):
        with pytest.raises(RuntimeError, match="changed in place after it was read") as caught:
            read(layer)
        return str(caught.value)

    for block in ("layer3.1", "layer4.1"):
        message = message_of(f"{block}.bn2")
        assert "layer4.0" not in message  # another block's
        for advised in (block, f"{block}.bn2:input"):
            assert repr(advised) in message
            read(advised)
    for layer, relu in (("layer3.1.bn1", "layer3.1.relu"), ("bn1", "relu")):
        line = f"student.get_submodule('{relu}').inplace = False"
        assert line in message_of(layer)
        exec(line, {"student": model})
        read(layer)


def test_an_input_that_its_own_layer_changes_in_place_says_so():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True))
    with (
        FeatureTap(model, ["1:input"]) as tap,
        pytest.raises(RuntimeError, match=r"layer itself works in place: tap.*'1', or"),
    ):
        tap.read(torch.ones(3, 2))


def test_a_change_in_place_by_a_function_is_not_laid_at_a_layers_door():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(2, 2)
            self.later = nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True))

        def forward(self, x):
            return self.later(self.fc(x).mul_(2))

    with (
        FeatureTap(Model(), ["fc"]) as tap,
        pytest.raises(RuntimeError, match=r"write x = x \+ y for x \+= y") as caught,
    ):
        tap.read(torch.ones(3, 2))
    assert "later.1" not in str(caught.value)


@pytest.mark.parametrize("reset", [False, True])
def test_a_model_that_was_compiled_and_run_before_it_was_tapped_is_to_be_compiled_again(reset):
    torch._dynamo.reset()
    compiled = torch.compile(TinyCNN(4).eval(), backend="eager")
    compiled(images())
    tap = FeatureTap(compiled, ["stage1"], owner="teacher")
    if reset:
        torch._dynamo.reset()
        tap.read(images())
        return
    with pytest.raises(RuntimeError, match=r"which was compiled\. Compile the model after the Dis"):
        tap.read(images())


def test_a_class_that_passes_all_hooks_by_is_told_from_a_model_that_did_not_run():
    class Direct(TinyCNN):
        def __call__(self, x):
            return self.forward(x)

    with (
        FeatureTap(Direct(4), ["stage1"], owner="teacher") as tap,
        pytest.raises(RuntimeError, match=r"teacher ran, but not its hooks.*a __call__"),
    ):
        tap.read(images())

"""Each cause of a feature that is not there has a message of its own, and its advice helps."""

import copy
import re
import warnings

import pytest
import torch
from _asserts import hook_count
from _models import TinyCNN, cnn_pair, images
from torch import nn
from torch.utils.checkpoint import checkpoint

from vid_loss import Distiller, FeatureTap


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Adapter(nn.Module):
    """A layer with something to learn beside it."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.base(x) * self.scale


def distiller_of(student, pairs=None, **options):
    return Distiller(
        student, cnn_pair()[1], pairs or {"stage1.0": "stage1.0"}, example=images(), **options
    )


def replace(model, name, build):
    parent, _, key = name.rpartition(".")
    holder = model.get_submodule(parent)
    holder._modules[key] = build(holder._modules[key])


@pytest.mark.parametrize("layer", ["stage1.0", "stage1", "fc:input"])
def test_a_layer_that_was_wrapped_after_it_was_tapped_is_noticed(layer):
    """The inner one would be read, and the adapter learn nothing, without a word."""
    student = TinyCNN(4)
    distiller = distiller_of(student, {layer: layer})
    student(images())
    distiller(images())
    replace(student, layer.removesuffix(":input"), Adapter)
    student(images())
    with pytest.raises(
        RuntimeError, match=rf"Layer '{layer}' of the student was wrapped.*Adapter stands there now"
    ):
        distiller(images())
    distiller.close()  # what the message advises
    again = distiller_of(student, {layer: layer})
    student(images())
    again(images()).backward()
    if ":input" not in layer:
        assert student.get_submodule(layer).scale.grad is not None


def test_a_layer_whose_holder_was_built_again_around_it_is_noticed():
    student = TinyCNN(4)
    distiller = distiller_of(student)
    replace(student, "stage1", lambda old: nn.Sequential(Adapter(old[0]), *old[1:]))
    student(images())
    with pytest.raises(RuntimeError, match=r"'stage1.0' of the student was wrapped"):
        distiller(images())


def to_sync_batch_norm(student):
    def build(norm):
        new = nn.SyncBatchNorm.convert_sync_batchnorm(norm)
        new.forward = lambda x: x  # the real one wants a GPU
        return new

    replace(student, "stage1.1", build)


@pytest.mark.parametrize(
    ("change", "there"),
    [
        (to_sync_batch_norm, "SyncBatchNorm stands there now"),
        (lambda s: replace(s, "stage1.1", lambda _: nn.Identity()), "Identity stands there now"),
        (lambda s: s.stage1.__delitem__(slice(1, 3)), "nothing stands there now"),
        (lambda s: setattr(s, "stage1", s.stage1[0]), "nothing stands there now"),
    ],
)
def test_a_layer_that_left_the_model_is_named_with_what_stands_there_now(change, there):
    student = TinyCNN(4)
    distiller = distiller_of(student, {"stage1.1": "stage1.1"})
    change(student)
    student(images())
    message = rf"'stage1.1' of the student, BatchNorm2d, is no longer in the student: {there}"
    with pytest.raises(RuntimeError, match=message):
        distiller(images())


def checkpointed(module):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    return checkpoint_wrapper(module)


@pytest.mark.parametrize(
    ("layer", "name", "build"),
    [
        ("stage1.0", "stage1", Adapter),  # around the layer's holder
        ("stage1.0", "stage1", lambda old: nn.Sequential(nn.Identity(), *old)),  # has another name
        ("stage1", "stage1", checkpointed),
        ("stage1.0", "stage1", checkpointed),
        ("stage1", "stage1", lambda module: torch.compile(module, backend="eager")),
    ],
)
def test_a_change_that_leaves_the_feature_what_it_was_is_no_reason_to_stop(layer, name, build):
    student = TinyCNN(4)
    tap = FeatureTap(student, [layer], record="training")
    student(images())
    before = tap.collect()[layer]
    replace(student, name, build)
    for _ in range(2):
        student(images())
        torch.testing.assert_close(tap.collect()[layer], before)
    # What has moved is not looked for in every step.
    assert all(holder._modules[key] is module for holder, key, module in tap._ways)


def test_a_copy_that_is_trained_in_the_models_place_is_guessed():
    student = TinyCNN(4)
    tap = FeatureTap(student, ["stage1"], record="training", owner="student")
    student = copy.deepcopy(student)
    student(images())
    with pytest.raises(RuntimeError, match=r"copied since it was tapped.*prepare_qat"):
        tap.collect()


def test_quantization_aware_training_and_fx_after_the_tap_say_what_to_build_anew():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao and symbolic_trace announce their successors
        quantization = pytest.importorskip("torch.ao.quantization")
        student = TinyCNN(4)
        tap = FeatureTap(student, ["stage1"], record="training")
        student.qconfig = quantization.get_default_qat_qconfig("x86")
        quantization.prepare_qat(student)(images())
    with pytest.raises(RuntimeError, match="prepare_qat or another conversion returned"):
        tap.collect()
    student = TinyCNN(4)
    tap = FeatureTap(student, ["stage1"], record="training")
    torch.fx.symbolic_trace(student)(images())
    with pytest.raises(RuntimeError, match=r"what torch.fx or another converter made of it"):
        tap.collect()


class TwoTowers(nn.Module):
    def __init__(self):
        super().__init__()
        self.visual = TinyCNN(4)
        self.text = nn.Embedding(9, 4)

    def encode_image(self, x):
        return self.visual(x)

    def forward(self, x, words):
        return self.encode_image(x), self.text(words)


class ByMethod(nn.Module):
    """What the advice says: a module whose forward calls the method."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model.encode_image(x)


@pytest.mark.parametrize("call", ["forward", "encode_image"])
def test_a_forward_past_the_models_hooks_is_told_from_none(call):
    model = TwoTowers()
    args = (images(), torch.tensor([1, 2])) if call == "forward" else (images(),)
    tap = FeatureTap(model, ["visual.stage1"], record="training", owner="student")
    getattr(model, call)(*args)
    with pytest.raises(
        RuntimeError,
        match=r"'visual.stage1' ran, but not in a call of the student.*encode_image",
    ):
        tap.collect()
    for part, name in ((model.visual, "stage1"), (ByMethod(model), "model.visual.stage1")):
        with FeatureTap(part, [name], record="training") as advised:
            part(images())
            advised.collect()


def test_a_layer_that_backward_runs_again_did_not_run_outside():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False)

    model = Checkpointed()
    tap = FeatureTap(model, ["inner.0"], record="training")
    output = model(torch.ones(3, 2))
    tap.collect()
    output.sum().backward()
    with pytest.raises(RuntimeError, match=r"Call model\(\.\.\.\) on the batch first"):
        tap.collect()


@pytest.mark.parametrize(
    ("mode", "grad", "message"),
    [
        (False, True, r"ran in eval mode\. Call student\.train\(\)"),
        (True, False, r"ran with gradients off\. Run it outside torch\.no_grad\(\)"),
    ],
)
def test_a_forward_that_is_not_one_to_record_says_which(mode, grad, message):
    student = TinyCNN(4)
    distiller = distiller_of(student)
    with torch.set_grad_enabled(grad):
        student.train(mode)(images())
    with pytest.raises(RuntimeError, match=message):
        distiller(images())


class Skipping(nn.Module):
    """Runs its middle in eval mode, and in train mode if it is told to."""

    def __init__(self):
        super().__init__()
        self.block = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2)])})
        self.layerdrop = 0.1
        self.skip = True

    def forward(self, x):
        layer = self.block["layers"][0]
        return layer(x) if not (self.training and self.skip) else x


def test_a_layer_that_ran_in_the_example_and_not_now_is_told_from_one_that_never_ran():
    student, x = Skipping(), torch.ones(4, 2)
    layer = "block.layers.0"
    distiller = Distiller(student, nn.Linear(2, 3), {layer: ""}, example=x)
    student(x)
    message = r"and was in one before, or in the example.*student\.layerdrop = 0\.0"
    with pytest.raises(RuntimeError, match=message):
        distiller(x)
    student.layerdrop, student.skip = 0.0, False
    student(x)
    distiller(x)
    student.skip = True
    student(x)
    with pytest.raises(RuntimeError, match=r"Turn that off \(LayerDrop, stochastic depth\)"):
        distiller(x)


def test_layerdrop_is_the_cause_in_a_first_forward_too():
    model = Skipping()
    with (
        FeatureTap(model, ["block.layers.0"]) as tap,
        pytest.raises(RuntimeError, match=r"skips layers at random.*model\.layerdrop = 0\.0"),
    ):
        tap.read(torch.ones(4, 2))


def test_the_advice_against_layerdrop_can_be_typed():
    transformers = pytest.importorskip("transformers")
    sizes = {"conv_dim": (8,), "conv_stride": (20,), "conv_kernel": (20,)}
    config = transformers.Wav2Vec2Config(
        hidden_size=8,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=8,
        num_feat_extract_layers=1,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        layerdrop=0.5,
        **sizes,
    )
    student = transformers.Wav2Vec2Model(config)
    tap = FeatureTap(student, ["encoder.layers.1"], record="training", owner="student")
    wave = torch.randn(2, 2000)
    student.eval()
    tap.read(wave)
    student.train()

    def steps():
        for _ in range(20):
            student(wave)
            tap.collect()

    with pytest.raises(RuntimeError, match="the one around it, 'encoder'") as caught:
        steps()
    line = re.search(r"student\S* = 0\.0", str(caught.value)).group()
    exec(line, {"student": student})
    steps()
    with FeatureTap(student, ["encoder"]) as around:
        student(wave)
        assert around.collect()["encoder"].shape == (2, 100, 8)


def test_a_layer_that_is_run_by_its_forward_or_for_its_weights_is_never_reached():
    class Past(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            return nn.functional.linear(self.first.forward(x), self.second.weight)

    model, x = Past(), torch.ones(3, 2)
    for layer in ("first", "second"):
        message = rf"'{layer}' of the model was not reached.*its forward\(\), its children"
        with FeatureTap(model, [layer]) as tap, pytest.raises(RuntimeError, match=message):
            tap.read(x)


def test_a_list_of_layers_is_never_called():
    model = nn.Sequential(nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]))
    model.forward = lambda x: model[0][1](model[0][0](x))
    message = r"'0' of the model is a ModuleList, which is never called.*its last, '0\.1'"
    with FeatureTap(model, ["0"]) as tap, pytest.raises(RuntimeError, match=message):
        tap.read(torch.ones(3, 2))
    with FeatureTap(model, ["0.1"]) as tap:
        tap.read(torch.ones(3, 2))


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
    with pytest.raises(RuntimeError, match=r"which was compiled\. Compile the model after it was"):
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

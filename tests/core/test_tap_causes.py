"""Each cause of a feature that is not there has a message of its own, and its advice helps."""

import copy
import warnings

import pytest
import torch
from _models import TinyCNN, cnn_pair, images
from torch import nn

from vid_loss import Distiller, FeatureTap

pytestmark = pytest.mark.usefixtures("seed")


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
    with pytest.raises(RuntimeError, match=r"copied after the Distiller was built.*prepare_qat"):
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

"""Layers and forwards that did not run, or not as a tap sees them: each is told from the rest."""

import re

import pytest
import torch
from _models import TinyCNN, images
from torch import nn
from torch.utils.checkpoint import checkpoint

from vid_loss import Distiller, FeatureTap

pytestmark = pytest.mark.usefixtures("seed")


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


def test_a_call_from_inside_the_students_own_forward_is_told_from_none():
    class WithItsLoss(TinyCNN):
        transfer = None

        def forward(self, x):
            logits = super().forward(x)
            loss = logits.square().mean()
            return logits, loss if self.transfer is None else loss + self.transfer(x)

    student = WithItsLoss(4)
    distiller = Distiller(student, TinyCNN(8), {"stage1": "stage1"}, example=images())
    student.transfer = lambda x: distiller(x)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"it is still running. Call .* has returned"):
            student(images())
    student.transfer = None
    (student(images())[1] + distiller(images())).backward()


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

import copy
from collections import UserDict
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from _asserts import assert_same_state, state_of
from _models import cnn_pair, images
from torch import nn

from vid_loss import DistillationModel, Distiller, FeatureTap


def transfer(distiller):
    _, value = DistillationModel(distiller.student, distiller)(images())
    value.backward()
    return value.detach()


def test_a_teacher_in_bfloat16_keeps_its_weights_and_comes_close():
    student, teacher = cnn_pair()
    state = state_of(teacher)
    pairs = {"stage2": "stage2"}
    low = Distiller(student, teacher, pairs, example=images(), teacher_dtype=torch.bfloat16)
    plain = Distiller(student, teacher, pairs, example=images())
    plain.load_state_dict(low.state_dict())
    assert low.teacher_features(images())["stage2"].dtype == torch.bfloat16
    torch.testing.assert_close(transfer(low), transfer(plain), rtol=1e-2, atol=0)
    assert_same_state(teacher, state)


class SharedStem(nn.Module):
    def __init__(self, stem, width):
        super().__init__()
        self.stem = stem
        self.fc = nn.Linear(4, width)

    def forward(self, x):
        return self.fc(torch.relu(self.stem(x)))


def test_a_layer_shared_with_the_teacher_is_trained_under_autocast():
    stem = nn.Linear(3, 4)
    student, teacher = SharedStem(stem, 2), SharedStem(stem, 5)
    x = torch.randn(6, 3)
    model = DistillationModel(student, Distiller(student, teacher, {"fc": "fc"}, example=x))
    with torch.autocast("cpu", torch.bfloat16):
        output, transfer = model(x)
    assert output.dtype == torch.bfloat16
    (output.sum() + transfer).backward()
    assert stem.weight.grad is not None
    assert stem.weight.grad.abs().sum() > 0


def test_a_teacher_that_changes_its_inputs_is_refused():
    """The student would train on what it made of them."""
    student, teacher = cnn_pair()
    pairs = {"stage1": "stage1"}
    with pytest.raises(RuntimeError, match="teacher: expected its inputs as they were"):
        Distiller(student, teacher, pairs, example=images(), teacher_inputs=lambda x: x.sub_(0.5))
    centred = Distiller(
        student, teacher, pairs, example=images(), teacher_inputs=lambda x: x.clone().sub_(0.5)
    )
    assert torch.isfinite(transfer(centred))
    teacher.register_forward_pre_hook(lambda _, args: args[0].mul_(2))
    assert torch.isfinite(transfer(centred))
    with pytest.raises(RuntimeError, match="Clone them in teacher_inputs"):
        Distiller(student, teacher, pairs, example=images())


@dataclass
class Batch:
    x: object


class FromTree(nn.Module):
    """Takes its images out of whatever holds them, and may do something to it first."""

    def __init__(self, take, change=None):
        super().__init__()
        self.take, self.change, self.stage1 = take, change, nn.Conv2d(1, 4, 3)

    def forward(self, tree):
        if self.change is not None:
            self.change(tree)
        return self.stage1(self.take(tree))


TREES = {
    "list": (lambda x: [x], lambda tree: tree[0]),
    "dict of lists": (lambda x: {"a": [{"x": x}]}, lambda tree: tree["a"][0]["x"]),
    "UserDict": (lambda x: UserDict(x=x), lambda tree: tree["x"]),
    "dataclass": (Batch, lambda tree: tree.x),
    "object": (lambda x: SimpleNamespace(tensors=[x]), lambda tree: tree.tensors[0]),
}


@pytest.mark.parametrize("name", TREES)
def test_a_teacher_that_changes_its_inputs_inside_a_container_is_refused(name):
    make, take = TREES[name]
    student = FromTree(take)
    teacher = FromTree(take, lambda tree: take(tree).sub_(0.5))
    pairs, options = {"stage1": "stage1"}, {"example": (make(images()),)}
    with pytest.raises(RuntimeError, match=r"teacher: expected its inputs as they were.*deepcopy"):
        Distiller(student, teacher, pairs, **options)
    advised = lambda *args, **kwargs: copy.deepcopy(kwargs or args)  # noqa: E731  # as it is typed
    distiller = Distiller(student, teacher, pairs, teacher_inputs=advised, **options)
    tree = make(images())
    student(tree)
    assert torch.isfinite(distiller(tree))
    assert torch.equal(take(tree), images())


@pytest.mark.parametrize(
    "change",
    [
        lambda batch: batch.__setitem__("x", batch["x"] - 0.5),
        lambda batch: batch.pop("mask"),
        lambda batch: batch["more"].append(batch["x"]),
    ],
)
def test_a_teacher_that_puts_other_tensors_into_a_container_is_refused(change):
    student = FromTree(lambda batch: batch["x"])
    teacher = FromTree(lambda batch: batch["x"], change)
    batch = {"x": images(), "mask": torch.ones(8), "more": []}
    with pytest.raises(RuntimeError, match="has changed them in place"):
        Distiller(student, teacher, {"stage1": "stage1"}, example=(batch,))


def offloaded(teacher, how, folder):
    accelerate = pytest.importorskip("accelerate")
    device = torch.device("cpu")
    if how == "cpu":
        return accelerate.cpu_offload(teacher, execution_device=device)
    if how == "disk":
        accelerate.disk_offload(teacher, folder, execution_device=device)
        return teacher
    places = {"stage1": "cpu", "stage2": "disk", "pool": "cpu", "fc": "disk"}
    return accelerate.dispatch_model(teacher, places, "cpu", offload_dir=folder)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("how", ["cpu", "disk", "in part"])
def test_a_teacher_whose_weights_are_offloaded_gives_the_same_features(how, autocast, tmp_path):
    student, teacher = cnn_pair()
    pairs = {"stage2": "stage2"}
    whole = Distiller(student, copy.deepcopy(teacher), pairs, example=images())
    spread = Distiller(student, offloaded(teacher, how, tmp_path), pairs, example=images())
    spread.to("cpu").double().float()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = whole.teacher_features(images())["stage2"]
        torch.testing.assert_close(spread.teacher_features(images())["stage2"], expected)
        assert expected.dtype == (torch.bfloat16 if autocast else torch.float32)


class Padded(nn.Module):
    """torch's own encoder, which passes nested tensors on in eval mode if there is padding."""

    def __init__(self, width, layers):
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 2, width, dropout=0.0, batch_first=True)
        self.embed, self.encoder = nn.Embedding(9, width), nn.TransformerEncoder(layer, layers)

    def forward(self, ids, padding):
        return self.encoder(self.embed(ids), src_key_padding_mask=padding)


@pytest.mark.parametrize("layer", ["encoder.layers.1", "encoder.layers.1.linear2", "encoder"])
def test_a_transformer_encoder_with_padding_is_read_as_in_train_mode(layer):
    torch.manual_seed(0)
    student, teacher = Padded(8, 2), Padded(16, 2)
    padding = torch.tensor([[False] * 4, [False, False, True, True]])
    batch = torch.randint(9, (2, 4)), padding
    distiller = Distiller(student, teacher, {layer: layer}, example=batch)
    feature = distiller.teacher_features(*batch)[layer]
    with FeatureTap(teacher.train(), [layer]) as tap:
        expected = tap.read(*batch)[layer]
    torch.testing.assert_close(feature[~padding], expected[~padding])
    student(*batch)
    distiller(*batch, token_mask=~padding).backward()
    assert teacher.encoder.use_nested_tensor  # as it was
    assert student.encoder.use_nested_tensor


def test_a_nested_feature_is_refused_by_its_layers_name():
    class Nests(nn.Module):
        def __init__(self):
            super().__init__()
            self.nest, self.fc = nn.Identity(), nn.Linear(2, 3)

        def forward(self, x):
            rows = self.nest(torch.nested.nested_tensor(list(x), layout=torch.jagged))
            return self.fc(rows.to_padded_tensor(0.0))

    x = torch.randn(2, 3, 2)
    with pytest.raises(TypeError, match="'nest' of the teacher: expected a tensor of one shape"):
        Distiller(nn.Linear(2, 4), Nests(), {"": "nest"}, example=x)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.visual, self.fail = nn.Linear(2, 3), False

    def forward(self, x, words):
        return self.visual(None if self.fail else x)


def test_a_teacher_that_takes_other_arguments_says_how_to_map_them():
    student, teacher, x = nn.Linear(2, 4), TwoInputs(), torch.ones(5, 2)
    message = r"forward\(x, words\); got \(\(5, 2\)\).*missing 1 required .*'words'.*Map"
    with pytest.raises(TypeError, match=message):
        Distiller(student, teacher, {"": "visual"}, example=x)
    Distiller(student, teacher.visual, {"": ""}, example=x)
    pairs, inputs = {"": "visual"}, lambda x: (x, None)
    distiller = Distiller(student, teacher, pairs, example=x, teacher_inputs=inputs)
    teacher.fail = True  # an error of its own is left as it is
    with pytest.raises(TypeError, match=r"linear\(\)"):
        distiller.teacher_features(x)

import os
import signal
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from _models import cnn_pair, images
from safetensors import safe_open
from torch import nn

from vid_loss import DistillationModel, Distiller
from vid_loss.cache import FeatureCache


class Counted(nn.Module):
    """A teacher that counts its samples."""

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.body = teacher
        self.samples = 0

    def forward(self, x):
        self.samples += len(x)
        return self.body(x)


def build(cache, pairs=None):
    student, teacher = cnn_pair()
    teacher = Counted(teacher.eval())
    pairs = pairs or {"stage1": "body.stage1", "fc:input": "body.fc"}
    distiller = Distiller(student, teacher, pairs, example=images(), cache=cache)
    teacher.samples = 0
    return student, teacher, distiller


def loss(student, distiller, x, index):
    student(x)
    return distiller(x, sample_index=torch.as_tensor(index))


def test_the_teacher_sees_each_sample_once(tmp_path):
    student, teacher, distiller = build(FeatureCache(tmp_path, dtype=torch.float32))
    x = images()
    plain = Distiller(student, teacher, {"stage1": "body.stage1", "fc:input": "body.fc"}, example=x)
    plain.load_state_dict(distiller.state_dict())
    teacher.samples = 0
    for rows in ([0, 1, 2, 3], [4, 5, 6, 7], [3, 5, 0, 6], [7, 7, 1, 2]):
        value = loss(student, distiller, x[rows], rows)
        seen, _ = teacher.samples, student(x[rows])
        torch.testing.assert_close(value, plain(x[rows]))
        teacher.samples = seen
    assert teacher.samples == 8


def test_a_batch_of_known_and_new_samples_is_put_together_in_order(tmp_path):
    student, teacher, distiller = build(FeatureCache(tmp_path, dtype=torch.float32))
    x = images()
    expected = distiller.teacher_features(x)
    loss(student, distiller, x[[1, 4]], [1, 4])
    teacher.samples = 0
    got = distiller.cache.features(distiller._teacher, (x,), {}, torch.arange(8))
    assert teacher.samples == 6
    for layer, feature in expected.items():
        torch.testing.assert_close(got[layer], feature)


def test_gradients_are_those_without_a_cache(tmp_path):
    grads = []
    for cache in (None, FeatureCache(tmp_path, dtype=torch.float32)):
        student, _, distiller = build(cache)
        for _ in range(2):
            student.zero_grad()
            loss(student, distiller, images(), range(8)).backward()
        grads.append([p.grad for p in student.stage1.parameters()])
    torch.testing.assert_close(grads[0], grads[1])


def test_a_new_feature_is_rounded_as_a_kept_one(tmp_path):
    student, _, distiller = build(FeatureCache(tmp_path))
    student.eval()  # so that nothing but the cache differs
    first, second = (
        distiller.cache.features(distiller._teacher, (images(),), {}, torch.arange(8))
        for _ in range(2)
    )
    for layer, feature in first.items():
        assert feature.dtype == torch.float16
        assert torch.equal(feature, second[layer])


def test_another_process_goes_on_with_the_same_files(tmp_path):
    student, teacher, distiller = build(FeatureCache(tmp_path))
    first = loss(student, distiller, images(), range(8))
    student, teacher, distiller = build(FeatureCache(tmp_path))
    assert torch.equal(loss(student, distiller, images(), range(8)), first)
    assert teacher.samples == 0


def test_two_processes_find_what_the_other_has_added(tmp_path):
    runs = [build(FeatureCache(tmp_path)) for _ in range(2)]
    for (student, _, distiller), rows in zip(runs, ([0, 1], [2, 3]), strict=True):
        loss(student, distiller, images()[rows], rows)
    for student, teacher, distiller in runs:
        teacher.samples = 0
        loss(student, distiller, images()[:4], range(4))
        assert teacher.samples == 0


def test_the_folder_does_not_grow_past_its_bound(tmp_path):
    student, teacher, distiller = build(FeatureCache(tmp_path))
    loss(student, distiller, images()[:2], [0, 1])
    bound = sum(file.stat().st_size for file in tmp_path.iterdir()) + 100
    student, teacher, distiller = build(FeatureCache(tmp_path, max_bytes=bound))
    for _ in range(2):
        teacher.samples = 0
        loss(student, distiller, images(), range(8))
        assert teacher.samples == 6
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= bound


def test_files_are_plain_safetensors_of_the_features(tmp_path):
    student, _, distiller = build(FeatureCache(tmp_path))
    loss(student, distiller, images(), range(8))
    (file,) = tmp_path.glob("*.safetensors")
    with safe_open(file, framework="pt") as opened:
        assert opened.get_tensor("sample_index").tolist() == list(range(8))
        assert opened.get_tensor("feature:body.stage1").shape == (8, 8, 8, 8)


@pytest.mark.parametrize("change", ["weights", "layers", "dtype", "buffers"])
def test_features_of_another_teacher_are_refused(tmp_path, change):
    student, teacher, distiller = build(FeatureCache(tmp_path))
    loss(student, distiller, images(), range(8))
    dtype = torch.float32 if change == "dtype" else torch.float16
    pairs = {"stage2": "body.stage2"} if change == "layers" else None
    student, teacher, distiller = build(FeatureCache(tmp_path, dtype=dtype), pairs)
    with torch.no_grad():
        if change == "weights":
            teacher.body.fc.weight[0, 0] += 1
        if change == "buffers":
            teacher.body.stage1[1].running_mean += 1
    student(images())
    with pytest.raises(ValueError, match=r"expected features of this teacher, these layers"):
        distiller(images(), sample_index=torch.arange(8))


def test_a_teacher_that_changes_during_the_run_is_refused(tmp_path):
    student, teacher, distiller = build(FeatureCache(tmp_path))
    loss(student, distiller, images(), range(8))
    with torch.no_grad():
        teacher.body.fc.weight.mul_(2)
    student(images())
    with pytest.raises(ValueError, match=r"expected features of this teacher"):
        distiller(images(), sample_index=torch.arange(8))


@pytest.mark.parametrize("change", [lambda x: x.flip(-1), lambda x: x.roll(1, -1), lambda x: -x])
def test_augmented_inputs_are_noticed(tmp_path, change):
    student, _, distiller = build(FeatureCache(tmp_path))
    loss(student, distiller, images(), range(8))
    changed = images()
    changed[5] = change(changed[5])
    student(changed)
    with pytest.raises(ValueError, match=r"sample 5: expected the inputs .* random augmentation"):
        distiller(changed, sample_index=torch.arange(8))


def test_inputs_are_compared_ever_more_rarely(tmp_path):
    student, _, distiller = build(FeatureCache(tmp_path))
    for _ in range(3):
        loss(student, distiller, images(), range(8))
    value = loss(student, distiller, -images(), range(8))  # the third time from the cache
    assert torch.isfinite(value)


@pytest.mark.parametrize("index", [None, torch.zeros(8), torch.zeros(8, 1, dtype=torch.int64), [0]])
def test_a_missing_or_wrong_index_is_named(tmp_path, index):
    student, _, distiller = build(FeatureCache(tmp_path))
    student(images())
    with pytest.raises(ValueError, match=r"sample_index: expected a tensor \(N,\) of integers"):
        distiller(images(), sample_index=index)


def test_a_feature_that_float16_cannot_hold_is_refused_before_it_is_kept(tmp_path):
    student, teacher, distiller = build(FeatureCache(tmp_path))
    with torch.no_grad():
        teacher.body.fc.bias.fill_(1e6)
    student(images())
    with pytest.raises(ValueError, match=r"layer 'body.fc' .*float16 can hold; got .*float32"):
        distiller(images(), sample_index=torch.arange(8))
    assert list(tmp_path.iterdir()) == []


def test_inputs_of_another_size_are_named(tmp_path):
    student, _, distiller = build(FeatureCache(tmp_path))
    loss(student, distiller, images()[:4], range(4))
    larger = torch.randn(4, 1, 12, 12)
    student(larger)
    with pytest.raises(ValueError, match=r"expected the shape \(8, 8, 8\) .* got \(8, 12, 12\)"):
        distiller(larger, sample_index=torch.arange(4, 8))


def test_a_damaged_file_is_named(tmp_path):
    student, _, distiller = build(FeatureCache(tmp_path))
    loss(student, distiller, images(), range(8))
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-8])
    student, _, distiller = build(FeatureCache(tmp_path))
    student(images())
    with pytest.raises(ValueError, match=rf"{file.name}: expected a whole safetensors file"):
        distiller(images(), sample_index=torch.arange(8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.bfloat16}, r"dtype: expected torch.float16 or torch.float32; got"),
        ({"max_bytes": -1}, r"max_bytes: expected a number of bytes or None; got -1"),
    ],
)
def test_bad_arguments_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        FeatureCache(tmp_path, **options)


def test_a_distillation_model_hands_the_index_to_the_cache_alone(tmp_path):
    student, teacher, distiller = build(FeatureCache(tmp_path))
    model = DistillationModel(student, distiller)
    for _ in range(2):
        model(images(), sample_index=torch.arange(8))
    assert teacher.samples == 8
    deepcopy(model)(images(), sample_index=torch.arange(8))
    assert teacher.samples == 8


CHILD = """
import os, signal, sys
import safetensors.torch
from test_cache import build, images, loss
from vid_loss.cache import FeatureCache

save = safetensors.torch.save_file
def dies_half_way(tensors, path, metadata):
    save(tensors, path, metadata)
    with open(path, "r+b") as file:
        file.truncate(os.path.getsize(path) // 2)
    os.kill(os.getpid(), signal.SIGKILL)

student, _, distiller = build(FeatureCache(sys.argv[1]))
loss(student, distiller, images()[:4], range(4))
safetensors.torch.save_file = dies_half_way
loss(student, distiller, images()[4:], range(4, 8))
"""


def test_killed_while_it_writes_it_loses_that_batch_alone(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    child = subprocess.run([sys.executable, "-c", CHILD, tmp_path], env=environment, check=False)
    assert child.returncode == -signal.SIGKILL
    student, teacher, distiller = build(FeatureCache(tmp_path))
    loss(student, distiller, images(), range(8))
    assert teacher.samples == 4

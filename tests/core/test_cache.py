import gc
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
from safetensors.torch import save_file
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


def build(cache, pairs=None, **options):
    student, teacher = cnn_pair()
    teacher = Counted(teacher.eval())
    pairs = pairs or {"stage1": "body.stage1", "fc:input": "body.fc"}
    distiller = Distiller(student, teacher, pairs, example=images(), cache=cache, **options)
    teacher.samples = 0
    return student, teacher, distiller


def loss(student, distiller, x, index):
    student(x)
    return distiller(x, sample_index=torch.as_tensor(index))


def fill(cache, rows=range(8), **options):
    """Another process, which has left its files."""
    student, _, distiller = build(cache, **options)
    loss(student, distiller, images()[list(rows)], rows)
    cache.flush()


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
    expected = distiller._teacher.features((x,), {})
    loss(student, distiller, x[[1, 4]], [1, 4])
    teacher.samples = 0
    got = distiller.teacher_features(x, sample_index=torch.arange(8))
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
    distiller.cache.flush()
    student, teacher, distiller = build(FeatureCache(tmp_path))
    assert torch.equal(loss(student, distiller, images(), range(8)), first)
    assert teacher.samples == 0


def test_everything_is_written_when_the_first_epoch_is_over_and_once(tmp_path):
    student, _, distiller = build(FeatureCache(tmp_path))
    for rows in ([0, 1, 2, 3], [4, 5, 6, 7]):
        loss(student, distiller, images()[rows], rows)
    assert list(tmp_path.iterdir()) == []
    for _ in range(2):
        loss(student, distiller, images(), range(8))
        assert len(list(tmp_path.iterdir())) == 1


def test_a_file_is_written_as_soon_as_it_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr("vid_loss.cache._shards._FILE_BYTES", 1)
    student, _, distiller = build(FeatureCache(tmp_path))
    for rows in ([0, 1, 2, 3], [4, 5, 6, 7]):
        loss(student, distiller, images()[rows], rows)
    assert len(list(tmp_path.iterdir())) == 2


def test_what_is_left_is_written_when_the_cache_goes(tmp_path):
    student, _, distiller = build(FeatureCache(tmp_path))
    loss(student, distiller, images(), range(8))
    del student, distiller
    gc.collect()
    assert len(list(tmp_path.iterdir())) == 1


def test_two_processes_find_what_the_other_has_written(tmp_path):
    runs = [build(FeatureCache(tmp_path)) for _ in range(2)]
    for (student, _, distiller), rows in zip(runs, ([0, 1], [2, 3]), strict=True):
        loss(student, distiller, images()[rows], rows)
        distiller.cache.flush()
    for student, teacher, distiller in runs:
        teacher.samples = 0
        loss(student, distiller, images()[:4], range(4))
        assert teacher.samples == 0


def test_the_folder_does_not_grow_past_its_bound(tmp_path):
    fill(FeatureCache(tmp_path), [0, 1])
    bound = sum(file.stat().st_size for file in tmp_path.iterdir()) + 5000
    student, teacher, distiller = build(FeatureCache(tmp_path, max_bytes=bound))
    for _ in range(2):
        teacher.samples = 0
        loss(student, distiller, images(), range(8))
        assert teacher.samples == 6
    distiller.cache.flush()
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= bound


def test_files_are_plain_safetensors_of_the_features(tmp_path):
    fill(FeatureCache(tmp_path))
    (file,) = tmp_path.glob("*.safetensors")
    with safe_open(file, framework="pt") as opened:
        assert opened.get_tensor("sample_index").tolist() == list(range(8))
        assert opened.get_tensor("feature:body.stage1").shape == (8, 8, 8, 8)


def spoil_weights(teacher):
    with torch.no_grad():
        teacher.body.fc.weight[0, 0] += 1


def spoil_buffers(teacher):
    teacher.body.stage1[1].running_mean += 1


def spoil_eps(teacher):
    teacher.body.stage1[1].eps = 0.1


@pytest.mark.parametrize("change", [spoil_weights, spoil_buffers, spoil_eps])
def test_features_of_another_teacher_are_refused(tmp_path, change):
    fill(FeatureCache(tmp_path))
    student, teacher, distiller = build(FeatureCache(tmp_path))
    change(teacher)
    student(images())
    with pytest.raises(ValueError, match=r"expected features of this teacher, these layers"):
        distiller(images(), sample_index=torch.arange(8))


@pytest.mark.parametrize("change", ["layers", "dtype", "teacher_dtype", "autocast"])
def test_features_of_other_layers_or_precision_are_refused(tmp_path, change):
    fill(FeatureCache(tmp_path))
    student, _, distiller = build(
        FeatureCache(tmp_path, dtype=torch.float32 if change == "dtype" else torch.float16),
        pairs={"stage2": "body.stage2"} if change == "layers" else None,
        teacher_dtype=torch.bfloat16 if change == "teacher_dtype" else None,
    )
    student(images())
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast"),
        pytest.raises(ValueError, match=r"these layers and this precision; got others"),
    ):
        distiller(images(), sample_index=torch.arange(8))


@pytest.mark.parametrize("change", [lambda p: p.mul_(2), lambda p: p.data.mul_(2)])
def test_a_teacher_that_changes_during_the_run_is_refused(tmp_path, change):
    student, teacher, distiller = build(FeatureCache(tmp_path))
    loss(student, distiller, images(), range(8))
    with torch.no_grad():
        change(teacher.body.fc.weight)
    student(images())
    with pytest.raises(ValueError, match=r"expected (features of this|the) teacher"):
        distiller(images(), sample_index=torch.arange(8))


def test_a_teacher_that_counts_its_forwards_or_was_loaded_in_inference_mode_is_served(tmp_path):
    student, teacher, distiller = build(FeatureCache(tmp_path))
    teacher.register_buffer("count", torch.tensor(0))
    teacher.register_forward_hook(lambda module, *_: module.count.add_(1))
    with torch.inference_mode():
        teacher.body.fc.weight = nn.Parameter(teacher.body.fc.weight.clone(), requires_grad=False)
    for _ in range(3):
        loss(student, distiller, images(), range(8))
    assert teacher.samples == 8


@pytest.mark.parametrize("change", [lambda x: x.flip(-1), lambda x: x.roll(1, -1), lambda x: -x])
def test_augmented_inputs_are_noticed(tmp_path, change):
    student, _, distiller = build(FeatureCache(tmp_path))
    loss(student, distiller, images(), range(8))
    changed = images()
    changed[5] = change(changed[5])
    student(changed)
    with pytest.raises(ValueError, match=r"sample 5: expected the inputs .* random augmentation"):
        distiller(changed, sample_index=torch.arange(8))


def test_other_teacher_inputs_are_noticed(tmp_path):
    fill(FeatureCache(tmp_path))
    student, _, distiller = build(FeatureCache(tmp_path), teacher_inputs=lambda x: x / 2)
    student(images())
    with pytest.raises(ValueError, match=r"sample 0: expected the inputs .* other teacher_inputs"):
        distiller(images(), sample_index=torch.arange(8))


def test_inputs_are_compared_ever_more_rarely(tmp_path):
    student, _, distiller = build(FeatureCache(tmp_path))
    for _ in range(3):
        loss(student, distiller, images(), range(8))
    value = loss(student, distiller, -images(), range(8))  # the third time from the cache
    assert torch.isfinite(value)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (None, r"sample_index: expected integers \(N,\), .* got None"),
        (torch.zeros(8), r"sample_index: expected integers \(N,\), .* torch.float32"),
        (torch.zeros(8, 1, dtype=torch.int64), r"expected integers \(N,\), .* got shape \(8, 1\)"),
        (range(7), r"expected an index for each of 8 samples; got 7"),
    ],
)
def test_a_missing_or_wrong_index_is_named(tmp_path, index, message):
    student, _, distiller = build(FeatureCache(tmp_path))
    student(images())
    with pytest.raises(ValueError, match=message):
        distiller(images(), sample_index=index)


def test_inputs_in_containers_are_refused(tmp_path):
    cache = FeatureCache(tmp_path)
    _, _, distiller = build(cache)
    with pytest.raises(ValueError, match=r"expected tensors with the batch first .* \['dict'\]"):
        cache.features(distiller._teacher, ({"image": images()},), {}, range(8))


def test_a_feature_that_float16_cannot_hold_is_refused_before_it_is_kept(tmp_path):
    student, teacher, distiller = build(FeatureCache(tmp_path))
    with torch.no_grad():
        teacher.body.fc.bias.fill_(1e6)
    student(images())
    with pytest.raises(ValueError, match=r"layer 'body.fc' .*float16 can hold; got .*float32"):
        distiller(images(), sample_index=torch.arange(8))
    distiller.cache.flush()
    assert list(tmp_path.iterdir()) == []


def test_inputs_of_another_size_are_named(tmp_path):
    student, _, distiller = build(FeatureCache(tmp_path))
    loss(student, distiller, images()[:4], range(4))
    larger = torch.randn(4, 1, 12, 12)
    student(larger)
    with pytest.raises(ValueError, match=r"expected the shape \(8, 8, 8\) .* got \(8, 12, 12\)"):
        distiller(larger, sample_index=torch.arange(4, 8))


def test_a_damaged_file_is_named(tmp_path):
    fill(FeatureCache(tmp_path))
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-8])
    student, _, distiller = build(FeatureCache(tmp_path))
    student(images())
    with pytest.raises(ValueError, match=rf"{file.name}: expected a whole safetensors file"):
        distiller(images(), sample_index=torch.arange(8))


def test_a_folder_with_other_files_is_not_to_be_deleted(tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "best.safetensors")
    student, _, distiller = build(FeatureCache(tmp_path))
    student(images())
    with pytest.raises(ValueError, match=r"got one with best.safetensors, which no cache has"):
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
distiller.cache.flush()
safetensors.torch.save_file = dies_half_way
loss(student, distiller, images()[4:], range(4, 8))
distiller.cache.flush()
"""


def test_killed_while_it_writes_it_loses_that_file_alone(tmp_path):
    folders = os.pathsep.join(map(str, Path(__file__).parents[:2]))
    environment = {**os.environ, "PYTHONPATH": folders}
    child = subprocess.run([sys.executable, "-c", CHILD, tmp_path], env=environment, check=False)
    assert child.returncode == -signal.SIGKILL
    student, teacher, distiller = build(FeatureCache(tmp_path))
    loss(student, distiller, images(), range(8))
    assert teacher.samples == 4


def test_a_missing_extra_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r'pip install "vid-loss\[cache\]"'):
        FeatureCache(tmp_path)

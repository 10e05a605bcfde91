import errno
import gc
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from _cache import build, fill, loss
from _models import images
from safetensors import safe_open
from safetensors.torch import save_file

from vid_loss.cache import FeatureCache


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


def test_two_processes_find_what_the_other_has_written(uncounted, tmp_path):
    runs = [build(FeatureCache(tmp_path)) for _ in range(2)]
    for (student, _, distiller), rows in zip(runs, ([0, 1], [2, 3]), strict=True):
        loss(student, distiller, images()[rows], rows)
        distiller.cache.flush()
    for student, teacher, distiller in runs:
        teacher.samples = 0
        loss(student, distiller, images()[:4], range(4))
        assert teacher.samples == 0


def test_the_folder_does_not_grow_past_its_bound(uncounted, tmp_path):
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


def test_data_are_on_the_disk_before_the_file_has_its_name(tmp_path, monkeypatch):
    happened = []
    fsync, rename = os.fsync, os.replace
    monkeypatch.setattr(
        "os.fsync", lambda fd: (happened.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd))
    )
    monkeypatch.setattr("os.replace", lambda *a: (happened.append("renamed"), rename(*a)))
    fill(FeatureCache(tmp_path))
    (file,) = tmp_path.iterdir()
    written, *others = happened
    assert re.fullmatch(rf"{file}\.\w+\.partial", written)
    assert others == ["renamed", str(tmp_path)]


def no_room(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("call", ["os.fsync", "os.replace", "pathlib.Path.mkdir"])
def test_a_full_disk_is_said_once_and_training_goes_on(uncounted, tmp_path, monkeypatch, call):
    monkeypatch.setattr("vid_loss.cache._shards._FILE_BYTES", 1)
    student, teacher, distiller = build(FeatureCache(tmp_path / "features"))
    monkeypatch.setattr(call, no_room)
    with pytest.warns(UserWarning, match=r"No space left .* Training goes on"):
        loss(student, distiller, images()[:4], range(4))
    for rows in ([4, 5, 6, 7], [0, 1, 2, 3], [4, 5, 6, 7]):
        loss(student, distiller, images()[rows], rows)  # a second warning would be an error
    distiller.cache.flush()
    assert teacher.samples == 4 + 2 * 4  # those of the first batch are in memory
    assert list(tmp_path.glob("features/*")) == []


def leftover(folder, size=1000, age=0):
    path = folder / "left.safetensors.1234.partial"
    path.write_bytes(bytes(size))
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_what_a_killed_process_left_is_removed(tmp_path):
    path = leftover(tmp_path, age=4000)
    fill(FeatureCache(tmp_path))
    assert not path.exists()


def test_what_another_process_is_writing_stays_and_counts(uncounted, tmp_path):
    path = leftover(tmp_path, size=100_000)
    student, teacher, distiller = build(FeatureCache(tmp_path, max_bytes=100_000))
    for _ in range(2):
        loss(student, distiller, images(), range(8))
    assert path.exists()
    assert teacher.samples == 16


def test_a_folder_with_other_files_is_not_to_be_deleted(tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "best.safetensors")
    student, _, distiller = build(FeatureCache(tmp_path))
    student(images())
    with pytest.raises(ValueError, match=r"got one with best.safetensors, which no cache has"):
        distiller(images(), sample_index=torch.arange(8))


CHILD = """
import os, signal, sys
import vid_loss.durable
from _cache import build, images, loss
from vid_loss.cache import FeatureCache

def dies_half_way(descriptor):
    os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
    os.kill(os.getpid(), signal.SIGKILL)

student, _, distiller = build(FeatureCache(sys.argv[1]))
loss(student, distiller, images()[:4], range(4))
distiller.cache.flush()
vid_loss.durable.os.fsync = dies_half_way
loss(student, distiller, images()[4:], range(4, 8))
distiller.cache.flush()
"""


def test_killed_while_it_writes_it_loses_that_file_alone(uncounted, tmp_path):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[:2])),
    }
    child = subprocess.run([sys.executable, "-c", CHILD, tmp_path], env=environment, check=False)
    assert child.returncode == -signal.SIGKILL
    student, teacher, distiller = build(FeatureCache(tmp_path))
    loss(student, distiller, images(), range(8))
    assert teacher.samples == 4


def test_a_cache_that_is_dropped_while_torch_compiles_is_written(tmp_path):
    """The collector may run at any time; under the compiler, tensors have no data."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    cache = FeatureCache(tmp_path)
    student, _, distiller = build(cache)
    loss(student, distiller, images(), range(8))
    del cache, distiller, student
    with FakeTensorMode():
        gc.collect()
    student, teacher, distiller = build(FeatureCache(tmp_path))
    loss(student, distiller, images(), range(8))
    assert teacher.samples < 8  # a proof of one sample, and no more

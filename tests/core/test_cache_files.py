import contextlib
import errno
import gc
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from _cache import build, fill, loss
from _models import images
from safetensors import safe_open
from safetensors.torch import save_file

from vid_loss.cache import FeatureCache
from vid_loss.taps import Given


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


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-8])


def zero_the_end(path):
    """As a file may be after power loss that was renamed before its data were on the disk."""
    data = path.read_bytes()
    path.write_bytes(data[:-4096] + bytes(4096))


@pytest.mark.parametrize("damage", [cut, zero_the_end, lambda path: path.write_bytes(b"")])
def test_a_damaged_file_is_named_and_its_samples_are_computed_again(uncounted, tmp_path, damage):
    first = fill(FeatureCache(tmp_path))
    (file,) = tmp_path.glob("*.safetensors")
    damage(file)
    student, teacher, distiller = build(FeatureCache(tmp_path))
    with pytest.warns(UserWarning, match=rf"{file.name}: expected the file that .* Delete it"):
        assert torch.equal(loss(student, distiller, images(), range(8)), first)
    assert teacher.samples == 8
    distiller.cache.flush()
    student, teacher, distiller = build(FeatureCache(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whether it is read again depends on the files' names
        assert torch.equal(loss(student, distiller, images(), range(8)), first)
    assert teacher.samples == 0  # they are in the file of the run before


def test_no_flipped_bit_is_served(tmp_path):
    """Of the header too: the file may be left out or refused, or it does not matter."""
    fill(FeatureCache(tmp_path))
    _, _, distiller = build(FeatureCache(tmp_path / "unused"))
    expected = distiller._teacher.features(Given((images(),), {}))
    (file,) = tmp_path.glob("*.safetensors")
    whole = file.read_bytes()
    generator = torch.Generator().manual_seed(0)
    header = int.from_bytes(whole[:8], "little") * 8
    bits = torch.cat(
        [
            torch.randint(header, (100,), generator=generator),
            torch.randint(8 * len(whole), (200,), generator=generator),
        ]
    )
    left_out = 0
    for bit in bits.tolist():
        flip(file, bit)
        cache = FeatureCache(tmp_path)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            with contextlib.suppress(ValueError):  # the fingerprint is another's now
                got = cache.features(distiller._teacher, (images(),), {}, range(8))
                left_out += len(said)
                for layer, feature in expected.items():
                    assert torch.equal(got[layer], feature.half()), bit
        if cache._shards is not None:
            cache._shards._stopped = True  # or it would write what it has computed again
        file.write_bytes(whole)
    assert left_out > 200


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


@pytest.mark.parametrize("damage", [cut, lambda path: path.unlink()], ids=["cut", "gone"])
def test_what_is_damaged_as_it_is_written_stays_in_memory(uncounted, tmp_path, monkeypatch, damage):
    student, teacher, distiller = build(FeatureCache(tmp_path))
    loss(student, distiller, images(), range(8))

    def write(path, data):
        path.write_bytes(data)
        damage(path)

    monkeypatch.setattr("vid_loss.cache._shards.write_whole", write)
    with pytest.warns(UserWarning, match="expected the file that was written; got"):
        distiller.cache.flush()
    for _ in range(2):
        assert torch.isfinite(loss(student, distiller, images(), range(8)))
        distiller.cache.flush()
    assert teacher.samples == 8


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

"""Files of a cache that are not what was written."""

import contextlib
import warnings

import pytest
import torch
from _cache import build, fill, loss
from _models import images

from vid_loss.cache import FeatureCache
from vid_loss.taps import Given


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

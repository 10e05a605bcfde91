import gzip
import hashlib
import io
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

import pytest

pytest.importorskip("torchvision", reason="needs the examples extra")

from _idx import write_miniature
from _together import together
from paper.datasets import archives, small_images
from paper.datasets.archives import check_digest, download, unpack
from paper.datasets.small_images import read_small_images


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def test_an_archive_with_another_digest_is_not_opened(tmp_path):
    (tmp_path / "a.tgz").write_bytes(b"content")
    check_digest(tmp_path / "a.tgz", "md5:9a0364b9e99bb480dd25e1f0284c8555")
    cut(tmp_path / "a.tgz", 3)
    with pytest.raises(ValueError, match=r"a.tgz: expected md5 9a0364.* delete it"):
        check_digest(tmp_path / "a.tgz", "md5:9a0364b9e99bb480dd25e1f0284c8555")
    with pytest.raises(ValueError, match="expected sha1"):
        download("http://unused.invalid/a.tgz", tmp_path / "a.tgz", "sha1:00")


def test_a_failed_download_says_what_to_put_where(tmp_path, monkeypatch):
    def no_network(url, root, filename):
        raise OSError("no route")

    monkeypatch.setattr(archives, "download_url", no_network)
    with pytest.raises(ConnectionError, match=r"a.tgz: .*no route.* Fetch http://h/a .* --demo"):
        download("http://h/a", tmp_path / "a.tgz", "md5:00")


def test_where_nothing_can_be_written_a_download_says_what_to_put_where(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConnectionError, match=r"a.tgz: expected .* Fetch http://h.invalid/a on"):
        download("http://h.invalid/a", tmp_path / "file/a.tgz")


def test_a_download_that_stops_leaves_no_file(tmp_path, monkeypatch):
    def half(url, root, filename):
        Path(root, filename).write_bytes(b"half")
        raise RuntimeError("connection lost")

    monkeypatch.setattr(archives, "download_url", half)
    with pytest.raises(ConnectionError, match="connection lost"):
        download("http://h/a", tmp_path / "a.tgz")
    assert not (tmp_path / "a.tgz").exists()


def test_programs_that_start_together_fetch_once_and_read_whole_files(tmp_path, monkeypatch):
    fetched = []

    def slow(url, root, filename):
        fetched.append(url)
        with Path(root, filename).open("wb") as file:
            for _ in range(5):
                file.write(b"some")
                file.flush()
                time.sleep(0.02)

    monkeypatch.setattr(archives, "download_url", slow)
    digest = f"md5:{hashlib.md5(5 * b'some').hexdigest()}"
    together(lambda: download("http://h.invalid/a", tmp_path / "a.tgz", digest))
    assert len(fetched) == 1


def test_programs_that_start_together_unpack_whole_folders(tmp_path):
    names = [f"top/{number}" for number in range(200)]
    path = archive(tmp_path / "a.tgz", *map(tarfile.TarInfo, names))

    def work():
        unpack(path, "top", tmp_path / "folder")
        assert len([*(tmp_path / "folder").iterdir()]) == len(names)

    together(work)


@pytest.mark.parametrize("name", ["cifar10", "fashion-mnist"])
def test_a_failed_download_of_small_images_says_what_to_put_where(tmp_path, monkeypatch, name):
    def no_network(*_, **__):
        raise URLError("no route")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", no_network)
    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", no_network)
    with pytest.raises(ConnectionError, match=rf"download of {name}; got .*Fetch .* --data PATH"):
        read_small_images(name, tmp_path, download=True)


def test_small_images_that_are_there_are_not_fetched_even_where_nothing_can_be_written(
    tmp_path, monkeypatch
):
    made = []

    class Source:
        def __init__(self, folder, *, train, download=False):
            made.append(download)

    monkeypatch.setitem(
        small_images.FORMATS, "mnist", replace(small_images.FORMATS["mnist"], source=Source)
    )
    monkeypatch.setattr(small_images, "one_at_a_time", lambda path: pytest.fail("a lock"))
    with pytest.raises(FileNotFoundError):  # no images in this folder
        read_small_images("mnist", tmp_path, download=True)
    assert made == [False, False]
    write_miniature(tmp_path / "beside", each=2)
    assert len(read_small_images("mnist", tmp_path / "beside", download=True).train.labels) == 20
    assert made == [False, False]


@pytest.mark.parametrize("size", [0, 3, 12, -5])
def test_damaged_small_images_are_named_and_not_called_a_failed_download(tmp_path, size):
    write_miniature(tmp_path / "MNIST/raw", each=2, suffix="")
    damaged = tmp_path / "MNIST/raw/t10k-labels-idx1-ubyte"
    damaged.write_bytes(damaged.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"t10k-labels-idx1-ubyte: expected .* Fetch the file"):
        read_small_images("mnist", tmp_path, download=True)


def left_in(folder: Path) -> set[str]:
    return {x.name for x in folder.iterdir() if x.suffix != ".lock"}


def archive(path: Path, *members: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for member in members:
            member.size = 4 if member.isreg() else 0
            tar.addfile(member, io.BytesIO(b"data"))
    return path


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def test_an_archive_is_unpacked_to_its_folder(tmp_path):
    path = archive(tmp_path / "a.tgz", tarfile.TarInfo("extra"), tarfile.TarInfo("Top/x"))
    unpack(path, "Top", tmp_path / "data")
    assert (tmp_path / "data/x").read_bytes() == b"data"
    assert left_in(tmp_path) == {"a.tgz", "data"}


@pytest.mark.parametrize(
    "members",
    [
        [tarfile.TarInfo("../evil")],
        [tarfile.TarInfo("/tmp/evil")],
        [tarfile.TarInfo("Top/../../evil")],
        [tarfile.TarInfo("C:\\evil")],
        [link("Top/evil", "/etc")],
        [link("Top/evil", "../../x")],
        [link("Top/evil", "x"), tarfile.TarInfo("Top/evil")],
        [link("Top/evil", "../../x", tarfile.LNKTYPE)],
        [link("Top/evil", "", tarfile.CHRTYPE)],
        [link("Top/evil", "", tarfile.FIFOTYPE)],
    ],
    ids=lambda members: f"{members[0].type.decode()} {members[0].name} {members[0].linkname}",
)
def test_a_member_that_would_leave_the_folder_is_refused(tmp_path, monkeypatch, members):
    monkeypatch.setattr(tarfile.TarFile, "extractall", None)  # whose filter is not believed
    path = archive(tmp_path / "a.tgz", tarfile.TarInfo("Top/x"), *members)
    with pytest.raises(ValueError, match=r"a.tgz: expected .* stay in their folder; got ReadError"):
        unpack(path, "Top", tmp_path / "data")
    assert left_in(tmp_path) == {"a.tgz"}


@pytest.mark.parametrize("packed", [True, False])
def test_an_archive_cut_anywhere_is_named(tmp_path, packed):
    """Between two members too, where tarfile sees nothing."""
    path = archive(tmp_path / "a.tgz", *(tarfile.TarInfo(f"Top/{i}") for i in range(3)))
    whole = path.read_bytes() if packed else gzip.decompress(path.read_bytes())
    end = len(whole) if packed else 3 * 1024 + 512  # then come zeros up to a full record
    for size in range(0, end, 1 if packed else 128):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"a.tgz: expected a readable archive with Top/ in it"):
            unpack(path, "Top", tmp_path / "data")
    path.write_bytes(whole)
    unpack(path, "Top", tmp_path / "data")
    assert {x.name for x in (tmp_path / "data").iterdir()} == {"0", "1", "2"}


def header_of_a_gigabyte(kind: bytes) -> bytes:
    member = tarfile.TarInfo("Top/x")
    member.type, member.size = kind, 2**30
    return member.tobuf() + bytes(2**20)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_header_larger_than_any_is_refused_before_it_is_read(tmp_path, kind):
    path = tmp_path / "a.tgz"
    path.write_bytes(gzip.compress(header_of_a_gigabyte(kind)))
    with pytest.raises(ValueError, match=r"a.tgz: .*a header of 1073741824 bytes"):
        unpack(path, "Top", tmp_path / "data")


def test_more_than_a_data_set_of_images_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "_MAX_BYTES", 2000)
    path = archive(tmp_path / "a.tgz", *(tarfile.TarInfo(f"Top/{i}") for i in range(3)))
    with pytest.raises(ValueError, match=r"a.tgz: .*more than 2000 bytes"):
        unpack(path, "Top", tmp_path / "data")
    monkeypatch.setattr(archives, "_MAX_BYTES", 2**20)
    monkeypatch.setattr(archives, "_MAX_FILES", 2)
    with pytest.raises(ValueError, match=r"a.tgz: .*more than 2 files"):
        unpack(path, "Top", tmp_path / "data")


@pytest.mark.parametrize("damage", ["truncated", "no archive", "another folder"])
def test_a_damaged_archive_leaves_nothing(tmp_path, damage):
    path = archive(tmp_path / "a.tgz", tarfile.TarInfo("Top/x"))
    if damage == "truncated":
        cut(path, path.stat().st_size - 20)
    if damage == "no archive":
        path.write_bytes(b"<html>")
    top = "Other" if damage == "another folder" else "Top"
    with pytest.raises(ValueError, match=r"a.tgz: expected a readable archive"):
        unpack(path, top, tmp_path / "data")
    assert left_in(tmp_path) == {"a.tgz"}

import io
import tarfile
from pathlib import Path

import pytest

pytest.importorskip("torchvision", reason="needs the examples extra")

from paper.datasets import archives
from paper.datasets.archives import check_digest, download, unpack


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


def test_a_download_that_stops_leaves_no_file(tmp_path, monkeypatch):
    def half(url, root, filename):
        Path(root, filename).write_bytes(b"half")
        raise RuntimeError("connection lost")

    monkeypatch.setattr(archives, "download_url", half)
    with pytest.raises(ConnectionError, match="connection lost"):
        download("http://h/a", tmp_path / "a.tgz")
    assert not (tmp_path / "a.tgz").exists()


def archive(path: Path, *members: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for member in members:
            member.size = 0 if member.issym() else 4
            tar.addfile(member, io.BytesIO(b"data"))
    return path


def symlink(name: str, target: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = tarfile.SYMTYPE, target
    return member


def test_an_archive_is_unpacked_to_its_folder(tmp_path):
    path = archive(tmp_path / "a.tgz", tarfile.TarInfo("extra"), tarfile.TarInfo("Top/x"))
    unpack(path, "Top", tmp_path / "data")
    assert (tmp_path / "data/x").read_bytes() == b"data"
    assert {x.name for x in tmp_path.iterdir()} == {"a.tgz", "data"}


@pytest.mark.parametrize(
    "member",
    [tarfile.TarInfo("../evil"), symlink("Top/evil", "/etc"), symlink("Top/evil", "../../x")],
    ids=["parent", "absolute link", "relative link"],
)
def test_a_member_that_would_leave_the_folder_is_refused(tmp_path, member):
    path = archive(tmp_path / "a.tgz", tarfile.TarInfo("Top/x"), member)
    with pytest.raises(ValueError, match=r"a.tgz: expected .* stay in their folder; got .*Error"):
        unpack(path, "Top", tmp_path / "data")
    assert {x.name for x in tmp_path.iterdir()} == {"a.tgz"}


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
    assert {x.name for x in tmp_path.iterdir()} == {"a.tgz"}

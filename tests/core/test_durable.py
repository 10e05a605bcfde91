import os
import signal
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from vid_loss import durable
from vid_loss.durable import PARTIAL, remove_abandoned, write_whole


def test_a_file_that_several_write_is_whole_whenever_it_is_read(tmp_path):
    path = tmp_path / "file"
    contents = [bytes([letter]) * (50_000 + letter) for letter in b"abcd"]
    write_whole(path, contents[0])

    def write_and_read(content):
        for _ in range(30):
            write_whole(path, content)
            assert path.read_bytes() in contents

    with ThreadPoolExecutor(len(contents)) as pool:
        for done in [pool.submit(write_and_read, content) for content in contents]:
            done.result()
    assert [*tmp_path.iterdir()] == [path]


KILLED = """
import os, signal, sys
from pathlib import Path
from vid_loss import durable

durable.os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
durable.write_whole(Path(sys.argv[1]), b"half")
"""


def test_what_a_killed_writer_left_is_no_part_of_the_next_file_and_goes_in_time(tmp_path):
    path = tmp_path / "file"
    killed = subprocess.run([sys.executable, "-c", KILLED, path], check=False)
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.endswith(PARTIAL)
    write_whole(path, b"whole")
    assert path.read_bytes() == b"whole"
    remove_abandoned(tmp_path)  # its writer may be at it
    assert {*tmp_path.iterdir()} == {path, left}
    os.utime(left, (time.time() - 3700,) * 2)
    os.utime(path, (time.time() - 3700,) * 2)
    remove_abandoned(tmp_path)
    assert [*tmp_path.iterdir()] == [path]


def test_a_file_may_be_read_by_whom_the_user_lets(tmp_path):
    mask = os.umask(0o027)
    try:
        write_whole(tmp_path / "file", b"")
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_a_failure_leaves_the_older_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, b"older")

    def fails(*_):
        raise OSError("read-only")

    monkeypatch.setattr(durable.os, "replace", fails)
    with pytest.raises(OSError, match="read-only"):
        write_whole(path, b"newer")
    assert path.read_bytes() == b"older"
    assert [*tmp_path.iterdir()] == [path]

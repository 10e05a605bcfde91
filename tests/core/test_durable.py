import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vid_loss import durable
from vid_loss.durable import PARTIAL, remove_abandoned, taken, write_whole


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


def test_who_fails_takes_nothing_from_who_waits(tmp_path, monkeypatch):
    path, fsync, lock, unlink = tmp_path / "file", os.fsync, durable._lock, Path.unlink
    first_writes, second_waits, second_writes = (threading.Event() for _ in range(3))

    def locks(file, *, wait):
        if first_writes.is_set():
            second_waits.set()
        return lock(file, wait=wait)

    def syncs(descriptor):
        if second_waits.is_set():
            second_writes.set()
            first.exception(60)
            return fsync(descriptor)
        first_writes.set()
        assert second_waits.wait(60)
        raise OSError("no space left on device")

    def unlinks(partial, **options):
        second_writes.wait(0.5)  # which would be too early
        unlink(partial, **options)

    monkeypatch.setattr(durable, "_lock", locks)
    monkeypatch.setattr(durable.os, "fsync", syncs)
    monkeypatch.setattr(Path, "unlink", unlinks)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(write_whole, path, b"first")
        assert first_writes.wait(60)
        pool.submit(write_whole, path, b"second").result(60)
    assert isinstance(first.exception(), OSError)
    assert path.read_bytes() == b"second"
    assert [*tmp_path.iterdir()] == [path]


def test_what_a_killed_writer_left_is_no_part_of_the_next_file(tmp_path):
    path = tmp_path / "file"
    path.with_name(f"file{PARTIAL}").write_bytes(b"half of a longer one")
    write_whole(path, b"whole")
    assert path.read_bytes() == b"whole"
    assert [*tmp_path.iterdir()] == [path]


def test_who_removes_what_was_abandoned_takes_nothing_from_the_next_writer(tmp_path, monkeypatch):
    path, lock = tmp_path / "file", durable._lock
    partial = path.with_name(f"file{PARTIAL}")
    partial.write_bytes(b"first")

    def locks(file, *, wait):
        partial.replace(path)  # since it was opened
        partial.write_bytes(b"second, at which another writer is")
        return lock(file, wait=wait)

    monkeypatch.setattr(durable, "_lock", locks)
    remove_abandoned(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {path.name, partial.name}
    monkeypatch.undo()
    remove_abandoned(tmp_path)
    assert [*tmp_path.iterdir()] == [path]


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


HOLDER = """
import os, sys, time
from pathlib import Path
from vid_loss.durable import taken

with taken(Path(sys.argv[1])) as free:
    if sys.argv[2:]:
        sys.exit(print(free))
    child = os.fork()  # as a loader's worker, which outlives a kill for some seconds
    if child:
        print(free, child, flush=True)
    time.sleep(300)
"""


def test_a_lock_is_had_by_one_process_and_ends_with_it(tmp_path):
    path = tmp_path / "run/.lock"
    command = [sys.executable, "-c", HOLDER, path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        free, child = holder.stdout.readline().split()
        try:
            with taken(path) as free_as_well:
                assert (free, free_as_well) == ("True", False)
        finally:
            holder.kill()
        holder.wait(60)
        try:
            with taken(path) as free_now:
                assert free_now
                with taken(path) as twice:
                    assert twice
                other = subprocess.run([*command, "ends"], stdout=subprocess.PIPE, check=True)
                assert other.stdout.split()[0] == b"False"
        finally:
            os.kill(int(child), signal.SIGKILL)


def test_where_nothing_can_be_written_there_is_no_other_to_keep_out(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with taken(tmp_path / "file/.lock") as free:
        assert free

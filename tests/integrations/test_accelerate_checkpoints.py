"""What a run leaves on the disk, and what it does with what it finds there."""

import os
import signal
import subprocess
import sys

import pytest
import torch

pytest.importorskip("accelerate", reason="needs the accelerate extra")
pytest.importorskip("safetensors", reason="needs the accelerate extra")

from _accelerate import launch, run
from safetensors.torch import load_file
from torch import nn
from vid_loss.integrations.accelerate import (
    Accuracy,
    Progress,
    _manifest,
    alone,
)

pytestmark = pytest.mark.usefixtures("fresh_state")


def test_exports_are_plain_students(accelerator, tmp_path):
    _, student, _ = run(accelerator, tmp_path)
    last = load_file(tmp_path / "last.safetensors")
    torch.testing.assert_close(last, dict(student.state_dict()), rtol=0, atol=0)
    assert load_file(tmp_path / "best.safetensors").keys() == student.state_dict().keys()


def test_a_second_run_of_a_folder_is_refused_and_the_first_goes_on(accelerator, tmp_path):
    """Both would write the same checkpoint: of this run's model and that run's optimizer."""
    others = []

    def task_loss(logits, labels):
        if not others:
            others.append(launch(tmp_path))
        return nn.functional.cross_entropy(logits, labels)

    progress, _, _ = run(accelerator, tmp_path, task_loss=task_loss)
    assert "train, output: expected a folder that no other run is writing" in others[0].stderr
    assert not (tmp_path / "end-0.pt").exists()
    assert progress.epoch == 2
    run(accelerator, tmp_path, epochs=3)  # once it has ended, another may


@pytest.mark.parametrize("error", [RuntimeError("of the task"), KeyboardInterrupt()])
def test_a_run_that_ended_in_an_error_is_not_in_the_next_ones_checkpoints(
    accelerator, tmp_path, error
):
    """As in a notebook, whose accelerator lives on."""

    def fails(logits, labels):
        raise error

    with pytest.raises(type(error)):
        run(accelerator, tmp_path / "first", task_loss=fails)
    _, student, _ = run(accelerator, tmp_path / "second")
    names = {path.name for path in (tmp_path / "second/checkpoints/epoch-00002").iterdir()}
    assert "model.safetensors" in names
    assert "model_1.safetensors" not in names
    accelerator.free_memory()  # as a fresh process would have it
    _, resumed, _ = run(accelerator, tmp_path / "second")
    torch.testing.assert_close(dict(resumed.state_dict()), dict(student.state_dict()))


KILLED = """
import os, signal, sys, time
from filelock import FileLock

with FileLock(sys.argv[1]):
    if os.fork():
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(float(sys.argv[2]))
"""


def test_a_killed_run_is_waited_for_while_its_workers_notice(accelerator, tmp_path):
    command = [sys.executable, "-c", KILLED, tmp_path / ".lock", "2"]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    with alone(accelerator, tmp_path), alone(accelerator, tmp_path):  # one run may do it twice
        pass


def test_a_folder_where_nothing_can_be_written_is_said_at_once(accelerator, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="file/run"), alone(accelerator, tmp_path / "file/run"):
        pass


def test_best_is_the_last_of_equally_good_epochs():
    progress = Progress()
    for percent in (50.0, 70.0, 70.0, 60.0):
        progress.record({"validation": percent})
    assert (progress.epoch, progress.best_epoch, progress.best_percent) == (4, 3, 70.0)


def test_best_is_exported_from_its_own_epoch(accelerator, tmp_path, monkeypatch):
    from vid_loss.integrations.accelerate import _loop

    percents = iter([60, 80, 70])
    states = []

    def scripted(_, model, __):
        states.append({k: v.clone() for k, v in model.student.state_dict().items()})
        return Accuracy(next(percents), 100)

    monkeypatch.setattr(_loop, "evaluate", scripted)
    run(accelerator, tmp_path, epochs=3)
    torch.testing.assert_close(load_file(tmp_path / "best.safetensors"), states[1])
    torch.testing.assert_close(load_file(tmp_path / "last.safetensors"), states[2])


def test_the_last_two_checkpoints_are_kept(accelerator, tmp_path):
    run(accelerator, tmp_path, epochs=4)
    kept = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert kept == {"epoch-00003", "epoch-00004"}


def test_a_finished_run_is_not_trained_again(accelerator, tmp_path):
    first, student, _ = run(accelerator, tmp_path)
    again, resumed, _ = run(accelerator, tmp_path)
    assert again == first
    torch.testing.assert_close(dict(resumed.state_dict()), dict(student.state_dict()))


def test_a_partial_checkpoint_is_ignored_and_removed(accelerator, tmp_path):
    expected, student, _ = run(accelerator, tmp_path / "whole")
    partial = tmp_path / "damaged" / "checkpoints" / "partial"
    partial.mkdir(parents=True)
    (partial / "model.safetensors").write_bytes(b"half a file")
    progress, other, _ = run(accelerator, tmp_path / "damaged")
    assert progress == expected
    torch.testing.assert_close(dict(other.state_dict()), dict(student.state_dict()))
    assert not partial.exists()


def test_without_a_whole_checkpoint_a_run_starts_anew(accelerator, tmp_path):
    expected, student, _ = run(accelerator, tmp_path / "whole")
    (tmp_path / "damaged/checkpoints/epoch-00099").mkdir(parents=True)
    with pytest.warns(UserWarning, match=r"epoch-00099; got no manifest.json.* a new start if"):
        progress, other, _ = run(accelerator, tmp_path / "damaged")
    assert progress == expected
    torch.testing.assert_close(dict(other.state_dict()), dict(student.state_dict()))


def test_a_checkpoint_of_more_processes_is_refused(accelerator, tmp_path):
    run(accelerator, tmp_path)
    state = tmp_path / "checkpoints/epoch-00002/loop.pt"
    torch.save({**torch.load(state, weights_only=True), "processes": 2}, state)
    _manifest.write_manifest(state.parent)
    with pytest.raises(ValueError, match=r"as many processes as wrote .*00002, 2; got 1, which ha"):
        run(accelerator, tmp_path)


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(accelerator, tmp_path, monkeypatch):
    synced = set()
    fsync, rename = os.fsync, os.rename

    def renamed(partial, path):
        missing = {str(x) for x in (partial, *partial.rglob("*"))} - synced
        assert not missing
        rename(partial, path)

    monkeypatch.setattr(
        "os.fsync", lambda fd: (synced.add(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd))
    )
    monkeypatch.setattr("os.rename", renamed)
    run(accelerator, tmp_path, epochs=1)
    assert str(tmp_path / "checkpoints") in synced

"""Runs that are killed or damaged, and runs of two processes: they end where a whole one ends."""

import shutil

import pytest
import torch
from _versions import needs_gloo_that_averages

pytest.importorskip("accelerate", reason="needs the accelerate extra")
pytest.importorskip("safetensors", reason="needs the accelerate extra")

from _accelerate import KILLED, finish, launch, means_of
from safetensors.torch import load_file
from vid_loss.integrations.accelerate import _checkpoints

pytestmark = pytest.mark.usefixtures("fresh_state")


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    return finish(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def whole_run_without_dropout(tmp_path_factory):
    return finish(tmp_path_factory.mktemp("without_dropout"), "--no-dropout")


@pytest.mark.parametrize(
    ("kill", "left"),
    [
        (("--kill-at-step", "6"), {"epoch-00001"}),
        (("--kill-in-save", "2"), {"epoch-00001", "partial"}),
        (("--kill-in-save", "3"), {"epoch-00001", "epoch-00002", "partial"}),
    ],
    ids=["mid-epoch", "in a save", "in the last save"],
)
def test_a_killed_run_ends_where_the_whole_run_ends(tmp_path, whole_run, kill, left):
    assert launch(tmp_path, *kill).returncode == KILLED
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == left
    torch.testing.assert_close(finish(tmp_path), whole_run, rtol=0, atol=0)


def remove(path):
    path.unlink()


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def zero(path):
    path.write_bytes(bytes(path.stat().st_size))


FILES = (
    "model.safetensors",
    "optimizer.bin",
    "random_states_0.pkl",
    "loop.pt",
    "manifest.json",
)


@pytest.fixture(scope="module")
def killed_run(tmp_path_factory):
    """Two checkpoints, and a third epoch that was not finished."""
    folder = tmp_path_factory.mktemp("killed")
    assert launch(folder, "--kill-at-step", "11").returncode == KILLED
    files = {path.name for path in (folder / "checkpoints/epoch-00002").iterdir()}
    assert set(FILES) <= files, files
    return folder


@pytest.mark.parametrize("damage", [remove, truncate, flip, zero])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_named_and_passed_over(killed_run, tmp_path, name, damage):
    shutil.copytree(killed_run / "checkpoints", tmp_path / "checkpoints")
    damage(tmp_path / "checkpoints/epoch-00002" / name)
    with pytest.warns(UserWarning, match=r"epoch-00002; got .* passed over for the one before it"):
        chosen = _checkpoints._last_whole(tmp_path / "checkpoints")
    assert chosen == tmp_path / "checkpoints/epoch-00001"


def test_a_run_whose_last_checkpoint_is_damaged_ends_where_the_whole_run_ends(
    killed_run, tmp_path, whole_run
):
    shutil.copytree(killed_run, tmp_path / "run")
    checkpoints = tmp_path / "run/checkpoints"
    remove(checkpoints / "epoch-00002/random_states_0.pkl")
    (checkpoints / "epoch-00099").mkdir()
    (checkpoints / "epoch-00098").write_text("")
    torch.testing.assert_close(finish(tmp_path / "run"), whole_run, rtol=0, atol=0)
    assert {path.name for path in checkpoints.iterdir()} == {"epoch-00002", "epoch-00003"}


def test_two_processes_equal_one_and_resume_after_a_kill(tmp_path, whole_run_without_dropout):
    two = finish(tmp_path / "two", "--no-dropout", processes=2)
    torch.testing.assert_close(means_of(two), means_of(whole_run_without_dropout))
    killed = launch(tmp_path / "killed", "--no-dropout", "--kill-at-step", "6", processes=2)
    assert killed.returncode != 0
    resumed = finish(tmp_path / "killed", "--no-dropout", processes=2)
    torch.testing.assert_close(resumed, two, rtol=0, atol=0)


@needs_gloo_that_averages
@pytest.mark.parametrize("options", [[], ["--from-one"]], ids=["", "RAM-efficient"])
def test_fsdp2_equals_one_process_and_exports_the_plain_student(
    tmp_path, whole_run_without_dropout, options
):
    done = launch(tmp_path, "--no-dropout", "--fsdp", *options, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    exported = load_file(tmp_path / "last.safetensors")
    torch.testing.assert_close(exported, whole_run_without_dropout["student"])
    assert "of 21" in done.stdout

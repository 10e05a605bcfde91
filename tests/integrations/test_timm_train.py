"""timm's own train.py on Fashion-MNIST; it is in timm's repository and not in its wheel."""

import gzip
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")
timm = pytest.importorskip("timm")
pytest.importorskip("torchvision")

TRAIN = os.environ.get("VID_TIMM_TRAIN")
DATA = Path("/usr/share/datasets/fashion-mnist")  # where the Debian package puts it

pytestmark = [
    pytest.mark.skipif(TRAIN is None, reason="set VID_TIMM_TRAIN to a train.py of timm's clone"),
    pytest.mark.skipif(not DATA.is_dir(), reason="apt-get install dataset-fashion-mnist"),
]

ARGUMENTS = """
--device cpu --workers 1 --no-prefetcher --model test_resnet --num-classes 10 --img-size 32
-b 32 --lr 0.05 --warmup-epochs 0 --amp --amp-dtype bfloat16 --model-ema --model-ema-decay 0.9
--grad-accum-steps 2 --clip-grad 1.0 --kd-distill-type vid --kd-model-name resnet10t
--vid-pair layer3=layer3 --vid-pair layer4=layer4
""".split()  # noqa: SIM905  # as on the command line


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder with a folder for each class, of 16 images to train and 8 to validate."""
    root = tmp_path_factory.mktemp("fashion-mnist")
    for stem, split, count in (("train", "train", 16), ("t10k", "validation", 8)):
        pixels, labels = (
            np.frombuffer(gzip.decompress((DATA / f"{stem}-{name}.gz").read_bytes()), np.uint8)
            for name in ("images-idx3-ubyte", "labels-idx1-ubyte")
        )
        pixels, labels = pixels[16:].reshape(-1, 28, 28), labels[8:]
        for label in range(10):
            folder = root / split / str(label)
            folder.mkdir(parents=True)
            for index in np.flatnonzero(labels == label)[:count]:
                Image.fromarray(pixels[index]).save(folder / f"{index}.png")
    return root


@pytest.fixture
def clone(tmp_path):
    """The script, with the timm that lies beside it."""
    folder = tmp_path / "clone"
    folder.mkdir()
    beside = Path(TRAIN).resolve().parent / "timm"
    if beside.is_dir():
        (folder / "timm").symlink_to(beside)
    return Path(shutil.copy(TRAIN, folder / "train.py"))


def _call(*command):
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("how", ["patched", "run"])
def test_train_script_trains_resumes_and_runs_on_two_processes(how, clone, images, tmp_path):
    torch.manual_seed(0)
    teacher = tmp_path / "teacher.pth"
    torch.save(timm.create_model("resnet10t", num_classes=10).state_dict(), teacher)
    before = clone.read_bytes()
    command = ["-m", "vid_loss.integrations.timm", "run", clone, "--"]
    if how == "patched":
        _call("-m", "vid_loss.integrations.timm", "patch", clone)
        command = [clone]
    common = ["--data-dir", images, *ARGUMENTS, "--vid-teacher-checkpoint", teacher]
    common += ["--output", tmp_path]

    _call(*command, *common, "--epochs", 1, "--experiment", "first")
    last = tmp_path / "first" / "last.pth.tar"
    log = _call(*command, *common, "--epochs", 2, "--experiment", "second", "--resume", last)
    assert "Restoring optimizer state" in log
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    log = _call(*torchrun, *command, *common, "--epochs", 1, "--experiment", "two")
    assert "Preparing task for distributed training" in log

    for experiment, epochs in (("first", ["0"]), ("second", ["1"]), ("two", ["0"])):
        folder = tmp_path / experiment
        rows = (folder / "summary.csv").read_text().split()[1:]
        assert [row.split(",")[0] for row in rows] == epochs
        plain = timm.create_model(
            "test_resnet", num_classes=10, checkpoint_path=str(folder / "last.pth.tar")
        )
        checkpoint = torch.load(folder / "last.pth.tar", weights_only=False)
        assert_close(dict(plain.state_dict()), dict(checkpoint["state_dict_ema"]))
        pairs = {key.split(".")[0] for key in checkpoint["task_state"]["vid"]}
        assert pairs == {"layer3->layer3", "layer4->layer4"}
    assert (clone.read_bytes() == before) == (how == "run")

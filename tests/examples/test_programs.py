import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate", reason="needs the examples extra")
pytest.importorskip("torchvision", reason="needs the examples extra")
pytest.importorskip("sklearn", reason="needs the examples extra")

from accelerate.state import AcceleratorState
from paper import demo
from paper.datasets.photographs import read_cub, read_mit67
from paper.demo import Digits, teacher_digits, write_cub, write_mit67
from paper.models import build_model
from paper.program import DataSet, main


@pytest.fixture(autouse=True)
def fresh_state(monkeypatch, tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)  # no launcher; others set it
    monkeypatch.chdir(tmp_path)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def few_digits() -> Digits:
    """The first twelve of each of three digits, four of them for the test."""
    images, labels, _ = teacher_digits()
    chosen = [[i for i, x in enumerate(labels) if x == digit][:12] for digit in range(3)]
    indices = [i for of_digit in chosen for i in of_digit]
    return Digits(images[indices], [labels[i] for i in indices], [i % 12 < 8 for i in range(36)])


def no_network(folder: Path) -> None:
    raise ConnectionError(f"{folder}: expected a download; got no route.")


def fetch_nothing(folder: Path) -> None:
    if not folder.exists():
        no_network(folder)


CUB = DataSet(
    description="Birds.",
    folder=Path("data/CUB"),
    read=lambda folder, settings: read_cub(folder),
    instructions="Fetch the archive.",
    write=write_cub,
    name="cub",
    fetch=fetch_nothing,
)
MIT67 = replace(
    CUB,
    folder=Path("data/MIT"),
    read=lambda folder, settings: read_mit67(folder),
    write=write_mit67,
    name="mit67",
)


def run(monkeypatch, data_set: DataSet, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["program.py", *arguments])
    AcceleratorState._reset_state(reset_partial_state=True)
    main(data_set)


def test_the_demo_prints_a_row_per_method_and_is_not_trained_twice(monkeypatch, capsys):
    monkeypatch.setattr(demo, "teacher_digits", few_digits)
    monkeypatch.setattr(demo, "student_digits", few_digits)
    monkeypatch.setattr(demo, "SEEDS", (0, 1))
    monkeypatch.setattr(demo, "METHODS", ("student", "mi-l+mi-i"))
    teacher = replace(demo.TEACHER, student="wrn-10-1", epochs=1)
    student = replace(demo.STUDENT, teacher="wrn-10-1", teacher_classes=3, epochs=1)
    monkeypatch.setattr(demo, "TEACHER", teacher)
    monkeypatch.setattr(demo, "STUDENT", student)
    run(monkeypatch, CUB, "--demo", "--output", "runs")
    first = capsys.readouterr().out
    for method in ("student ", "mi-l+mi-i "):
        assert f"\n{method}" in first
    assert "12 test images" in first
    checkpoint = Path("runs/mi-l+mi-i-seed0/checkpoints/epoch-00001/model.safetensors")
    written = checkpoint.stat().st_mtime_ns
    run(monkeypatch, CUB, "--demo", "--output", "runs")
    assert capsys.readouterr().out == first
    assert checkpoint.stat().st_mtime_ns == written


SMALL = ("--student", "wrn-10-1", "--image-size", "8", "--workers", "0", "--epochs", "1")


def test_a_run_reads_the_data_set_and_refuses_other_settings_in_its_folder(monkeypatch, capsys):
    write_cub(Path("data/CUB"), few_digits())
    run(monkeypatch, CUB, *SMALL, "--method", "student", "--images-per-class", "5")
    printed = capsys.readouterr().out
    assert "wrn-10-1, 3 classes, 12 images for training and 3 for validation, seed 0" in printed
    assert "of 12 test images" in printed
    again = (*SMALL, "--method", "student", "--output", "runs/cub/wrn-10-1-resnet34-5-seed0")
    with pytest.raises(SystemExit, match=r"settings.json: .* Choose another --output"):
        run(monkeypatch, CUB, *again)


HOLDER = """
import sys
from filelock import FileLock

with FileLock(sys.argv[1]):
    print("taken", flush=True)
    sys.stdin.read()
"""


def test_a_run_that_lives_keeps_its_settings(monkeypatch):
    """Once it has ended, the other would go on from its checkpoint, as if it were its own."""
    write_cub(Path("data/CUB"), few_digits())
    settings = Path("out/student/settings.json")
    settings.parent.mkdir(parents=True)
    settings.write_text("of a run in its first epoch")
    command = [sys.executable, "-c", HOLDER, "out/student/.lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        with pytest.raises(SystemExit, match="a folder that no other run is writing"):
            run(monkeypatch, CUB, *SMALL, "--method", "student", "--output", "out")
        holder.communicate()
    assert settings.read_text() == "of a run in its first epoch"
    run(monkeypatch, CUB, *SMALL, "--method", "student", "--output", "out")


def test_missing_weights_are_named_alone_and_the_run_may_begin_anew(monkeypatch, capsys):
    # The layers of models of the paper's families are known.
    write_cub(Path("data/CUB"), few_digits())
    teacher = ("--teacher", "wrn-16-1", "--teacher-classes", "3", "--method", "mi-i")
    with pytest.raises(
        SystemExit, match=r"^Weights none.pt: expected a file; got none\. .*path\.$"
    ):
        run(monkeypatch, CUB, *SMALL, *teacher, "--teacher-weights", "none.pt")
    torch.save(build_model("wrn-16-1", 3).state_dict(), "there.pt")
    run(monkeypatch, CUB, *SMALL, *teacher, "--teacher-weights", "there.pt")
    assert "of 12 test images" in capsys.readouterr().out


def test_finetuning_and_named_layers_and_weights_run(monkeypatch, capsys):
    write_mit67(Path("data/MIT"), few_digits())
    run(monkeypatch, MIT67, *SMALL, "--method", "student", "--output", "first")
    weights = "first/student/best.safetensors"
    run(monkeypatch, MIT67, *SMALL, "--method", "finetuned", "--student-weights", weights)
    teacher = ("--teacher", "wrn-10-1", "--teacher-weights", weights, "--teacher-classes", "3")
    pairs = ("--stages", "group2=group2", "--classifiers", "fc=fc")
    method = ("--method", "mi-i+lwf", "--weights-of", "mi-i=3", "lwf=0.5")
    run(monkeypatch, MIT67, *SMALL, *teacher, *pairs, *method)
    assert capsys.readouterr().out.count("of 12 test images") == 3


@pytest.mark.parametrize("fetch", [None, no_network], ids=["no data", "no network"])
def test_without_the_data_it_says_what_to_fetch_and_offers_the_demo(monkeypatch, fetch):
    with pytest.raises(SystemExit, match=r"data/CUB.*\n\nFetch the archive.\n.* --demo"):
        run(monkeypatch, replace(CUB, fetch=fetch))


def test_one_process_where_several_were_asked_for_is_told(monkeypatch, capsys):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit, match="Fetch"):
        run(monkeypatch, CUB)
    assert "torchrun --nproc_per_node 2" in capsys.readouterr().err

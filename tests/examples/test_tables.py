import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import pytest

pytest.importorskip("accelerate", reason="needs the examples extra")
pytest.importorskip("torchvision", reason="needs the examples extra")
pytest.importorskip("sklearn", reason="needs the examples extra")
pytest.importorskip("filelock", reason="needs the examples extra")
pytest.importorskip("matplotlib", reason="needs the examples extra")

import tables
from _idx import write_miniature
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from paper.tables import report, runner
from paper.tables.cells import Cell, Run
from paper.tables.origin import origin
from paper.tables.plans import plan_of
from vid_loss.integrations.accelerate import Progress

PROGRAM = Path(__file__).parents[2] / "examples" / "tables.py"
MINIATURE = ("--table", "1a", "--preset", "small", "--dataset", "digits", "--epochs", "1")
MINIATURE += ("--steps-per-epoch", "3", "--methods", "student", "mi", "--regimes", "4", "8")
MINIATURE += ("--seeds", "2")
# Of each regime: 2 students; 3 lambdas with 2 seeds and 2 tests of the best.
RUNS = 2 * (2 + 3 * 2 + 2)
PATIENCE = 1200  # seconds, on a machine that does much else


# The lowest matplotlib that is admitted, beside today's pyparsing.
OLD = "ignore::DeprecationWarning:matplotlib._fontconfig_pattern"


def start(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-W", OLD, PROGRAM, *MINIATURE, "--output", folder],
        env={**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def read(folder: Path) -> list[dict]:
    return [json.loads(x) for x in (folder / "1a-digits.jsonl").read_text().splitlines()]


def kill_in_a_run(worker: subprocess.Popen[str], folder: Path) -> str:
    """Kills a worker that is in a run of a cell and has finished three; returns the run's name."""
    while not (folder / "1a-digits.jsonl").exists() or len(read(folder)) < 1 + 3:
        assert worker.poll() is None, worker.stdout.read()
        time.sleep(0.02)
    while True:
        worker.send_signal(signal.SIGSTOP)
        running = [path.parent.name for path in (folder / "runs").glob("*/settings.json")]
        if running and running[0] not in {record["run"] for record in read(folder)}:
            break
        worker.send_signal(signal.SIGCONT)
        time.sleep(0.02)
    worker.kill()
    worker.communicate()
    return running[0]


def test_a_killed_table_is_finished_by_two_workers_without_repeating(tmp_path, capsys):
    first = start(tmp_path)
    killed = kill_in_a_run(first, tmp_path)
    before = read(tmp_path)
    workers = [start(tmp_path), start(tmp_path)]
    printed = [worker.communicate(timeout=PATIENCE)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], printed
    after = read(tmp_path)
    cells = [record for record in after if not record["pretrained"]]
    assert len(cells) == RUNS
    names = ("method", "n", "stage", "seed", "choice")
    assert len({json.dumps([r[name] for name in names]) for r in cells}) == RUNS
    assert killed in {record["run"] for record in after} - {record["run"] for record in before}
    assert all(record in after for record in before)
    assert len(after) - len(before) == sum(text.count("validation") for text in printed)
    assert all("validation" in text for text in printed)
    assert all((r["test"] is None) == (r["stage"] == "search") for r in after)
    transfers = {r["method"]: {*r["transfer"]} for r in cells}
    assert {f"nats_per_element/group{i}->group{i}" for i in (1, 2, 3)} < transfers["mi"]
    assert transfers["student"] == set()
    assert all(r["validation_images"] > 500 for r in cells)  # those that nobody is given
    assert {"command", "revision", "versions", "seconds", "seed", "data"} <= after[0].keys()
    assert [*(tmp_path / "runs").iterdir()] == []  # nor does a run leave a checkpoint
    assert start(tmp_path).communicate(timeout=PATIENCE)[0] == ""
    assert read(tmp_path) == after
    report.main([str(tmp_path / "1a-digits.jsonl"), "--output", str(tmp_path)])
    tests = [r["test"] for r in cells if (r["method"], r["n"], r["test"] is None) == ("mi", 4, 0)]
    cell = f"{mean(tests):.2f} ± {stdev(tests):.2f} (78.14)"
    assert f"| MI | {cell}" in capsys.readouterr().out  # and what was transferred
    assert (tmp_path / "1a-digits.png").read_bytes().startswith(b"\x89PNG")


def run(monkeypatch, folder: Path, *arguments: str) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    small = ("--preset", "small", "--epochs", "1", "--steps-per-epoch", "2", "--methods", "kd")
    small += ("--regimes", "4", "--seeds", "1", "--output", str(folder / "out"))
    monkeypatch.setattr(sys, "argv", ["tables.py", *small, *arguments])
    AcceleratorState._reset_state(reset_partial_state=True)
    tables.main()


def test_two_tables_in_a_folder_share_the_teacher(monkeypatch, tmp_path):
    for table in ("1a", "1b"):
        amount = ("--images-per-class", "20")  # which 1a has no use for
        run(monkeypatch, tmp_path, "--table", table, "--dataset", "digits", *amount)
    records = [
        json.loads((tmp_path / f"out/{table}-digits.jsonl").read_text().splitlines()[0])
        for table in ("1a", "1b")
    ]
    assert records[0]["pretrained"]
    assert records[0] == records[1]


def test_runs_of_other_data_or_another_recipe_are_not_mixed(monkeypatch, tmp_path):
    for name, each in (("one", 10), ("copy", 10), ("other", 11)):
        write_miniature(tmp_path / name, each=each)
    lines = tmp_path / "out/1a-fashion-mnist.jsonl"
    table = ("--table", "1a", "--data")
    run(monkeypatch, tmp_path, *table, str(tmp_path / "one"))
    written = lines.read_text()
    run(monkeypatch, tmp_path, *table, str(tmp_path / "copy"))
    with pytest.raises(SystemExit, match=r"1a-fashion-mnist.jsonl: expected runs with data .*got"):
        run(monkeypatch, tmp_path, *table, str(tmp_path / "other"))
    with pytest.raises(SystemExit, match="expected runs with epochs 2; got one with 1"):
        run(monkeypatch, tmp_path, *table, str(tmp_path / "one"), "--epochs", "2")
    assert lines.read_text() == written


@pytest.mark.parametrize(
    ("table", "option", "count"),
    [("1a", "--regimes", 87), ("1b", "--images-per-class", 87), ("1b", "--regimes", 500)],
)
def test_more_images_than_a_class_has_are_refused_before_anything_is_trained(
    monkeypatch, tmp_path, table, option, count
):
    asked = ["--images-per-class", "20"] if option == "--regimes" else []
    asked += ["--table", table, "--dataset", "digits", option, str(count)]
    with pytest.raises(SystemExit, match=rf"{option}: expected at most 86 .*digits .*got {count}"):
        run(monkeypatch, tmp_path, *asked)
    assert not (tmp_path / "out").exists()


def test_runs_of_another_student_are_not_mixed(monkeypatch, tmp_path):
    table = ("--table", "1a", "--dataset", "digits")
    run(monkeypatch, tmp_path, *table)
    with pytest.raises(SystemExit, match="with student wrn-16-1-s2; got one with wrn-10-1-s2"):
        run(monkeypatch, tmp_path, *table, "--student", "wrn-16-1-s2")


def test_unlabeled_images_of_another_number_are_not_mixed(monkeypatch, tmp_path):
    table = ("--table", "1b", "--dataset", "digits", "--images-per-class")
    run(monkeypatch, tmp_path, *table, "20")
    with pytest.raises(SystemExit, match="expected runs with images_per_class 30; got one with 20"):
        run(monkeypatch, tmp_path, *table, "30")


def test_a_table_of_another_revision_says_so(monkeypatch, tmp_path, capsys):
    run(monkeypatch, tmp_path, "--table", "1a", "--dataset", "digits")
    assert capsys.readouterr().err == ""
    lines = tmp_path / "out/1a-digits.jsonl"
    revision = json.loads(lines.read_text().splitlines()[0])["revision"]
    lines.write_text(lines.read_text().replace(revision, "before"))
    run(monkeypatch, tmp_path, "--table", "1a", "--dataset", "digits")
    assert "8 of 8 runs are of revision before" in capsys.readouterr().err


def test_a_copy_without_history_may_be_told_its_revision(monkeypatch, tmp_path):
    accelerator = Accelerator(cpu=True)
    monkeypatch.setenv("VID_LOSS_REVISION", "told")
    assert origin(accelerator)["revision"] != "told"  # a clone knows better
    monkeypatch.setenv("GIT_DIR", str(tmp_path))
    assert origin(accelerator)["revision"] == "told"
    monkeypatch.delenv("VID_LOSS_REVISION")
    assert origin(accelerator)["revision"] == "unknown"


def test_what_is_finetuned_may_be_another_model_with_a_learning_rate_of_its_own(
    monkeypatch, tmp_path
):
    seen = []

    def trained(accelerator, settings, loaders, folder, **_):
        seen.append(settings)
        folder.mkdir(parents=True)
        return Progress(best_percent=50.0, history=[{"validation": 50.0}])

    monkeypatch.setattr(runner, "train_student", trained)
    plan = replace(plan_of("1a", "small", "digits"), methods=("finetuned",), finetuned="wrn-10-2")
    maker = runner.Runner(Accelerator(cpu=True), tmp_path, tmp_path)
    for method in ("finetuned", "student"):
        record = maker.execute(Run(Cell(plan, method, 4), "search", 0, {"lr": 0.01}))
        assert (record["lr"], record["choice"]) == (0.1, {"lr": 0.01})
    assert [(x.student, x.lr) for x in seen] == [("wrn-10-2", 0.01), (plan.student, 0.01)]
    common = maker.made_with(plan)
    students = [common[kind]["student"] for kind in ("cell", "finetuned")]
    assert students == [plan.student, "wrn-10-2"]
    assert common["cell"]["lr"] == 0.1

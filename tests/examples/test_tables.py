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
from accelerate.state import AcceleratorState
from paper.methods import TABLE_1, TABLE_2
from paper.tables import report
from paper.tables.cells import cells_of, models_of
from paper.tables.estimate import dry_run
from paper.tables.grids import GRIDS
from paper.tables.plans import plan_of
from paper.tables.results import read_tables
from paper.tables.runner import check_data_set

PROGRAM = Path(__file__).parents[2] / "examples" / "tables.py"
MINIATURE = ("--table", "1a", "--preset", "small", "--dataset", "digits", "--epochs", "1")
MINIATURE += ("--steps-per-epoch", "3", "--methods", "student", "mi", "--regimes", "4", "8")
MINIATURE += ("--seeds", "2")
# Of each regime: 2 students; 3 lambdas with 2 seeds and 2 tests of the best.
RUNS = 2 * (2 + 3 * 2 + 2)


def start(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", PROGRAM, *MINIATURE, "--output", folder],
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
    printed = [worker.communicate(timeout=300)[0] for worker in workers]
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
    assert {"command", "revision", "versions", "seconds", "seed", "data"} <= after[0].keys()
    assert [*(tmp_path / "runs").iterdir()] == []  # nor does a run leave a checkpoint
    assert start(tmp_path).communicate(timeout=300)[0] == ""
    assert read(tmp_path) == after
    report.main([str(tmp_path / "1a-digits.jsonl"), "--output", str(tmp_path)])
    tests = [r["test"] for r in cells if (r["method"], r["n"], r["test"] is None) == ("mi", 4, 0)]
    cell = f"{mean(tests):.2f} ± {stdev(tests):.2f} (78.14)"
    assert f"| MI | {cell} |" in capsys.readouterr().out
    assert (tmp_path / "1a-digits.png").read_bytes().startswith(b"\x89PNG")


def record(method: str, n: int | None, seed: int, test: float, **changed: object) -> dict:
    return {
        "table": "1a",
        "dataset": "cifar10",
        "teacher": "wrn-40-2",
        "teacher_dataset": "cifar10",
        "student": "wrn-16-1",
        "method": method,
        "pretrained": False,
        "n": n,
        "images_per_class": n,
        "stage": "test",
        "seed": seed,
        "choice": {"mi": 10.0} if method == "mi" else {},
        "epochs": 200,
        "steps_per_epoch": 391,
        "batch_size": 128,
        "lr": 0.1,
        "test": test,
        "revision": "abc",
        "command": "python examples/tables.py --table 1a",
        **changed,
    }


def test_the_report_has_the_papers_figure_of_the_same_regime(tmp_path, capsys):
    runs = [record("mi", n, seed, 80.0 + seed) for n in (500, None) for seed in range(3)]
    teacher = {**record("student", None, 0, 94.0), "pretrained": True, "student": "wrn-40-2"}
    runs += [record("student", 500, 0, 70.0), teacher]
    file = tmp_path / "lines.jsonl"
    file.write_text("".join(json.dumps(x) + "\n" for x in runs))
    report.main([str(file), "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert printed.strip() == (tmp_path / "1a-cifar10.md").read_text().strip()
    assert "| method | 500 images per class | all images per class |" in printed
    assert "| *the paper's column* | *CIFAR-10, 500* | *CIFAR-10, full(5000)* |" in printed
    assert "| Student | 70.00 (79.82) | - (90.71) |" in printed
    assert "| MI | 81.00 ± 1.00 (86.49) | 81.00 ± 1.00 (91.76) |" in printed
    assert "cifar10: wrn-40-2, 94.00 % of its test images" in printed
    assert "MI at 500: mi 10" in printed
    assert "1 or 3 seeds, unfinished cells included" in printed


def test_on_another_data_set_the_paper_is_matched_by_rank():
    runs = [record("kd", n, 0, 50.0, dataset="fashion-mnist") for n in (10, 30, 100)]
    (table,) = read_tables(runs)
    assert [table.paper["kd", n] for n in (10, 30, 100)] == [65.94, 81.88, 85.39]


def test_runs_that_do_not_belong_to_one_cell_are_refused():
    with pytest.raises(ValueError, match=r"kd with 10: .*a seed each; got 1 recipes .* \[0, 0\]"):
        read_tables([record("kd", 10, 0, 50.0), record("kd", 10, 0, 51.0)])
    with pytest.raises(ValueError, match="got 2 recipes"):
        read_tables([record("kd", 10, 0, 50.0), record("kd", 10, 1, 5.0, epochs=9)])


@pytest.mark.parametrize(
    ("table", "student", "regimes"),
    [
        ("1a", "wrn-16-1", (100, 500, 1000, None)),
        ("1b", "wrn-16-1", (100, 500, 1000)),
        ("2a", "resnet18", (10, 25, 50, None)),
        ("2b", "vgg9", (10, 25, 50, None)),
        ("2c", "resnet18", (5, 10, 20, None)),
        ("2d", "vgg9", (5, 10, 20, None)),
    ],
)
def test_the_dry_run_has_every_run_of_the_papers_tables_and_its_hours(table, student, regimes):
    plan = plan_of(table, "paper")
    assert (plan.student, plan.regimes) == (student, regimes)
    searched = [method for method in plan.methods if len(GRIDS[method]) > 1]
    count = len(regimes) * (3 * len(plan.methods) + 3 * len(searched)) + table.startswith("1")
    lines = dry_run(plan).splitlines()
    assert len(lines) == count + 1
    assert lines[-1].startswith(f"{count} runs, ")
    hours = sum(float(line.rsplit(" ", 2)[1]) for line in lines[:-1])
    assert float(lines[-1].split()[2]) == pytest.approx(hours, abs=0.1)
    assert "An estimate: " in lines[-1]
    assert "not measured" in lines[-1]


def test_every_method_of_the_paper_has_a_grid_of_its_own_terms():
    assert {*TABLE_1, *TABLE_2} == GRIDS.keys()
    for method, grid in GRIDS.items():
        allowed = {*method.split("+"), "temperature", "hint"}
        assert all(choice.keys() <= allowed for choice in grid)


def test_no_two_runs_have_one_name():
    plans = [plan_of(table, "small") for table in ("1a", "1b", "2a")]
    names = [
        run.name
        for plan in plans
        for cell in cells_of(plan)
        for run in [*cell.searches(), *(run for x in cell.choices for run in cell.tests(x))]
    ]
    assert len(set(names)) == len(names) > 300
    models = {cell.name for plan in plans for cell in models_of(plan)}
    assert len(models) == 2  # a teacher that the tables share, and a student to be finetuned
    (teacher,) = models_of(plans[0])
    longer = replace(plans[0], teacher_recipe={**plans[0].teacher_recipe, "epochs": 7})
    assert models_of(longer)[0].name != teacher.name


@pytest.mark.parametrize(
    ("name", "table", "preset"),
    [("digits", "2a", "paper"), ("mit67", "1a", "paper"), ("cub200", "2c", "small")],
)
def test_a_data_set_that_a_table_cannot_be_made_of_is_refused(name, table, preset):
    with pytest.raises(ValueError, match=rf"--dataset: expected one of .* table {table}.*{name}"):
        check_data_set(name, table, preset)


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

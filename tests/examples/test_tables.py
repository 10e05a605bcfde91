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
pytest.importorskip("optuna", reason="needs the examples extra")
pytest.importorskip("matplotlib", reason="needs the examples extra")

from optuna.trial import TrialState
from paper.methods import TABLE_1, TABLE_2
from paper.tables import report as table_report
from paper.tables.cells import GRIDS, items_of, plan_of
from paper.tables.estimate import dry_run
from paper.tables.queue import open_storage
from paper.tables.runs import check_data_set
from tables import lines_of_others, write_lines

PROGRAM = Path(__file__).parents[2] / "examples" / "tables.py"
MINIATURE = ("--table", "1a", "--preset", "small", "--dataset", "digits", "--epochs", "1")
MINIATURE += ("--steps-per-epoch", "3", "--methods", "student", "mi", "--regimes", "4", "8")
MINIATURE += ("--seeds", "2", "--lease", "4")
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


def kill_in_a_run(worker: subprocess.Popen[str], folder: Path) -> None:
    """Kills a worker that is in a run of a cell and has finished three."""
    while not (folder / "1a-digits.jsonl").exists() or len(read(folder)) < 1 + 3:
        assert worker.poll() is None, worker.stdout.read()
        time.sleep(0.02)
    while True:
        worker.send_signal(signal.SIGSTOP)
        if running(folder):
            break
        worker.send_signal(signal.SIGCONT)
        time.sleep(0.02)
    worker.kill()
    worker.communicate()


def running(folder: Path) -> int:
    return len(trials(folder, TrialState.RUNNING))


def trials(folder: Path, state: TrialState) -> list:
    storage = open_storage(str(folder / "journal.log"))
    return [
        trial
        for study in storage.get_all_studies()
        for trial in storage.get_all_trials(study._study_id, states=(state,))
    ]


def test_a_killed_table_is_finished_by_two_workers_without_repeating(tmp_path, capsys):
    first = start(tmp_path)
    kill_in_a_run(first, tmp_path)
    before = read(tmp_path)
    workers = [start(tmp_path), start(tmp_path)]
    printed = [worker.communicate(timeout=300)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], printed
    after = read(tmp_path)
    cells = [record for record in after if not record["pretrained"]]
    assert len(cells) == RUNS
    names = ("method", "n", "stage", "seed", "choice")
    assert len({json.dumps([r[name] for name in names]) for r in cells}) == RUNS
    assert all(record in after for record in before)
    assert len(after) - len(before) == sum(text.count("validation") for text in printed)
    assert all("validation" in text for text in printed)
    assert len(trials(tmp_path, TrialState.FAIL)) == 1  # the killed run; it was made again
    assert all((r["test"] is None) == (r["stage"] == "search") for r in after)
    assert {"command", "revision", "versions", "seconds", "seed"} <= after[0].keys()
    assert start(tmp_path).communicate(timeout=300)[0] == ""
    assert read(tmp_path) == after
    table_report.main([str(tmp_path / "1a-digits.jsonl"), "--output", str(tmp_path)])
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
    table_report.main([str(file), "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert printed.strip() == (tmp_path / "1a-cifar10.md").read_text().strip()
    assert "| method | 500 images a class | all images a class |" in printed
    assert "| *the paper's column* | *CIFAR-10, 500* | *CIFAR-10, full(5000)* |" in printed
    assert "| Student | 70.00 (79.82) | - (90.71) |" in printed
    assert "| MI | 81.00 ± 1.00 (86.49) | 81.00 ± 1.00 (91.76) |" in printed
    assert "cifar10: wrn-40-2, 94.00 % of its test images" in printed
    assert "MI at 500: mi 10" in printed
    assert "1 or 3 seeds, unfinished cells included" in printed


def test_on_another_data_set_the_paper_is_matched_by_rank():
    runs = [record("kd", n, 0, 50.0, dataset="fashion-mnist") for n in (10, 30, 100)]
    (table,) = table_report.read_tables(runs)
    assert [table.paper["kd", n] for n in (10, 30, 100)] == [65.94, 81.88, 85.39]


def test_runs_that_do_not_belong_to_one_cell_are_refused():
    with pytest.raises(ValueError, match=r"kd with 10: .*a seed each; got 1 recipes .* \[0, 0\]"):
        table_report.read_tables([record("kd", 10, 0, 50.0), record("kd", 10, 0, 51.0)])
    with pytest.raises(ValueError, match="got 2 recipes"):
        table_report.read_tables([record("kd", 10, 0, 50.0), record("kd", 10, 1, 5.0, epochs=9)])


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


def test_cells_of_other_recipes_are_other_studies():
    plan = plan_of("1a", "small")
    other = replace(plan, recipe={**plan.recipe, "epochs": 11})
    names = {item.name for items in items_of(plan) for item in items}
    assert {item.name for item in items_of(other)[1]}.isdisjoint(names)
    assert len(names) == 1 + len(plan.methods) * len(plan.regimes)


def test_tables_1b_of_other_amounts_of_images_are_other_studies():
    plan = plan_of("1b", "small")
    names = [
        {item.name for item in items_of(replace(plan, images_per_class=n))[1]} for n in (500, 1000)
    ]
    assert not names[0] & names[1]


@pytest.mark.parametrize(
    ("name", "table", "preset"),
    [("digits", "2a", "paper"), ("mit67", "1a", "paper"), ("cub200", "2c", "small")],
)
def test_a_data_set_that_a_table_cannot_be_made_of_is_refused(name, table, preset):
    with pytest.raises(ValueError, match=rf"--dataset: expected one of .* table {table}.*{name}"):
        check_data_set(name, table, preset)


def test_the_lines_of_another_commands_cells_stay_in_the_file(tmp_path):
    records = [
        {"method": method, "n": n, "pretrained": False}
        for method in ("student", "kd", "mi")
        for n in (10, 500)
    ]
    path = tmp_path / "1a-fashion-mnist.jsonl"
    write_lines(path, [*records, {"method": "student", "n": None, "pretrained": True}])
    plan = replace(plan_of("1a", "small"), methods=("student", "kd"), regimes=(10,))
    kept = [(record["method"], record["n"]) for record in lines_of_others(path, plan)]
    assert kept == [("student", 500), ("kd", 500), ("mi", 10), ("mi", 500)]
    assert lines_of_others(tmp_path / "none.jsonl", plan) == []

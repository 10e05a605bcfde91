import json

import pytest

pytest.importorskip("filelock", reason="needs the examples extra")
pytest.importorskip("matplotlib", reason="needs the examples extra")

from paper.tables import report
from paper.tables.results import read_tables


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
    assert "over 1 or 3 seeds (unfinished cells included) at 500, 3 seeds at all." in printed


def test_cells_of_one_number_of_seeds_are_said_once_and_columns_of_others_by_name():
    five = [[record("kd", n, seed, 50.0) for seed in range(5)] for n in (10, 30)]
    three = [record("kd", 100, seed, 50.0) for seed in range(3)]
    for runs, said in (
        ([*five[0], *five[1]], "deviation over 5 seeds. In"),
        ([*five[0], *five[1], *three], "deviation over 5 seeds at 10 and 30, 3 seeds at 100. In"),
    ):
        (table,) = read_tables(runs)
        assert said in report.markdown(table, "picture.png")


def test_a_cell_without_a_test_is_named_and_every_teacher_of_the_table_is():
    runs = [record("student", 10, 0, 50.0), {**record("mi", 10, 100, 0.0), "stage": "search"}]
    runs += [{**record("at", 10, 100, 0.0), "stage": "search", "table": "1b"}]
    teacher = {**record("student", None, 0, 94.0), "pretrained": True, "student": "wrn-40-2"}
    (table,) = read_tables([*runs, teacher, {**teacher, "test": 93.0}, teacher])
    page = report.markdown(table, "picture.png")
    assert "- Begun, and not tested yet: MI at 10." in page
    assert page.count("- Trained beforehand on cifar10: wrn-40-2, 94.00 %") == 1
    assert page.count("- Trained beforehand on cifar10: wrn-40-2, 93.00 %") == 1
    (table,) = read_tables([*runs, record("mi", 10, 0, 60.0)])
    assert "not tested yet" not in report.markdown(table, "picture.png")


def test_on_another_data_set_the_paper_is_matched_by_rank():
    runs = [record("kd", n, 0, 50.0, dataset="fashion-mnist") for n in (10, 30, 100)]
    (table,) = read_tables(runs)
    assert [table.paper["kd", n] for n in (10, 30, 100)] == [65.94, 81.88, 85.39]


def test_runs_that_do_not_belong_to_one_cell_are_refused():
    with pytest.raises(ValueError, match=r"kd with 10: .*a seed each; got 1 recipes .* \[0, 0\]"):
        read_tables([record("kd", 10, 0, 50.0), record("kd", 10, 0, 51.0)])
    with pytest.raises(ValueError, match="got 2 recipes"):
        read_tables([record("kd", 10, 0, 50.0), record("kd", 10, 1, 5.0, epochs=9)])


def test_a_cell_of_vid_has_its_diagnostics_beside_its_accuracy():
    seen = [{"explained_variance/a->b": x, "nats_per_element/a->b": 2 * x} for x in (0.2, 0.4)]
    two = {**seen[1], "explained_variance/c->d": 0.9, "channels_on_floor/a->b": 7.0}
    runs = [record("mi", 10, 0, 80.0, transfer=seen[0]), record("mi", 10, 1, 80.0, transfer=two)]
    runs += [record("kd", 10, 0, 70.0, transfer={}), record("student", 10, 0, 60.0)]
    (table,) = read_tables(runs)
    page = report.markdown(table, "picture.png")
    assert "| MI | 80.00 ± 0.00; explained 0.50, nats 0.60 |" in page
    assert "| KD | 70.00 |" in page
    assert "| Student | 60.00 |" in page

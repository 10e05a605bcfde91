import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("accelerate", reason="needs the examples extra")
pytest.importorskip("torchvision", reason="needs the examples extra")
pytest.importorskip("timm", reason="needs the examples extra")

import tables
from paper.datasets.small_images import FORMATS
from paper.methods import TABLE_1, TABLE_2
from paper.models import build_model
from paper.tables.cells import cells_of, models_of
from paper.tables.estimate import dry_run
from paper.tables.grids import CLIP_ART, GRIDS
from paper.tables.plans import plan_of
from paper.tables.runner import check_data_set

from vid_loss import FeatureTap


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


def test_a_column_of_all_images_can_be_asked_for_but_not_in_1b(monkeypatch, capsys):
    columns = ["--regimes", "5", "all", "--dry-run"]
    monkeypatch.setattr(sys, "argv", ["tables.py", "--table", "2a", *columns])
    tables.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if "-student-" in line]
    assert [line.split("-student-")[1].split("-")[0] for line in lines] == 3 * ["5"] + 3 * ["all"]
    monkeypatch.setattr(sys, "argv", ["tables.py", "--table", "1b", *columns])
    with pytest.raises(SystemExit, match=r"--regimes: expected numbers of labels.*got all"):
        tables.main()


def test_every_method_of_the_paper_has_a_grid_of_its_own_terms():
    assert {*TABLE_1, *TABLE_2} == GRIDS.keys() >= CLIP_ART.keys()
    for method, grid in [*GRIDS.items(), *CLIP_ART.items()]:
        allowed = {*method.split("+"), "temperature", "hint", "lr"}
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
    [
        ("digits", "2a", "paper"),
        ("mit67", "1a", "paper"),
        ("cub200", "2c", "small"),
        ("digits", "2a", "gpu"),
    ],
)
def test_a_data_set_that_a_table_cannot_be_made_of_is_refused(name, table, preset):
    with pytest.raises(ValueError, match=rf"--dataset: expected one of .* table {table}.*{name}"):
        check_data_set(name, table, preset)


def test_clip_art_has_its_own_choices_and_a_model_of_its_own_that_is_finetuned():
    plan = plan_of("2a", "small", "openclipart")
    cells = {cell.method: cell for cell in cells_of(plan)}
    assert cells["fitnet"].choices == CLIP_ART["fitnet"]
    assert cells["lwf"].choices == GRIDS["lwf"]
    assert models_of(plan) == []  # its teacher's weights are published ones
    assert plan.finetuned == plan.teacher != plan.student


def test_the_stages_of_clip_arts_two_models_have_one_size():
    plan = plan_of("2a", "small", "openclipart")
    students, teachers = zip(*plan.recipe["layers"].stages, strict=True)
    small = shapes(build_model(plan.student, 21), students, 64)
    large = shapes(build_model(plan.teacher, 1000), teachers, 64)
    assert small == large == [(16, 16), (8, 8), (4, 4), (2, 2)]


@pytest.mark.parametrize(("table", "student"), [("2a", "resnet18"), ("2b", "vgg9")])
def test_one_gpu_has_the_papers_students_and_larger_pictures(table, student):
    plan = plan_of(table, "gpu")
    assert (plan.student, plan.methods) == (student, TABLE_2)
    assert FORMATS[plan.dataset].size == 128
    assert len({plan.student, plan.teacher, plan.finetuned}) == 3
    assert plan.recipe.get("layers") is None  # those of a small student are not theirs
    assert cells_of(plan)[0].n == 5


def test_one_gpu_has_no_plan_for_the_other_tables():
    with pytest.raises(ValueError, match=r"--table: expected one of 2a, 2b .*got '1a'"):
        plan_of("1a", "gpu")


def test_the_small_form_takes_clip_art_of_every_size():
    plans = [plan_of("2a", "small", name) for name in ("openclipart", "openclipart-96")]
    assert [plan.dataset for plan in plans] == ["openclipart", "openclipart-96"]
    assert plans[0].recipe == plans[1].recipe


def shapes(model: torch.nn.Module, layers: tuple[str, ...], size: int) -> list[tuple[int, ...]]:
    with torch.no_grad(), FeatureTap(model.eval(), layers) as tap:
        model(torch.zeros(1, 3, size, size))
        return [tuple(x.shape[2:]) for x in tap.collect().values()]

import json

import pytest
import torch

pytest.importorskip("accelerate", reason="needs the examples extra")
pytest.importorskip("torchvision", reason="needs the examples extra")
pytest.importorskip("timm", reason="needs the examples extra")
pytest.importorskip("filelock", reason="needs the examples extra")
pytest.importorskip("matplotlib", reason="needs the examples extra")

from paper.methods import find_layers
from paper.models import build_model
from paper.tables import tries
from paper.tables.cells import Run
from paper.tables.tries import AS_IT_IS, VARIANTS
from paper.tables.tries_report import markdown


class MadeUp:
    """In the place of Runner: remembers the runs, and gives them an accuracy."""

    runs: tuple[Run, ...] = ()

    def __init__(self, *_: object) -> None: ...

    def execute(self, run: Run) -> dict:
        MadeUp.runs += (run,)
        return {"pretrained": False, "method": run.cell.method, "validation": 50.0}


def test_each_variant_changes_one_thing_and_no_two_runs_have_one_name():
    base = {cell.method: cell for cell in tries.tries([AS_IT_IS], [0], {})}
    names = []
    for name in VARIANTS:
        for cell in tries.tries([name], [0, 1], {}):
            own = base[cell.method]
            changed = [k for k, x in cell.plan.recipe.items() if x != own.plan.recipe.get(k)]
            changed += ["dataset"] * (cell.plan.dataset != own.plan.dataset)
            changed += ["choice"] * (cell.choice != own.choice)
            assert len(changed) == (name != AS_IT_IS), (name, changed)
            names += [run.name for run in cell.wanted({})]
            assert {run.stage for run in cell.wanted({})} == {"search"}  # no test picture is seen
    assert len(set(names)) == len(names)


def test_the_stages_that_are_left_out_are_some_of_those_that_are_matched():
    student, teacher = build_model("resnet18", 21), build_model("tf_efficientnet_lite2", 1000)
    found = find_layers(student, teacher, torch.zeros(1, 3, 128, 128))
    every = {(pair.student, pair.teacher) for pair in found.stages}
    for name in ("without-last-stage", "last-two-stages", "last-stage"):
        layers = VARIANTS[name].recipe["layers"]
        assert set(layers.stages) < every
        assert layers.classifiers == found.classifiers


def test_a_second_worker_makes_what_is_left(monkeypatch, tmp_path):
    monkeypatch.setattr(tries, "Runner", MadeUp)
    monkeypatch.setattr(tries, "start_accelerator", lambda: None)
    monkeypatch.setattr(MadeUp, "runs", ())
    given = ["--output", str(tmp_path), "--seeds", "1", "2", "--epochs", "1", "--variants"]
    tries.main([*given, "lambda-3"])
    tries.main([*given, "lambda-3", "64px"])
    lines = [json.loads(x) for x in (tmp_path / "tries.jsonl").read_text().splitlines()]
    assert [x["variant"] for x in lines] == ["lambda-3"] * 2 + ["64px"] * 10
    assert len(MadeUp.runs) == len({run.name for run in MadeUp.runs}) == 12
    assert {run.cell.plan.recipe["epochs"] for run in MadeUp.runs} == {1}


def test_the_report_compares_per_seed_with_the_others_of_the_variant_or_of_none():
    def line(variant: str, method: str, seed: int, validation: float) -> dict:
        found = {"explained_variance/a->b": 0.5, "nats_per_element/a->b": 1.0}
        return {
            "variant": variant,
            "method": method,
            "seed": seed,
            "validation": validation,
            "transfer": found if method == "mi-i" else {},
        }

    lines = [line(AS_IT_IS, "finetuned", seed, 30.0 + 10 * seed) for seed in (1, 2)]
    lines += [line(AS_IT_IS, "mi-i", seed, 31.0 + 10 * seed) for seed in (1, 2)]
    lines += [line("64px", "finetuned", 1, 20.0), line("64px", "mi-i", 1, 25.0)]
    lines += [line("lambda-3", "mi-i", 2, 47.0)]
    header, _, *rows = markdown(lines).splitlines()
    assert header == (
        "| variant | Finetuned | MI-I | MI-I explains | MI-I over finetuned | MI-I over fitnet |"
    )
    assert rows == [
        "| as-it-is | 45.0 ± 7.1 (2) | 46.0 ± 7.1 (2) | 0.50 | +1.0 ± 0.0 | - |",
        "| 64px | 20.0 (1) | 25.0 (1) | 0.50 | +5.0 | - |",
        "| lambda-3 | - | 47.0 (1) | 0.50 | -3.0 | - |",
    ]

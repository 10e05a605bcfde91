import json
import math

import pytest

pytest.importorskip("torchvision", reason="needs the examples extra")
pytest.importorskip("sklearn", reason="needs the examples extra")
pytest.importorskip("matplotlib", reason="needs the examples extra")
pytest.importorskip("tqdm", reason="needs the examples extra")

from paper.datasets.package_texts import SECTIONS, read_texts
from paper.lines import read_lines
from paper.q_fit.program import main
from paper.q_fit.report import table
from paper.q_fit.runs import SETTINGS, Run, head_groups, least_from_50, milestones
from torch import nn

from vid_loss import Distiller, __version__
from vid_loss.optimizer import head_learning_rate

SETTING_NAMES = ("adamw-1e-3", "bfloat16")
MINIATURE = ("--tasks", "digits", "--settings", *SETTING_NAMES, "--seeds", "3", "--steps", "55")
MINIATURE += ("--workers", "1", "--teacher-steps", "5")
MINIATURE += ("--option", "norm=none", "--option", "hidden_channels=4")


def line(version: str, seed: int, accuracy: float, explained: float, **changes) -> dict:
    """A line of the file with two pairs, the second of which is fitted worse by 0.2."""
    return {
        "version": version,
        "revision": "new",
        "task": "digits",
        "setting": "sgd-0.1",
        "seed": seed,
        "head_lr": None,
        "lambda": None,
        "options": {},
        "accuracy": accuracy,
        "explained_variance": {"end": {"a": explained, "b": explained - 0.2}},
        "nats": {"end": {"a": 1.0, "b": 0.5}},
        "least_nats": {"a": 0.25, "b": -0.125},
        **changes,
    }


def cells(text: str) -> list[dict[str, str]]:
    rows = [
        [x.strip() for x in row.strip("|").split("|")] for row in text.split("\n\n")[1].split("\n")
    ]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def test_a_miniature_writes_a_line_per_run_once_and_reports_them(tmp_path, capsys):
    output = ("--output", str(tmp_path / "lines.jsonl"))
    run = ("run", *MINIATURE, "--work", str(tmp_path / "work"), *output)
    main(run)
    assert "2 runs are left" in capsys.readouterr().out
    lines = read_lines(tmp_path / "lines.jsonl")
    assert {x["setting"] for x in lines} == set(SETTING_NAMES)
    for found in lines:
        assert found["version"] == __version__
        assert found["options"] == {"norm": "none", "hidden_channels": 4}
        assert set(found["nats"]) == set(found["explained_variance"]) == {"50", "end"}
        pairs = {"stage2->stage2", "classifier:input->classifier"}
        assert set(found["least_nats"]) == set(found["variance"]) == pairs
        assert 0 <= found["accuracy"] <= 100
    main(run)
    assert "0 runs are left" in capsys.readouterr().out
    assert read_lines(tmp_path / "lines.jsonl") == lines
    main(("report", *output))
    row = "| digits | bfloat16 | default, hidden_channels=4, norm=none | 1 |"
    assert row in capsys.readouterr().out
    assert row in (tmp_path / "lines.md").read_text()


def test_views_are_runs_of_their_own_and_have_a_row(tmp_path, capsys):
    output = ("--output", str(tmp_path / "lines.jsonl"))
    few = ("--settings", "sgd-0.1", "--steps", "4", "--views", "free", "1", "3")
    main(("run", *MINIATURE, *few, "--work", str(tmp_path / "work"), *output))
    lines = read_lines(tmp_path / "lines.jsonl")
    assert sorted(str(x["views"]) for x in lines) == ["1", "3", "None"]
    main(("report", *output))
    text = capsys.readouterr().out
    for views in ("", "views 1, ", "views 3, "):
        assert f"| digits | sgd-0.1 | default, {views}hidden_channels=4, norm=none | 1 |" in text


def test_what_a_line_says_of_its_steps():
    steps = [float(step) for step in range(1, 121)]
    assert milestones({"a": steps}) == {
        "50": {"a": 45.5},
        "100": {"a": 95.5},
        "end": {"a": 115.5},
    }
    assert least_from_50([*steps[:49], 7.0, 9.0]) == 7.0
    assert math.isnan(least_from_50([*steps[:49], 7.0, math.nan]))
    assert math.isnan(least_from_50(steps[:49]))


def test_a_line_is_of_the_run_that_has_all_its_settings():
    run = Run("digits", "sgd-0.1", 1, head_lr=0.1, options={"norm": "none"})
    kept = json.loads(json.dumps(run.identity() | {"accuracy": 1.0}))
    assert run.is_of(kept)
    others = {"seed": 2, "head_lr": None, "lambda": 3.0, "options": {}, "revision": "other"}
    assert not any(run.is_of(kept | {key: value}) for key, value in others.items())


def test_versions_stand_side_by_side_with_mean_and_deviation():
    lines = [
        line("0.1.0", 0, 99.0, 0.99, revision="older"),  # of a revision that has been replaced
        line("0.1.0", 0, 70.0, 0.5),
        line("0.1.0", 1, 80.0, 0.7),
        line("0.2.0", 0, 90.0, 0.9),
    ]
    (row,) = cells(table(lines))
    assert row["seeds"] == "2 / 1"
    assert row["accuracy, 0.1.0"] == "75.0 ± 7.1"
    assert row["accuracy, 0.2.0"] == "90.0"
    assert row["explained variance, 0.1.0"] == "0.50 ± 0.14"  # of the pairs' means 0.4 and 0.6
    assert row["nats, 0.1.0"] == "0.75 ± 0.00"
    assert row["least nats from step 50, 0.2.0"] == "-0.12"
    assert not any("best" in column for column in row)


def test_the_default_rate_is_compared_with_the_best_of_its_own_kind():
    lines = [
        line("0.2.0", 0, 90.0, 0.6),  # the mean of the pairs is 0.1 lower
        line("0.2.0", 0, 90.0, 0.9, head_lr=0.01),
        line("0.2.0", 0, 90.0, 0.3, head_lr=0.1),
        line("0.2.0", 0, 90.0, 1.1, head_lr=0.01, options={"norm": "none"}),
    ]
    of_best = "explained variance / best head rate's, 0.2.0"
    found = {row["heads"]: row[of_best] for row in cells(table(lines))}
    assert found == {
        "default": "0.62",
        "rate 0.01": "1.00",
        "rate 0.1": "0.25",
        "rate 0.01, norm=none": "1.00",
    }


def test_the_least_nats_are_unknown_if_a_step_had_none():
    broken = line("0.2.0", 0, 90.0, 0.9, least_nats={"a": 0.25, "b": float("nan")})
    (row,) = cells(table([broken]))
    assert row["least nats from step 50, 0.2.0"] == "nan"


@pytest.mark.parametrize("rate", [None, "student", 0.125])
def test_all_parameters_of_the_heads_are_trained_at_the_rate_asked_for(rate):
    student, teacher = nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2))
    distiller = Distiller(student, teacher, {"0": "0"}, example=student[0].weight.detach())
    optimizer = SETTINGS["sgd-0.1"].optimizer(student.parameters())
    for group in head_groups(distiller, optimizer, rate):
        optimizer.add_param_group(group)
    groups = optimizer.param_groups[1:]
    trained = {id(p) for group in groups for p in group["params"]}
    assert trained == {id(p) for p in distiller.parameters()}
    of_student = optimizer.param_groups[0]["lr"]
    expected = {None: head_learning_rate(optimizer), "student": of_student}
    assert {group["lr"] for group in groups} == {expected.get(rate, rate)}


def test_texts_are_unique_descriptions_of_the_sections_and_stay_as_they_were(tmp_path):
    packages = [f"Package: {x}\nDescription: A {x}\n more of it\nSection: {x}" for x in SECTIONS]
    packages += ["Package: other\nDescription: Another\nSection: oldlibs", "Package: none"]
    packages += [f"Package: twice\nSection: {SECTIONS[1]}\nDescription: A {SECTIONS[0]}"]
    file = tmp_path / "available"
    file.write_text("\n\n".join(packages))
    texts = read_texts(tmp_path / "kept.json", file)
    assert texts == [(f"A {x}", x) for x in sorted(SECTIONS)]
    file.write_text("")
    assert read_texts(tmp_path / "kept.json", file) == texts
    with pytest.raises(ValueError, match=r"available: expected descriptions of .*; got none of "):
        read_texts(tmp_path / "elsewhere.json", file)

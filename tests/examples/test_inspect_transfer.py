import sys

import pytest

pytest.importorskip("matplotlib", reason="needs the examples extra")
pytest.importorskip("sklearn", reason="needs the examples extra")
pytest.importorskip("tqdm", reason="needs the examples extra")

import inspect_transfer


def test_pictures_are_made_from_a_saved_run_that_is_not_trained_again(
    tmp_path, monkeypatch, capsys
):
    run, pictures = tmp_path / "run.pt", tmp_path / "pictures"
    command = ["inspect_transfer.py", "--run", str(run), "--output", str(pictures)]
    monkeypatch.setattr(sys, "argv", [*command, "--teacher-epochs", "1", "--epochs", "1"])
    inspect_transfer.main()
    names = {path.name for path in pictures.iterdir()}
    assert names == {"curves.png", "variances.png", "log_likelihood.png"}
    first = capsys.readouterr().out
    assert "stage2->stage2: stages end at 8 x 8" in first

    def refuse(*_):
        raise AssertionError("a saved run was trained again")

    monkeypatch.setattr(inspect_transfer, "fit", refuse)
    inspect_transfer.main()
    assert capsys.readouterr().out == first

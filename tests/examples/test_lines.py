"""Files of finished runs: a damaged line is named, and what is written is whole or absent."""

import json
import os
from types import SimpleNamespace

import pytest

pytest.importorskip("filelock", reason="needs the examples extra")

from _table_work import MADE, TESTS, Log, cells, finished_in, work_in
from paper import training
from paper.lines import read_lines
from paper.settings import Settings
from paper.tables import report

RUN = {"run": "one", **MADE}
DAMAGES = {
    "torn": json.dumps(RUN)[:20].encode(),
    "zeros": bytes(20),
    "empty": b"",
    "no text": b"\xff\xfe" * 10,
    "no object": b"7",
}


def damaged_file(folder, damage):
    path = finished_in(folder).path
    path.write_bytes(json.dumps(RUN).encode() + b"\n" + DAMAGES[damage] + b"\n")
    return path


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("reader", ["work", "report", "lines"])
def test_a_damaged_line_is_named(tmp_path, damage, reader):
    path = damaged_file(tmp_path, damage)
    read = {
        "work": lambda: work_in(tmp_path, cells("student"), Log()),
        "report": lambda: report.main([str(path), "--output", str(tmp_path)]),
        "lines": lambda: read_lines(path),
    }
    with pytest.raises(ValueError, match=r"jsonl, line 2: expected a run .* Delete that line"):
        read[reader]()


def test_without_that_line_its_run_is_made_again(tmp_path):
    path = damaged_file(tmp_path, "torn")
    path.write_text(path.read_text().splitlines()[0] + "\n")
    log = Log()
    work_in(tmp_path, cells("student"), log)
    assert len(log.runs) == TESTS


def test_a_kill_while_a_run_is_taken_up_leaves_its_settings(tmp_path, monkeypatch):
    def keep(method):
        accelerator = SimpleNamespace(wait_for_everyone=lambda: None, is_main_process=True)
        training._keep_settings(accelerator, Settings(method), tmp_path)

    keep("mi")
    settings = (tmp_path / "settings.json").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", die)  # written, and without its name yet
        with pytest.raises(KeyboardInterrupt, match="killed"):
            keep("kd")
    assert (tmp_path / "settings.json").read_text() == settings


def die(*_):
    raise KeyboardInterrupt("killed")

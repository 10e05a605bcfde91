"""What programs that start together make once; what they read meanwhile is whole."""

import json
from threading import Barrier
from types import SimpleNamespace

import pytest

pytest.importorskip("torchvision", reason="needs the examples extra")
pytest.importorskip("accelerate", reason="needs the examples extra")

from _together import together
from paper import demo
from paper.datasets import package_texts
from paper.datasets.package_texts import SECTIONS, read_texts
from paper.q_fit import training
from paper.q_fit.tasks import Places


def test_one_trains_a_teacher_and_all_read_it(tmp_path, monkeypatch):
    trained, train = [], training.train

    def counted(model, *arguments):
        trained.append(model)
        yield from train(model, *arguments)

    monkeypatch.setattr(training, "train", counted)
    places = Places(tmp_path, None, None, tmp_path / "work")

    def work():
        training.prepare_teacher("digits", places, 1)
        training.trained_teacher("digits", places, 1)

    together(work)
    assert len(trained) == 1


def test_all_read_whole_texts_if_all_have_found_none(tmp_path, monkeypatch):
    (tmp_path / "available").write_text(
        "\n\n".join(f"Section: {x}\nDescription: {n} of {x}" for x in SECTIONS for n in range(999))
    )
    all_write = Barrier(4)

    def dumps(content):
        all_write.wait(60)
        return json.dumps(content)

    monkeypatch.setattr(package_texts, "json", SimpleNamespace(dumps=dumps, loads=json.loads))
    found = []
    together(lambda: found.append(read_texts(tmp_path / "kept.json", tmp_path / "available")))
    assert [len(texts) for texts in found] == [999 * len(SECTIONS)] * 4


def test_one_writes_the_demo_s_pictures(tmp_path):
    images, labels, is_train = demo.student_digits()
    digits = images[:50], labels[:50], is_train[:50]
    written = []

    def write(root, digits):
        written.append(root)
        demo.write_class_folders(root, digits)

    def work():
        demo._write_once(tmp_path / "data/student", write, lambda: digits)
        assert len([*(tmp_path / "data/student").rglob("*.png")]) == 50

    together(work)
    assert len(written) == 1

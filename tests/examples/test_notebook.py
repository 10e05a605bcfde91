"""The notebook, run as it stands, and kept without what a run leaves."""

import json

import pytest
from _pages import ROOT

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")

PATH = ROOT / "examples" / "quickstart.ipynb"


def test_it_is_kept_without_outputs():
    notebook = json.loads(PATH.read_text())
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None), cell["id"]
        assert not cell["metadata"], cell["id"]
    assert notebook["metadata"]["language_info"] == {"name": "python"}


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    notebook = nbformat.read(PATH, as_version=4)
    client = nbclient.NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path_factory.mktemp("notebook"))}},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # threads of two would wait
        client.execute()  # an error in a cell is one here
    return {cell["id"]: cell.get("outputs", []) for cell in notebook.cells}


def text_of(outputs, stream="stdout"):
    written = [x["text"] for x in outputs if x.get("name") == stream]
    return "".join([*written, *(x["data"].get("text/plain", "") for x in outputs if "data" in x)])


def test_the_student_learns_more_with_the_teacher_and_pictures_are_seen(executed):
    last = text_of(executed["distil"]).splitlines()[-1]
    alone, distilled = (float(part.split(" %")[0]) for part in last.split(": ")[1:])
    assert distilled > alone + 2, last
    for cell in ("curves", "variances", "map"):
        assert any("image/png" in x.get("data", {}) for x in executed[cell]), cell
    assert "stage2->stage2" in text_of(executed["match"])
    assert "stage1" in text_of(executed["list"])
    assert text_of(executed["close"]) == "True"
    assert "it/s" in text_of(executed["teacher"], "stderr")

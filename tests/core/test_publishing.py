"""What is uploaded, and what others run and fill in: pyproject.toml, .ci/run, .github."""

import re
import sys
from itertools import chain

import pytest
from _pages import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]
CI = (ROOT / ".ci" / "run").read_text()


def documents(pattern):
    yaml = pytest.importorskip("yaml")
    found = {
        path.name: yaml.safe_load(path.read_text()) for path in (ROOT / ".github").glob(pattern)
    }
    assert found
    return found


def texts(value):
    """Yields every string of a document."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        yield from chain.from_iterable(
            map(texts, value.values() if isinstance(value, dict) else value)
        )


def test_each_extra_is_tried_alone_with_the_wheel():
    tried = re.findall(r'^with_extra (\w+) "', CI, re.MULTILINE)
    assert sorted(tried) == sorted(EXTRAS.keys() - {"examples", "test", "dev"})


def test_every_folder_with_code_is_in_the_wheel():
    roots = {"vid_loss": "vid_loss", "integrations": "vid_loss.integrations"}
    packages = set()
    for folder, name in roots.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            packages.add(".".join([name, *init.parent.relative_to(ROOT / folder).parts]))
    assert sorted(PYPROJECT["tool"]["setuptools"]["packages"]) == sorted(packages)


def test_the_lowest_versions_are_the_bounds():
    lines = (ROOT / "tests" / "lowest.txt").read_text().splitlines()
    lowest = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    given = chain(PROJECT["dependencies"], *(EXTRAS[x] for x in EXTRAS.keys() - {"dev"}))
    bounds = dict(re.findall(r"([\w-]+)>=([\d.]+)", "\n".join(given)))
    assert lowest.keys() == bounds.keys()
    for name, version in lowest.items():
        assert version.startswith(bounds[name]), name
        assert set(version.removeprefix(bounds[name])) <= {".", "0"}, name


def test_what_the_lowest_versions_are_tested_with_asks_for_no_newest_one():
    # Without a bound pip would try one release after the other for one that takes the old ones.
    free = [x for x in EXTRAS["test"] if ">=" not in x]
    assert free == ["vid-loss[examples,lightning]"]


def test_a_workflow_runs_everything_on_the_lowest_and_the_highest_python():
    ci = documents("workflows/*.yml")["ci.yml"]
    everything, lowest = ci["jobs"]["everything"], ci["jobs"]["lowest"]
    admitted = [x.split(" :: ")[-1] for x in PROJECT["classifiers"] if ":: 3." in x]
    assert everything["strategy"]["matrix"]["python"] == [admitted[0], admitted[-1]]
    assert PROJECT["requires-python"] == f">={admitted[0]}"
    assert "bash .ci/run" in texts(everything)
    commands = [step["run"] for step in lowest["steps"] if "run" in step]
    page = (ROOT / "CONTRIBUTING.md").read_text()
    for command in commands:  # as the page has them, in the environment of its own
        assert command.replace("python -m pip", "pip").removeprefix("python -m ") in page


def test_every_form_asks_for_the_report_with_a_command_that_runs():
    forms = documents("ISSUE_TEMPLATE/*.yml")
    del forms["config.yml"]
    for name, form in forms.items():
        commands = re.findall(
            r"(from vid_loss\S* import report; print\(report\(\w*\)\))", "\n".join(texts(form))
        )
        assert commands, name
        (asked,) = (x for x in form["body"] if x.get("id") == "report")
        assert asked["validations"]["required"]
        exec(next(x for x in commands if "report())" in x), {})


def test_the_files_that_name_the_version_name_the_same():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {PROJECT['version']}\n" in citation

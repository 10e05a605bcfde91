"""The patch of a train script: repeated, taken out, checked, refused, renewed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

timm = pytest.importorskip("timm")
pytest.importorskip("timm.task", reason="needs timm >= 1.0.27")

from vid_loss.integrations.timm import _patch  # noqa: E402  # after the skip
from vid_loss.integrations.timm._script import main, patch, run  # noqa: E402  # after the skip


def _break(script, old, new):
    text = script.read_text()
    assert old in text
    script.write_text(text.replace(old, new))


def test_patch_says_the_version_and_can_be_repeated_and_taken_out(script):
    before = script.read_bytes()
    assert f"timm {timm.__version__}" in patch(script)
    after = script.read_bytes()
    assert b"vid_task(args, task)" in after
    assert "patched already" in patch(script)
    assert script.read_bytes() == after
    assert "Took the patch out" in patch(script, reverse=True)
    assert "not patched" in patch(script, reverse=True)
    assert script.read_bytes() == before


def test_check_changes_nothing(script):
    before = script.read_bytes()
    assert "fits" in patch(script, check=True)
    assert script.read_bytes() == before
    patch(script)
    assert "is patched" in patch(script, check=True)


def test_line_ends_and_permissions_are_kept(script):
    script.write_bytes(script.read_bytes().replace(b"\n", b"\r\n"))
    script.chmod(0o750)
    before = script.read_bytes()
    patch(script)
    after = script.read_bytes()
    assert after.count(b"\n") == after.count(b"\r\n") > before.count(b"\n")
    assert script.stat().st_mode & 0o777 == 0o750
    patch(script, reverse=True)
    assert script.read_bytes() == before


def test_symlink_stays_one(script):
    link = script.with_name("link.py")
    link.symlink_to(script.name)
    patch(link)
    assert link.is_symlink()
    assert "is patched" in patch(script, check=True)


def test_interrupted_write_leaves_the_script(script, monkeypatch):
    before = script.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        patch(script)
    assert script.read_bytes() == before
    assert list(script.parent.iterdir()) == [script]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("    model = task.get_trainable_module()\n", "", "does not fit.*found them nowhere"),
        ("def _parse_args():\n", "def parse_args():\n", r"def _parse_args\(\)"),
        (
            "\ndef _parse_args():\n",
            "\ndef _parse_args():\n    return None\n\n\ndef _parse_args():\n",
            "found them 2 times",
        ),
    ],
)
def test_script_that_does_not_fit_is_refused_and_kept(script, capsys, old, new, message):
    _break(script, old, new)
    before = script.read_bytes()
    with pytest.raises(_patch.PatchError, match=f"(?s){message}"):
        patch(script)
    assert main(["patch", str(script)]) == 1
    assert str(script) in capsys.readouterr().err
    assert script.read_bytes() == before


def test_half_patched_script_is_refused(script):
    patch(script)
    _break(script, "        task = vid_task(args, task)\n", "")
    for options in ({}, {"check": True}, {"reverse": True}):
        with pytest.raises(_patch.PatchError, match="a part of the patch only"):
            patch(script, **options)


def test_missing_script_is_named(tmp_path):
    with pytest.raises(_patch.PatchError, match="there is no such file"):
        patch(tmp_path / "train.py")


def test_version_is_the_clones_own(script):
    version = script.parent / "timm" / "version.py"
    version.parent.mkdir()
    version.write_text("__version__ = '1.0.28'\n")
    assert "timm 1.0.28" in patch(script, check=True)
    version.write_text("__version__ = '1.0.26'\n")
    for command in (patch, lambda path: run(path, [])):
        with pytest.raises(_patch.PatchError, match=r"expected timm >= 1\.0\.27; found 1\.0\.26"):
            command(script)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_git_applies_the_same_patch(script):
    other = Path(shutil.copy(script, script.with_name("other.py")))
    patch(other)
    subprocess.run(["git", "apply", str(_patch.PATCH)], cwd=script.parent, check=True)
    assert script.read_bytes() == other.read_bytes()


def test_a_script_that_an_earlier_version_patched_says_what_to_do_and_is_renewed(script):
    plain = script.read_bytes()
    patch(script)
    now = script.read_text()
    script.write_text(now.replace("integrations.timm import", "integrations.timm_arguments import"))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 1
    assert "Run once: python -m vid_loss.integrations.timm patch" in done.stderr
    assert "Renewed" in patch(script)
    assert script.read_text() == now
    script.write_text(now.replace("integrations.timm import", "integrations.timm_arguments import"))
    patch(script, reverse=True)
    assert script.read_bytes() == plain


def test_command_line_runs_before_timm_is_imported(script):
    """A clone's own timm must be the one that its train.py imports."""
    (script.parent / "timm").mkdir()
    (script.parent / "timm" / "__init__.py").write_text("raise SystemExit('the clone')\n")
    command = [sys.executable, "-m", "vid_loss.integrations.timm"]
    done = subprocess.run([*command, "patch", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"timm {timm.__version__}" in done.stdout
    done = subprocess.run([*command, "run", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (1, "the clone")

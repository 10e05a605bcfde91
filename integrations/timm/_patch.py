"""The patch of timm's train script: whether it fits, with it, without it."""

import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

PATCH = Path(__file__).with_name("train.patch")
MODULE = "from vid_loss.integrations.timm import add_vid_arguments"
OLD_MODULE = "from vid_loss.integrations.timm_arguments import add_vid_arguments"
_LEAST_TIMM = (1, 0, 27)

State = Literal["plain", "patched"]


class PatchError(Exception):
    """A train script that cannot be patched, and what to do about it."""


@dataclass(frozen=True)
class Hunk:
    """A place of the script: its lines before and after, context included."""

    before: str
    after: str


def hunks_for(script: str) -> list[Hunk]:
    """Reads the patch that comes with this package, with the line ends of the script's text."""
    patch = PATCH.read_text(encoding="utf-8")
    if "\r\n" in script:
        patch = patch.replace("\n", "\r\n")
    hunks = []
    for chunk in re.split(r"^@@ .*\n", patch, flags=re.MULTILINE)[1:]:
        lines = chunk.splitlines(keepends=True)
        before, after = ("".join(x[1:] for x in lines if x[0] in kinds) for kinds in (" -", " +"))
        hunks.append(Hunk(before, after))
    return hunks


def state_of(script: str, hunks: Sequence[Hunk]) -> State:
    """Says whether a script's text is plain or patched.

    Raises:
        PatchError: if it is neither: another script, a version that the patch does not fit, or a
            patch that was undone in part.
    """
    if all(_occurrences(hunk.after, script) == 1 for hunk in hunks):
        return "patched"
    if any(hunk.after in script for hunk in hunks):
        raise PatchError("it holds a part of the patch only. Restore the file, then patch it.")
    for hunk in hunks:
        count = _occurrences(hunk.before, script)
        if count != 1:
            found = "nowhere" if count == 0 else f"{count} times"
            raise PatchError(
                f"the patch does not fit: expected these lines once, found them {found}:\n\n"
                f"{hunk.before}\nUse timm's train.py of 1.0.27 or newer, or make the changes of "
                f"{PATCH} by hand."
            )
    return "plain"


def _occurrences(block: str, script: str) -> int:
    """Counts a block of whole lines."""
    return f"\n{script}".count(f"\n{block}")


def apply(script: str, hunks: Sequence[Hunk]) -> str:
    """Returns a plain script's text with the patch."""
    for hunk in hunks:
        script = _replace(script, hunk.before, hunk.after)
    return script


def reverse(script: str, hunks: Sequence[Hunk]) -> str:
    """Returns a patched script's text without the patch."""
    for hunk in hunks:
        script = _replace(script, hunk.after, hunk.before)
    return script


def _replace(script: str, old: str, new: str) -> str:
    return f"\n{script}".replace(f"\n{old}", f"\n{new}")[1:]


def read_script(path: Path) -> str:
    """Reads a script as it is, line ends included.

    Raises:
        PatchError: if there is no such file.
    """
    if not path.is_file():
        raise PatchError("there is no such file. Name train.py in a clone of timm's repository.")
    with path.open(encoding="utf-8", newline="") as file:
        return file.read()


def write_script(path: Path, text: str) -> None:
    """Writes a file whole or not at all, with the permissions that it had."""
    path = path.resolve()
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            file.write(text)
        shutil.copymode(path, temporary)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def timm_version(path: Path) -> str:
    """Returns the version of the timm that goes with a script: the one beside it, or installed.

    Raises:
        PatchError: if there is none, or it is older than the tasks that VID builds on.
    """
    beside = path.resolve().parent / "timm" / "version.py"
    try:
        match = re.search(r"""["'](.+)["']""", beside.read_text()) if beside.is_file() else None
        version = match[1] if match else metadata.version("timm")
    except metadata.PackageNotFoundError:
        raise PatchError("timm is not installed. Run: pip install 'vid-loss[timm]'") from None
    if tuple(int(part) for part in re.findall(r"\d+", version)[:3]) < _LEAST_TIMM:
        raise PatchError(f"expected timm >= 1.0.27; found {version}. Run: pip install -U timm")
    return version

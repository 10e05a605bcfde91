"""What a checkpoint's folder must hold, with a digest of each file."""

import hashlib
import json
from pathlib import Path

_NAME = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Writes down every file of a folder, when all of them are there."""
    manifest = folder / _NAME
    paths = sorted(path for path in folder.rglob("*") if path != manifest)
    files = {path.relative_to(folder).as_posix(): _digest(path) for path in paths}
    manifest.write_text(json.dumps(files, indent=1))


def damage_of(folder: Path) -> str | None:
    """Returns what is wrong with a folder, or None if it is what was written."""
    try:
        files = json.loads((folder / _NAME).read_text())
    except FileNotFoundError:
        return f"no {_NAME}"
    except (OSError, ValueError) as error:
        return f"{_NAME}: {error}"
    if not isinstance(files, dict) or not files:
        return f"{_NAME} without files"
    for name, expected in files.items():
        try:
            found = _digest(folder / name)
        except FileNotFoundError:
            return f"no {name}"
        except OSError as error:
            return f"{name}: {error}"
        if found != expected:
            return f"other bytes in {name}"
    return None


def _digest(path: Path) -> str | None:
    """A file's digest; none for a folder."""
    if path.is_dir():
        return None
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

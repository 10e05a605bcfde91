"""Files with a JSON object per line, one per finished run."""

import json
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the runs of a file.

    Raises:
        ValueError: if one is damaged, as a kill or a full disk leaves the last one.
    """
    lines = path.read_bytes().splitlines()
    return [_read(path, number, line) for number, line in enumerate(lines, 1)]


def _read(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise ValueError(
            f"{path}, line {number}: expected a run as a JSON object; got {line[:60]!r}. Delete "
            "that line: its run is made again."
        )
    return record

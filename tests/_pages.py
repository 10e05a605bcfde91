"""The pages of the repository: every README.md, what else is prose, and the code inside."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
LIBRARY = ROOT / "vid_loss" / "README.md"
PAGES = sorted(
    page
    for place in (".", "vid_loss", "integrations", "examples", "tests")
    for page in (ROOT / place).glob("*.md" if place == "." else "**/*.md")
)

_FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """One fenced block: its page, language and first line, and what stands in it."""

    page: Path
    language: str
    line: int
    code: str

    def __str__(self) -> str:
        return f"{name_of(self.page)}, line {self.line}"


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, *languages: str) -> Iterator[Block]:
    """Yields the page's fenced blocks in these languages."""
    text = page.read_text()
    for match in _FENCE.finditer(text):
        if match["language"] in languages:
            line = text[: match.start()].count("\n") + 2
            yield Block(page, match["language"], line, match["code"])


def prose(page: Path) -> str:
    """Returns the page without its fenced blocks."""
    return _FENCE.sub("", page.read_text())

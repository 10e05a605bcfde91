"""The library page's table of models and setups that work: each row is a test that there is."""

import ast
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "vid_loss" / "README.md"
ROWS = re.findall(r"\| \[test\]\((\S+) \"(test_\w+)\"\) \|$", PAGE.read_text("utf-8"), re.MULTILINE)


def test_the_table_is_read():
    table = (
        PAGE.read_text("utf-8").split("## Does it work with my model?")[1].split("## Caveats")[0]
    )
    assert len(ROWS) == len(re.findall(r"^\|", table, re.MULTILINE)) - 2 > 15


@pytest.mark.parametrize(("file", "name"), ROWS)
def test_a_row_is_a_test(file, name):
    tree = ast.parse((PAGE.parent / file).read_text("utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}

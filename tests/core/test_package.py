import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import vid_loss

PACKAGE = Path(vid_loss.__file__).parent


def test_public_names_are_few_and_exist():
    assert len(vid_loss.__all__) <= 12
    assert vid_loss.__all__ == sorted(vid_loss.__all__)
    assert all(hasattr(vid_loss, name) for name in vid_loss.__all__)


def test_version_is_the_distributions():
    assert vid_loss.__version__ == importlib.metadata.version("vid-loss")


def test_the_core_imports_torch_alone():
    code = (
        "import sys, torch; before = set(sys.modules); import vid_loss; "
        "print(*(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    standard = set(sys.stdlib_module_names)
    loaded = {name.split(".")[0] for name in done.stdout.split()} - standard
    assert loaded <= {"vid_loss", "torch"} | {n for n in loaded if n.startswith("__editable__")}
    # A second to import, and a decorator such as torch.compiler.disable is enough to do it.
    assert "torch._dynamo" not in done.stdout.split()


def test_no_arrow_runs_from_the_core_to_an_adapter_or_an_example():
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [getattr(node, "module", None) or "", *(a.name for a in node.names)]
                assert not any("integrations" in name or "examples" in name for name in names), path

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import vid_loss

REPOSITORY = Path(__file__).parents[2]
ROOTS = {
    "vid_loss": REPOSITORY / "vid_loss",
    "vid_loss.integrations": REPOSITORY / "integrations",
    "paper": REPOSITORY / "examples/paper",
}


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


def everything_imported():
    """Yields each file, the dotted name of what it imports, and the dotted name of its folder."""
    for package, root in ROOTS.items():
        for path in root.rglob("*.py"):
            folder = [*package.split("."), *path.relative_to(root).parts[:-1]]
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    yield from ((path, x.name.split("."), folder) for x in node.names)
                elif isinstance(node, ast.ImportFrom):
                    above = folder[: len(folder) - node.level + 1] if node.level else []
                    source = [*above, *filter(None, (node.module or "").split("."))]
                    yield from ((path, [*source, x.name], folder) for x in node.names)


def test_nothing_private_is_imported_from_another_folder():
    own = ("vid_loss", "paper")
    for path, name, folder in everything_imported():
        private = [i for i, x in enumerate(name) if x.startswith("_") and not x.startswith("__")]
        if name[0] in own and private:
            assert name[: private[0]] == folder, (path, ".".join(name))


def test_no_arrow_runs_from_the_core_to_an_adapter_or_an_example():
    for path, name, folder in everything_imported():
        if folder[:2] != ["vid_loss", "integrations"] and folder[0] == "vid_loss":
            assert name[:2] != ["vid_loss", "integrations"], path
            assert name[0] not in ("paper", "examples", "integrations"), path


def test_no_adapter_imports_another():
    for path, name, folder in everything_imported():
        if folder[:2] == name[:2] == ["vid_loss", "integrations"] and len(name) > 2:
            assert folder[2:3] in ([], name[2:3]), path

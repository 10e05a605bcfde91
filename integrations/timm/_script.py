"""The command line: timm's train script with VID, patched in its file or in memory alone."""

import argparse
import sys
import types
from collections.abc import Sequence
from pathlib import Path

from . import _patch
from ._patch import PatchError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``patch`` or ``run``.

    Args:
        argv: the arguments; the process's own if None.

    Returns:
        The exit status: 1 if the script cannot be patched.
    """
    args = _parser().parse_args(argv)
    path = Path(args.script)
    try:
        if args.command == "patch":
            sys.stdout.write(f"{patch(path, check=args.check, reverse=args.reverse)}\n")
        else:
            run(path, args.arguments)
    except PatchError as error:
        sys.stderr.write(f"{path}: {error}\n")
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vid_loss.integrations.timm",
        description="Variational Information Distillation in timm's train.py.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    patch_parser = commands.add_parser("patch", help="add --kd-distill-type vid to a train.py")
    patch_parser.add_argument("script", help="train.py in a clone of timm's repository")
    mode = patch_parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="say whether it fits, change nothing")
    mode.add_argument("--reverse", action="store_true", help="take the patch out again")
    run_parser = commands.add_parser("run", help="run a train.py with VID, without touching it")
    run_parser.add_argument("script", help="train.py in a clone of timm's repository")
    run_parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, metavar="-- ...", help="arguments of train.py"
    )
    return parser


def patch(path: Path, *, check: bool = False, reverse: bool = False) -> str:
    """Patches a train script, or takes the patch out again; does nothing where that was done.

    Args:
        path: timm's train.py.
        check: change nothing.
        reverse: take the patch out.

    Returns:
        What was done, for which version of timm.

    Raises:
        PatchError: if the patch does not fit; the file is then as it was.
    """
    written = _patch.read_script(path)
    script = written.replace(_patch.OLD_MODULE, _patch.MODULE)  # as 0.1.0 patched it
    version = _patch.timm_version(path)
    hunks = _patch.hunks_for(script)
    state = _patch.state_of(script, hunks)
    found = f"{path} (timm {version})"
    if check:
        return f"{found} is patched." if state == "patched" else f"The patch fits {found}."
    if reverse:
        if state == "plain":
            return f"{found} is not patched; nothing to do."
        _patch.write_script(path, _patch.reverse(script, hunks))
        return f"Took the patch out of {found}."
    if state == "patched" and script != written:
        _patch.write_script(path, script)
        return f"Renewed the patch of 0.1.0 in {found}."
    if state == "patched":
        return f"{found} is patched already; nothing to do."
    _patch.write_script(path, _patch.apply(script, hunks))
    return f"Patched {found}. Add --kd-distill-type vid to its arguments."


def run(path: Path, arguments: Sequence[str]) -> None:
    """Runs a train script with VID as ``python path ...`` would, without touching its file.

    Args:
        path: timm's train.py, patched or not.
        arguments: its arguments, with or without a leading ``--``.

    Raises:
        PatchError: if the patch does not fit.
    """
    script = _patch.read_script(path)
    _patch.timm_version(path)
    hunks = _patch.hunks_for(script)
    if _patch.state_of(script, hunks) == "plain":
        script = _patch.apply(script, hunks)
    module = types.ModuleType("__main__")
    module.__file__ = str(path)
    sys.argv = [str(path), *(arguments[1:] if arguments[:1] == ["--"] else arguments)]
    # As for any script: what lies beside it comes first, such as the clone's own timm.
    sys.path.insert(0, str(path.resolve().parent))
    sys.modules["__main__"] = module
    exec(compile(script, f"{path} with VID", "exec"), module.__dict__)

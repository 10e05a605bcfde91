"""Kills runs of the Accelerate loop, and compares where they end with a run that was left alone.

    PYTHONPATH=tests/integrations python tests/benchmarks/kill_loop.py --kills 100

Every second kill is at a random moment, the others come while a checkpoint is being written. A run
that has two checkpoints by then is left with the last of them damaged. All ends are compared to
the bit.
"""

import argparse
import contextlib
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import loop_child
import torch

KILLS_PER_RUN = 4


def start(output: Path) -> int:
    """Starts a run in a process of its own."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)
            sys.argv = ["loop_child.py", str(output)]
            loop_child.main()
            code = 0
        finally:
            os._exit(code)
    return child


def killed(output: Path, chance: random.Random, *, in_a_save: bool) -> bool:
    """Starts a run and kills it; whether it was still at work."""
    child = start(output)
    wanted = chance.randrange(1, 7)  # files of a checkpoint
    end = time.monotonic() + (60 if in_a_save else chance.uniform(0.1, 3))
    while time.monotonic() < end:
        if in_a_save and len(_listed(output / "checkpoints/partial")) >= wanted:
            break
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.0001)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def damage(output: Path, chance: random.Random) -> bool:
    """Cuts a file of the last checkpoint, unless it is the only one."""
    checkpoints = [x for x in _listed(output / "checkpoints") if x.startswith("epoch-")]
    if len(checkpoints) < 2:
        return False
    folder = output / "checkpoints" / max(checkpoints)
    path = folder / chance.choice(_listed(folder))
    os.truncate(path, chance.randrange(path.stat().st_size))
    return True


def finish(output: Path) -> dict:
    """Runs to the end, and returns what it came to."""
    assert os.waitpid(start(output), 0)[1] == 0, output
    return torch.load(output / "end-0.pt", weights_only=True)


def _listed(folder: Path) -> list[str]:
    with contextlib.suppress(FileNotFoundError):
        return sorted(os.listdir(folder))
    return []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    loop_child.EPOCHS = 8
    chance = random.Random(arguments.seed)
    kills = {"at random": 0, "in a save": 0}
    runs = equal = damaged = 0
    with tempfile.TemporaryDirectory() as scratch:
        whole = finish(Path(scratch) / "whole")
        while sum(kills.values()) < arguments.kills:
            output = Path(scratch) / str(runs)
            for number in range(KILLS_PER_RUN):
                how = "in a save" if number % 2 else "at random"
                kills[how] += killed(output, chance, in_a_save=how == "in a save")
            damaged += damage(output, chance)
            runs += 1
            try:
                torch.testing.assert_close(finish(output), whole, rtol=0, atol=0)
                equal += 1
            except AssertionError as error:
                print(f"run {runs}: {error}")
    print(f"kills: {kills}, of {runs} runs, {damaged} with a damaged checkpoint besides")
    print(f"ends equal to the whole run's: {equal} of {runs}")
    raise SystemExit(equal < runs)


if __name__ == "__main__":
    main()

"""Kills training runs, and compares where they end with a run that was left alone.

    PYTHONPATH=tests/integrations python tests/benchmarks/kill_loop.py --engine trainer --kills 100

Every second kill is at a random moment, the others come while a checkpoint is being written. A run
of the Accelerate loop that has two checkpoints by then is left with the last of them damaged. All
ends are compared to the bit.
"""

import argparse
import contextlib
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import loop_child
import torch
import trainer_child

KILLS_PER_RUN = 4


class Engine(NamedTuple):
    """What is killed."""

    run: Callable[[], None]
    written: Callable[[Path, int], int]  # files of a checkpoint that is being written since then
    files: int  # of a whole one
    damage: Callable[[Path, random.Random], bool]


def loop_written(output: Path, since: int) -> int:
    return len(_listed(output / "checkpoints/partial"))


def loop_damage(output: Path, chance: random.Random) -> bool:
    """Cuts a file of the last checkpoint, unless it is the only one."""
    checkpoints = [x for x in _listed(output / "checkpoints") if x.startswith("epoch-")]
    if len(checkpoints) < 2:
        return False
    folder = output / "checkpoints" / max(checkpoints)
    path = folder / chance.choice(_listed(folder))
    os.truncate(path, chance.randrange(path.stat().st_size))
    return True


def trainer_written(output: Path, since: int) -> int:
    """Counts what is new in folders that a kill before may have cut, too."""
    folders = [output / x for x in _listed(output) if x.startswith("checkpoint-")]
    return max((_new_files(x, since) for x in folders), default=0)


def _new_files(folder: Path, since: int) -> int:
    names = _listed(folder)
    if trainer_child.STATE in names:
        return 0
    with contextlib.suppress(FileNotFoundError):
        return sum((folder / name).stat().st_mtime_ns >= since for name in names)
    return 0


ENGINES = {
    "accelerate": Engine(loop_child.main, loop_written, 6, loop_damage),
    # Of the Trainer's own files nothing can be known but whether the last is there.
    "trainer": Engine(trainer_child.main, trainer_written, 7, lambda output, chance: False),
}


def start(engine: Engine, output: Path) -> int:
    """Starts a run in a process of its own."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)
            sys.argv = ["child.py", str(output)]
            engine.run()
            code = 0
        finally:
            os._exit(code)
    return child


def killed(engine: Engine, output: Path, chance: random.Random, *, in_a_save: bool) -> bool:
    """Starts a run and kills it; whether it was still at work."""
    since = time.time_ns()
    child = start(engine, output)
    wanted = chance.randint(1, engine.files)
    end = time.monotonic() + (60 if in_a_save else chance.uniform(0.1, 3))
    while time.monotonic() < end:
        if in_a_save and engine.written(output, since) >= wanted:
            break
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.0001)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def finish(engine: Engine, output: Path) -> dict:
    """Runs to the end, and returns what it came to."""
    assert os.waitpid(start(engine, output), 0)[1] == 0, output
    return torch.load(output / "end-0.pt", weights_only=True)


def cut(output: Path) -> int:
    """Counts the checkpoints of a Trainer that a kill has left without their last file."""
    folders = [x for x in _listed(output) if x.startswith("checkpoint-")]
    return sum(trainer_child.STATE not in _listed(output / x) for x in folders)


def _listed(folder: Path) -> list[str]:
    with contextlib.suppress(FileNotFoundError):
        return sorted(os.listdir(folder))
    return []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=ENGINES, default="accelerate")
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    engine = ENGINES[arguments.engine]
    loop_child.EPOCHS = 8
    chance = random.Random(arguments.seed)
    kills = {"at random": 0, "in a save": 0}
    runs = equal = damaged = halves = 0
    with tempfile.TemporaryDirectory() as scratch:
        whole = finish(engine, Path(scratch) / "whole")
        while sum(kills.values()) < arguments.kills:
            output = Path(scratch) / str(runs)
            for number in range(KILLS_PER_RUN):
                how = "in a save" if number % 2 else "at random"
                kills[how] += killed(engine, output, chance, in_a_save=how == "in a save")
            damaged += engine.damage(output, chance)
            halves += cut(output)
            runs += 1
            try:
                torch.testing.assert_close(finish(engine, output), whole, rtol=0, atol=0)
                equal += 1
            except AssertionError as error:
                print(f"run {runs}: {error}")
    print(f"kills: {kills}, of {runs} runs, {damaged} with a damaged checkpoint besides")
    if engine.run is trainer_child.main:
        print(f"checkpoints cut when a run was taken up for the last time: {halves}")
    print(f"ends equal to the whole run's: {equal} of {runs}")
    raise SystemExit(equal < runs)


if __name__ == "__main__":
    main()

"""Kills processes that fill a cache, and compares what is left with the teacher.

    PYTHONPATH=tests python tests/benchmarks/kill_cache.py --kills 100

Every second kill is at a random moment, the others come while a file is being written. After each,
another process's cache is asked for all samples, and what it serves is compared to the bit.
"""

import argparse
import os
import random
import signal
import tempfile
import time
import warnings
from pathlib import Path

import torch
from torch import nn

from vid_loss.cache import FeatureCache, _shards
from vid_loss.teacher import Teacher

SAMPLES, BATCH = 2048, 16


class Convolutions(nn.Module):
    """In float64, whose last bits differ with the size of a batch; in float16 none do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3)).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


def fill(folder: Path, images: torch.Tensor, seed: int) -> None:
    """What each process does until it is killed."""
    generator = torch.Generator().manual_seed(seed)
    cache, teacher = FeatureCache(folder), Teacher(Convolutions().eval(), ["body"], None)
    for _ in range(3):
        for rows in torch.randperm(len(images), generator=generator).split(BATCH):
            cache.features(teacher, (images[rows],), {}, rows)
    cache.flush()


def killed(folder: Path, images: torch.Tensor, seed: int, *, in_a_write: bool) -> bool:
    """Starts a process and kills it; whether it was still at work."""
    moment = random.Random(seed).uniform(0, 1.5)
    child = os.fork()
    if child == 0:
        warnings.simplefilter("error")
        code = 1
        try:
            fill(folder, images, seed)
            code = 0
        finally:
            os._exit(code)
    end = time.monotonic() + (30 if in_a_write else moment)
    waiting = random.Random(seed).randrange(1, 8)  # which file
    partial = ""
    while time.monotonic() < end:
        if in_a_write:
            names = [name for name in _listed(folder) if name.endswith(".partial")]
            if names and names[0] != partial:
                partial, waiting = names[0], waiting - 1
            if not waiting:
                break
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.0001)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def _listed(folder: Path) -> list[str]:
    return os.listdir(folder) if folder.is_dir() else []


def served(folder: Path, images: torch.Tensor, expected: torch.Tensor) -> tuple[int, int]:
    """How many samples' features a new process finds, and how many it serves wrongly."""
    cache = FeatureCache(folder, max_bytes=0)  # so that nothing is added
    model = Teacher(Convolutions().eval(), ["body"], None)
    wrong = 0
    for rows in torch.arange(len(images)).split(BATCH):
        got = cache.features(model, (images[rows],), {}, rows)["body"]
        wrong += int((got != expected[rows]).flatten(1).any(1).sum())
    found = sum(place is not None for place in cache._shards.places(range(len(images))))
    return found, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    _shards._FILE_BYTES = 512 * 1024
    images = torch.randn(SAMPLES, 3, 12, 12, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        batches = images.split(BATCH)
        expected = torch.cat([Convolutions().eval()(x) for x in batches]).half()
    kills = {"at random": 0, "in a write": 0}
    compared = wrong = leftovers = folders = 0
    seed = arguments.seed
    while sum(kills.values()) < arguments.kills:
        folders += 1
        with tempfile.TemporaryDirectory() as scratch:
            folder, alive = Path(scratch) / "features", True
            while alive and sum(kills.values()) < arguments.kills:
                seed += 1
                how = "in a write" if seed % 2 else "at random"
                alive = killed(folder, images, seed, in_a_write=how == "in a write")
                kills[how] += alive
                leftovers += sum(name.endswith(".partial") for name in _listed(folder))
                found, bad = served(folder, images, expected)
                compared, wrong = compared + found, wrong + bad
                assert not [x for x in _listed(folder) if x.endswith(".partial")]
    print(f"kills: {kills}, over {folders} folders; partial files left and removed: {leftovers}")
    print(f"features compared: {compared}; wrong: {wrong}")
    raise SystemExit(wrong > 0)


if __name__ == "__main__":
    main()

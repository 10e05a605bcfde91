"""How much code a feature and a batch pass through; it times nothing.

Run it as a program, ``python tests/benchmarks/count_calls.py``. It counts calls of Python functions
of this package, comprehensions included, and prints:

- of a plain ``Distiller`` step with one pair, how many different functions there are from the
  student's forward, where the hooks are, to the scalar;
- of a ``VIDTrainer`` training step with one pair, how many functions are called, and how often
  one is in another file than the one that was called before it;
- of a plain step with one pair of maps and with four, per pair: how many Python functions of any
  package are called, from the student's features to the end of backward, and how many operations
  of torch its forward has; and of these, how many compute something, which on a GPU are launches:
  neither views nor memory that is asked for.

A reader who follows a value opens that many functions, and turns to another file that often.
With ``--list`` it prints them.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
import torch.nn.functional as F
import vid_loss.integrations
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainingArguments
from vid_loss.integrations.hf import VIDTrainer

import vid_loss
from vid_loss import Distiller

NOTHING_COMPUTED = ("detach", "empty", "split_with_sizes", "_local_scalar_dense")
ROOTS = tuple(str(Path(x.__file__).parent) for x in (vid_loss, vid_loss.integrations))


class Maps(nn.Sequential):
    """A model of several maps."""

    def __init__(self) -> None:
        super().__init__(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(4)))


class Operations(TorchDispatchMode):
    """Counts operations, and those that compute something."""

    count = computing = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Counts an operation and does it."""
        self.count += 1
        self.computing += not (func.is_view or func.__name__.startswith(NOTHING_COMPUTED))
        return func(*args, **(kwargs or {}))


class Net(nn.Module):
    """A model of one tapped layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, width), nn.Linear(width, 3)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Returns logits, and the loss if there are labels."""
        logits = self.head(self.body(x))
        return {} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


@contextmanager
def counted() -> Iterator[list[CodeType]]:
    """Yields a list of what is called of this package in the block."""
    calls: list[CodeType] = []

    def profile(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(ROOTS):
            calls.append(frame.f_code)

    sys.setprofile(profile)
    try:
        yield calls
    finally:
        sys.setprofile(None)


def calls_of_plain_step() -> list[CodeType]:
    """The fourth step of a plain loop: the first three look at the optimizer and its gradients."""
    student, teacher, batch = Net(5), Net(7), torch.randn(2, 4)
    distiller = Distiller(student, teacher, {"body": "body"}, example=batch)
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.01)
    for _ in range(4):
        with counted() as calls:
            student(batch)
            loss = distiller(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return calls


def calls_of_trainer_step() -> list[CodeType]:
    """The third training step of a Trainer: the first two look into the optimizer."""
    steps: list[list[CodeType]] = []

    class Counted(VIDTrainer):
        def training_step(self, *args: object, **kwargs: object) -> Tensor:
            with counted() as calls:
                loss = super().training_step(*args, **kwargs)
            steps.append(calls)
            return loss

    rows = [{"x": torch.randn(4), "labels": i % 3} for i in range(12)]
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            max_steps=3,
            per_device_train_batch_size=4,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        pairs = {"body": "body"}
        Counted(Net(5), args, train_dataset=rows, teacher=Net(7), pairs=pairs).train()
    return steps[-1]


def costs(pairs: int) -> str:
    """Counts the Python calls and the operations of a step with so many pairs, the fourth."""
    student, teacher, batch = Maps(), Maps(), torch.randn(4, 8, 8, 8)
    layers = {f"{i}": f"{i}" for i in range(pairs)}
    distiller = Distiller(student, teacher, layers, example=batch)
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.01)
    for _ in range(4):
        student(batch)
        features = distiller.teacher_features(batch)
        called = 0

        def profile(frame: FrameType, event: str, _: object) -> None:
            nonlocal called
            called += event == "call"

        sys.setprofile(profile)
        distiller(teacher_features=features).backward()
        sys.setprofile(None)
        optimizer.step()
        student(batch)
        with Operations() as operations:
            distiller(teacher_features=distiller.teacher_features(batch))
    calls, count, computing = called, operations.count, operations.computing
    return (
        f"{pairs} pairs of maps, per pair: {calls / pairs:.0f} Python calls, {count / pairs:.0f} "
        f"operations in forward, {computing / pairs:.0f} of which compute"
    )


def report(title: str, count: Callable[[], list[CodeType]], every: bool) -> None:
    """Prints what was counted, and the functions in the order of their calls."""
    calls = count()
    turns = len(list(groupby(code.co_filename for code in calls))) - 1
    print(f"{title}: {len(set(calls))} functions, {len(calls)} calls, {turns} changes of file")  # noqa: T201  # a program
    for code in calls if every else ():
        print(f"  {Path(code.co_filename).name}:{code.co_firstlineno} {code.co_name}")  # noqa: T201  # a program


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--list", action="store_true", help="print the functions")
    options = parser.parse_args()
    report("plain Distiller step", calls_of_plain_step, options.list)
    report("VIDTrainer training step", calls_of_trainer_step, options.list)
    for number in (1, 4):
        print(costs(number))  # noqa: T201  # a program

"""Runs of the loop, in this process and in children."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from vid_loss import Distiller, Pair, VIDLoss
from vid_loss.diagnostics import METRICS

pytest.importorskip("accelerate", reason="needs the accelerate extra")
pytest.importorskip("safetensors", reason="needs the accelerate extra")

from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from vid_loss.integrations.accelerate import train

CHILD = Path(__file__).with_name("loop_child.py")
KILLED = -9


def make_accelerator(**options) -> Accelerator:
    config = DataLoaderConfiguration(use_seedable_sampler=True)
    return Accelerator(cpu=True, dataloader_config=config, **options)


def net(width: int, classes: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, classes))


def loader(count: int, *, unlabeled: int = 0, **options) -> DataLoader:
    generator = torch.Generator().manual_seed(count)
    inputs = torch.randn(count, 6, generator=generator)
    labels = (inputs[:, 0] > 0).long()
    labels[:unlabeled] = -100
    return DataLoader(TensorDataset(inputs, labels), batch_size=8, **options)


def run(
    accelerator, output, *, transfer=True, epochs=2, heads=True, loss=VIDLoss, **options
) -> tuple:
    set_seed(0)
    student, teacher = net(8, 2), net(16, 5)
    distiller = None
    if transfer:
        pairs, example = [Pair("2:input", "2", loss=loss)], torch.zeros(1, 6)
        distiller = Distiller(student, teacher, pairs, example=example)
    parameters = list(student.parameters())
    if distiller is not None and heads:
        parameters += distiller.parameters()
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    settings = {
        "optimizer": optimizer,
        "schedule": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs),
        "train_loader": loader(32, shuffle=True),
        "validation_loader": loader(13),
        "epochs": epochs,
        "output": output,
    }
    return train(accelerator, student, distiller, **{**settings, **options}), student, distiller


def launch(output: Path, *options: str, processes: int = 1) -> subprocess.CompletedProcess:
    command = [sys.executable]
    if processes > 1:  # accelerate launch starts one process on CPU, unless there is MPI
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(processes)]
    return subprocess.run(
        [*command, str(CHILD), str(output), *options],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def means_of(end: dict) -> dict:
    """What a run came to, but for the diagnostics: they describe each process's last batch."""
    history = [
        {name: value for name, value in epoch.items() if not name.startswith(METRICS)}
        for epoch in end["history"]
    ]
    return {**end, "history": history}


def finish(output: Path, *options: str, processes: int = 1) -> dict:
    """Runs the child to its end and returns what it came to, the same in every process."""
    done = launch(output, *options, processes=processes)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "of 21" in done.stdout
    ends = [torch.load(output / f"end-{i}.pt", weights_only=True) for i in range(processes)]
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=0, atol=0)
    return ends[0]


def net_parameters_at_start() -> torch.Tensor:
    set_seed(0)
    return net(8, 2)[0].weight.detach().clone()

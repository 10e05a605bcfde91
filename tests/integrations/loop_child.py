"""A training run in a process of its own: to be launched, killed and resumed by the tests."""

import argparse
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedType,
    FullyShardedDataParallelPlugin,
    set_seed,
)
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from vid_loss.integrations.accelerate import evaluate, train

from vid_loss import Distiller, VIDLoss
from vid_loss.pairs import Pair

EPOCHS = 3


def net(width: int, classes: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Dropout(0.1), nn.Linear(width, classes))


def samples(count: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 6, generator=generator)
    return TensorDataset(inputs, (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0).long())


def use_fsdp2_on_cpu(accelerator: Accelerator, from_one: bool) -> None:
    """Accelerate refuses FSDP on CPU. Its state says so, and its FSDP2 path runs on gloo."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, state_dict_type="SHARDED_STATE_DICT", cpu_ram_efficient_loading=from_one
    )
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin


def kill_after(calls: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, followed by SIGKILL the given number of calls from now."""
    remaining = calls

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal remaining
        result = function(*args, **kwargs)
        remaining -= 1
        if not remaining:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return counted


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--kill-at-step", type=int, default=0)
    parser.add_argument("--kill-in-save", type=int, default=0)
    parser.add_argument("--no-dropout", action="store_true")
    parser.add_argument("--fsdp", action="store_true")
    parser.add_argument("--from-one", action="store_true", help="only one process keeps weights")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    accelerator = Accelerator(
        cpu=True,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, split_batches=True),
    )
    if arguments.fsdp:
        use_fsdp2_on_cpu(accelerator, arguments.from_one)
    set_seed(0)
    student, teacher = net(8, 3), net(16, 5)
    if arguments.no_dropout:
        student[2].p = 0.0
    pairs = [Pair("1", "1", loss=VIDLoss), Pair("3:input", "3", 1.0)]
    distiller = Distiller(student, teacher, pairs, example=torch.zeros(1, 6))
    optimizer = torch.optim.SGD(
        [*student.parameters(), *distiller.parameters()], lr=0.05, momentum=0.9
    )

    def task_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(logits, labels)

    if arguments.kill_at_step:
        task_loss = kill_after(arguments.kill_at_step, task_loss)
    if arguments.kill_in_save:
        accelerator.save_state = kill_after(arguments.kill_in_save, accelerator.save_state)
    progress = train(
        accelerator,
        student,
        distiller,
        optimizer=optimizer,
        schedule=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS),
        train_loader=DataLoader(samples(32, 1), 8, shuffle=True),
        validation_loader=DataLoader(samples(13, 2), 8),
        epochs=EPOCHS,
        output=arguments.output,
        task_loss=task_loss,
        max_grad_norm=1.0,
    )
    if not arguments.fsdp:
        torch.save(
            {
                "student": student.state_dict(),
                "heads": distiller.state_dict(),
                "history": progress.history,
            },
            arguments.output / f"end-{accelerator.process_index}.pt",
        )
    exported = net(8, 3)
    exported.load_state_dict(load_file(arguments.output / "last.safetensors"))
    loader = accelerator.prepare(DataLoader(samples(21, 3), 8))
    accuracy = evaluate(accelerator, exported, loader)
    accelerator.print(f"accuracy {accuracy.correct} of {accuracy.total}")
    accelerator.end_training()
    if arguments.fsdp:
        # All is done. After FSDP2 on gloo, torch 2.14 aborts now and then once the interpreter has
        # ended: "terminate called without an active exception", and no Python frame is left.
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    main()

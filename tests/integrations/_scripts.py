"""Scripts as people have them, with the three lines, for two processes that share the data."""

import os
import sys
import traceback
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from _torchvision import torchvision_page  # noqa: F401  # one of the scripts that run() names
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.optim.swa_utils import AveragedModel

from vid_loss import Distiller

PAIRS = {"3": "3"}


def net(width):
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 10),
    )


def models(seed=0):
    torch.manual_seed(5)
    teacher = net(8)
    torch.manual_seed(seed)
    return net(4), teacher


def batches(rank, first, last):
    """The part of each step's batch that a process has."""
    for step in range(first, last):
        generator = torch.Generator().manual_seed(1000 * rank + step)
        images = torch.randn(8, 3, 8, 8, generator=generator) * (1 + rank)
        yield images, torch.randint(10, (8,), generator=generator)


def torchvision_order(rank, folder, *, wrap=True, clip=True, resume=False, steps=(0, 6)):
    """Optimizer and distiller first, DDP later, an average of the weights, a checkpoint."""
    student, teacher = models(seed=7 if resume else 0)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
    distiller = Distiller(student, teacher, PAIRS, example=torch.zeros(1, 3, 8, 8))
    optimizer.add_param_group({"params": distiller.parameters()})
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    model = DDP(student)
    transfer = DDP(distiller) if wrap else distiller
    ema = AveragedModel(student, use_buffers=True)
    if resume:
        checkpoint = torch.load(folder / "checkpoint.pt")
        student.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scheduler.load_state_dict(checkpoint["scheduler"])
        ema.load_state_dict(checkpoint["ema"])
        distiller.load_state_dict(checkpoint["distiller"])
    for images, labels in batches(rank, *steps):
        loss = F.cross_entropy(model(images), labels) + transfer(images)
        optimizer.zero_grad()
        loss.backward()
        if clip:
            held = [p for group in optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(held, 0.05)
        optimizer.step()
        scheduler.step()
        ema.update_parameters(model.module)
    if rank == 0:
        checkpoint = {
            "model": student.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "ema": ema.state_dict(),
            "distiller": distiller.state_dict(),
        }
        torch.save(checkpoint, folder / "checkpoint.pt")
    dist.barrier()
    evaluated = ema.eval()(torch.ones(2, 3, 8, 8))
    return {
        **{f"student.{k}": v for k, v in student.state_dict().items()},
        **{f"heads.{k}": v for k, v in distiller.state_dict().items()},
        "evaluated": evaluated,
    }


def nanogpt_order(rank, folder, *, steps=(0, 6)):
    """DDP first, gradients accumulated, then ``raw_model = model.module``."""
    student, teacher = models()
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.01)
    model = DDP(student)
    distiller = Distiller(model, teacher, PAIRS, example=torch.zeros(1, 3, 8, 8))
    for group in distiller.parameter_groups(weight_decay=0.1):
        optimizer.add_param_group(group)
    transfer = DDP(distiller)
    for step, (images, labels) in enumerate(batches(rank, *steps)):
        last = step % 2 == 1
        model.require_backward_grad_sync = transfer.require_backward_grad_sync = last
        loss = F.cross_entropy(model(images), labels) + transfer(images)
        (loss / 2).backward()
        if last:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    raw_model = model.module
    return {**raw_model.state_dict(), **{f"heads.{k}": v for k, v in transfer.state_dict().items()}}


def accelerate_order(rank, folder, *, resume=False, steps=(0, 6)):
    """Everything prepared in one line, the scheduler last; ``save_state`` has the heads."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    student, teacher = models(seed=7 if resume else 0)
    distiller = Distiller(student, teacher, PAIRS, example=torch.zeros(1, 3, 8, 8))
    optimizer = torch.optim.AdamW([*student.parameters(), *distiller.parameters()], lr=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    model, transfer, optimizer, scheduler = accelerator.prepare(
        student, distiller, optimizer, scheduler
    )
    if resume:
        accelerator.load_state(str(folder / "state"))
    for images, labels in batches(rank, *steps):
        with accelerator.accumulate(model, transfer):
            loss = F.cross_entropy(model(images), labels) + transfer(images)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_([*model.parameters(), *transfer.parameters()], 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    accelerator.save_state(str(folder / "state"))
    plain, _ = models(seed=9)
    plain.load_state_dict(accelerator.unwrap_model(model).state_dict())
    return {
        **student.state_dict(),
        **{f"heads.{k}": v for k, v in distiller.state_dict().items()},
    }


def lightning_order(rank, folder, *, steps=(0, 6)):
    """One module with everything in it in DDP, and a closure that the optimizer calls."""

    class Task(nn.Module):
        def __init__(self):
            super().__init__()
            self.student, teacher = models()
            self.distiller = Distiller(
                self.student, teacher, PAIRS, example=torch.zeros(1, 3, 8, 8)
            )

        def forward(self, images, labels):
            return F.cross_entropy(self.student(images), labels) + self.distiller(images)

    task = Task()
    model = DDP(task)
    optimizer = torch.optim.Adam(task.parameters(), lr=0.01)
    for images, labels in batches(rank, *steps):

        def closure(images=images, labels=labels):
            optimizer.zero_grad()
            loss = model(images, labels)
            loss.backward()
            return loss

        optimizer.step(closure)
    return task.state_dict()


def counted(name, calls):
    """Counts the calls of a collective operation of torch.distributed."""
    function = getattr(dist, name)

    def count(*args, **kwargs):
        calls.append(name)
        return function(*args, **kwargs)

    setattr(dist, name, count)


def run(rank, folder, jobs):
    """What a process does: each job is a label, a script's name and how it is to be called.

    It leaves what came of each by label: the state and the number of reductions, or the error.
    """
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    warnings.filterwarnings("error", message="Distiller")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0")  # which nobody connects to
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    collectives: list[str] = []
    counted("all_reduce", collectives)
    results = {}
    for label, name, keywords in jobs:
        collectives.clear()
        place = Path(folder) / name
        place.mkdir(exist_ok=True)
        try:
            state = globals()[name](rank, place, **keywords)
            results[label] = ({k: v.clone() for k, v in state.items()}, len(collectives))
        except Exception as error:
            results[label] = (f"{type(error).__name__}: {error}", traceback.format_exc())
    torch.save(results, Path(folder) / f"rank-{rank}.pt")
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's teardown aborts now and then

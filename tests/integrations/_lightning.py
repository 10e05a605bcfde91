"""A Lightning module as people have them, and what two processes do with it."""

import os
import warnings
from contextlib import nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F
from _scripts import PAIRS, models
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from vid_loss.integrations.lightning import VIDCallback

from vid_loss import DistillationModel, Distiller

EXAMPLE = torch.zeros(1, 3, 8, 8)
EPOCHS, RATE = 2, 1e-3


class Task(LightningModule):
    """Knows nothing of a teacher."""

    def __init__(self, seed=0):
        super().__init__()
        self.model, _ = models(seed)

    def setup(self, stage):
        torch.manual_seed(11)  # for the heads, in every process

    def train_dataloader(self):
        return loader()

    def forward(self, images):
        return self.model(images)

    def training_step(self, batch, _):
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, _):
        images, labels = batch
        self.log("val_loss", F.cross_entropy(self(images), labels))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=RATE)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=20)
        lr_scheduler = {"scheduler": scheduler, "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": lr_scheduler}


def callback(**options):
    """With heads that are the same wherever they are built."""
    _, teacher = models()
    return VIDCallback(teacher, PAIRS, **{"example": EXAMPLE, **options})


def samples():
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(24, 3, 8, 8, generator=generator)
    return TensorDataset(images, torch.randint(10, (24,), generator=generator))


def loader():
    """In order; each process has its part."""
    data = samples()
    sampler = DistributedSampler(data, shuffle=False) if dist.is_initialized() else None
    return DataLoader(data, batch_size=4, sampler=sampler)


def fit(task, *callbacks, ckpt_path=None, epochs=EPOCHS, **options):
    """Trains with a Trainer that writes nothing but what it is asked for."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    ours = {"accelerator": "cpu", "enable_checkpointing": False, "use_distributed_sampler": False}
    options = {**ours, **quiet, **options}
    trainer = Trainer(callbacks=list(callbacks), max_epochs=epochs, **options)
    with warnings.catch_warnings():
        # Of Lightning's own: torch's pytree, data loaders without workers.
        warnings.filterwarnings("ignore", module="lightning")
        warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec")
        trainer.fit(task, ckpt_path=ckpt_path)
    return trainer


def plain_loop(batches, *, autocast=None, dtype=None, accumulate=1, clip=None, wrap=False):
    """The three lines in a loop of one's own: what the callback is to come to."""
    student, teacher = models()
    student, teacher = student.to(dtype), teacher.to(dtype)
    torch.manual_seed(11)
    distiller = Distiller(student, teacher, PAIRS, example=EXAMPLE.to(dtype))
    optimizer = torch.optim.AdamW(student.parameters(), lr=RATE)
    for group in distiller.parameter_groups(optimizer):
        optimizer.add_param_group(group)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=20)
    model, transfer = (DDP(student), DDP(distiller)) if wrap else (student, distiller)
    mixed = nullcontext() if autocast is None else torch.autocast("cpu", autocast)
    losses = []
    for step, (images, labels) in enumerate(batches):
        images = images.to(dtype)
        last = (step + 1) % accumulate == 0
        if wrap:
            model.require_backward_grad_sync = transfer.require_backward_grad_sync = last
        with mixed:
            loss = F.cross_entropy(model(images), labels) + transfer(images)
        losses.append(loss.item())
        (loss / accumulate).backward()
        if last:
            if clip is not None:
                held = [p for group in optimizer.param_groups for p in group["params"]]
                nn.utils.clip_grad_norm_(held, clip)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    return student, distiller, losses


def states(student, distiller):
    """What was trained, by name."""
    of_heads = {f"heads.{key}": value for key, value in distiller.state_dict().items()}
    return {key: value.clone() for key, value in {**student.state_dict(), **of_heads}.items()}


class Sharded(Task):
    """FSDP2 as the page has it."""

    def __init__(self):
        super().__init__()
        del self.model
        self.student, teacher = models()
        self.teacher = [teacher]  # not registered

    def configure_model(self):
        if hasattr(self, "model"):
            return
        distiller = Distiller(self.student, self.teacher[0], PAIRS, example=EXAMPLE)
        self.model = DistillationModel(self.student, distiller)
        fully_shard(self.model, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, _):
        images, labels = batch
        logits, transfer = self.model(images)
        return F.cross_entropy(logits, labels) + transfer

    def configure_optimizers(self):
        return torch.optim.AdamW(self.model.parameters(), lr=RATE)


def _ddp(folder, **options):
    one = callback()
    task = Task(seed=options.pop("seed", 0))
    checkpoint = options.pop("save", None)
    trainer = fit(task, one, strategy="ddp", devices=2, **options)
    if checkpoint:
        trainer.save_checkpoint(folder / checkpoint)
    return {"states": states(task.model, one.distiller)}


def _plain(accumulate=1):
    student, distiller, _ = plain_loop(list(loader()) * EPOCHS, wrap=True, accumulate=accumulate)
    return {"states": states(student, distiller)}


def _sharded():
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    task = Sharded()
    fit(task, strategy=strategy, devices=2)
    return {"states": {name: p.full_tensor() for name, p in task.model.named_parameters()}}


def _refused():
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    try:
        fit(Sharded(), callback(), strategy=strategy, devices=2)
    except ValueError as error:
        return {"message": str(error)}
    return {"message": None}


class Spawned(Task):
    """Trains in the processes of ddp_spawn, in which all other jobs are done, too.

    To start processes takes longer than the jobs.
    """

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def on_train_end(self):
        (one,) = (x for x in self.trainer.callbacks if isinstance(x, VIDCallback))
        spawned = {"states": states(self.model, one.distiller)}
        torch.save(
            {"spawned": spawned, **_jobs(self.folder)}, self.folder / f"{self.global_rank}.pt"
        )


def _jobs(folder):
    """What each process does, by label."""
    os.environ.update(LOCAL_RANK=str(dist.get_rank()), WORLD_SIZE="2", NODE_RANK="0")
    torch.use_deterministic_algorithms(True)
    return {
        "whole": _ddp(folder),
        "half": _ddp(folder, epochs=1, save="half.ckpt"),
        "resumed": _ddp(folder, seed=7, ckpt_path=folder / "half.ckpt"),
        "plain": _plain(),
        "accumulated": _ddp(folder, accumulate_grad_batches=3),
        "plain, accumulated": _plain(accumulate=3),
        "sharded": _sharded(),
        "refused": _refused(),
    }


def run(folder):
    """Has two processes do all jobs; returns the results of each."""
    fit(Spawned(folder), callback(), strategy="ddp_spawn", devices=2, epochs=1)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name

"""What test_hf_distributed.py runs in each of its processes.

They are forked from a server that has imported this file: importing transformers takes longer than
all the runs together. ``accelerate launch --cpu`` would start one process without MPI.
"""

import os
import traceback
from pathlib import Path

import torch
from _hf import LLAMA_PAIR, arguments, llama, llama_teacher, logged, sentences, without_estimates
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from vid_loss.integrations.hf import VIDTrainer

from vid_loss import Pair

LLAMA_LAYERS = next(iter(LLAMA_PAIR.items()))


def pretend_fsdp(version=2, **options):
    """Takes Accelerate's FSDP path on CPU, which it refuses by itself."""
    make = Accelerator.__init__

    def init(self, *args, **kwargs):
        make(self, *args, **kwargs)
        plugin = FullyShardedDataParallelPlugin(fsdp_version=version, **options)
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        AcceleratorState._shared_state["distributed_type"] = DistributedType.FSDP
        AcceleratorState._shared_state["fsdp_plugin"] = plugin

    Accelerator.__init__ = init


def main(rank, processes, port, folder, output, options):
    """One rank: torchrun's environment, then a user's script."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    if processes > 1:
        os.environ.update({key: str(value) for key, value in {**ranks, **address}.items()})
    torch.set_num_threads(1)
    try:
        train(rank, Path(folder), Path(output), **options)
    except BaseException:
        (Path(output) / f"rank{rank}.txt").write_text(traceback.format_exc())
        raise


def sharded_teacher():
    """Each rank holds a half of every weight, as of a teacher that no one rank can hold."""
    teacher = llama_teacher()
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for module in (*teacher.model.layers, teacher):
        fully_shard(module, mesh=mesh)
    return teacher


def train(
    rank, folder, output, fsdp=None, resume=None, estimates=True, shards=False, own=None, **options
):
    if fsdp:
        pretend_fsdp(**fsdp)
    args = arguments(folder, optim="sgd", **options)  # starts the processes' group
    trainer = VIDTrainer(
        llama(),
        args,
        train_dataset=sentences(),
        teacher=sharded_teacher() if shards else llama_teacher(),
        pairs=[Pair(*LLAMA_LAYERS, weight=1.0)] if estimates else without_estimates(LLAMA_PAIR),
        **own or {},
    )
    trainer.train(resume_from_checkpoint=resume)
    state = {
        name: (x.full_tensor() if hasattr(x, "full_tensor") else x).detach().cpu().clone()
        for name, x in (*trainer.model.named_parameters(), *trainer.model.named_buffers())
    }
    logs = {key: logged(trainer, key) for key in ("loss", "task_loss", "transfer_loss")}
    torch.save({"state": state, "logs": logs}, output / f"rank{rank}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()

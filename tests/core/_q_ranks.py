"""What test_q_processes.py runs in each process: three steps, as a user would write them."""

import os
import traceback
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.nn.parallel import DistributedDataParallel

from vid_loss import DistillationModel, Distiller, Pair, VIDLoss

ESTIMATES = ("scale.positions", "scale.mean", "scale.var", "running_var.var")
STEPS = 3


class Net(nn.Module):
    """Maps, tokens and a vector, with no batch norm, which would see its own process's batch."""

    def __init__(self, width):
        super().__init__()
        self.maps = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.Tanh())
        self.tokens = nn.Sequential(nn.Linear(width, width), nn.Tanh())
        self.fc = nn.Linear(width, 3)

    def forward(self, x, attention_mask=None):
        hidden = self.tokens(self.maps(x).flatten(2).mT)
        return self.fc(hidden.mean(1))


def batch(step):
    """The joined batch: eight images, labels, and which of their 16 positions count."""
    generator = torch.Generator().manual_seed(step)
    x = 3 * torch.randn(8, 1, 4, 4, generator=generator)
    # As many in each half, or the joined loss is not the mean of the halves'.
    mask = torch.stack([torch.randperm(16, generator=generator) < 9 for _ in range(8)])
    return x, torch.arange(8) % 3, mask


def shard(model, root):
    """Shards a net's larger layers, and the root that holds what is left."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for module in (model.maps, model.tokens):
        fully_shard(module, mesh=mesh)
    fully_shard(root, mesh=mesh)


def build(norms, how="alone"):
    torch.manual_seed(0)
    student, teacher = Net(4), Net(8)
    if "teacher" in how:
        shard(teacher, teacher)
    maps, tokens = (partial(VIDLoss, norm=norm) for norm in norms)
    pairs = [
        Pair("maps", "maps", loss=maps),
        Pair("tokens", "tokens", loss=tokens),
        Pair("fc:input", "fc"),
        Pair("maps", "maps", 0.0, name="off"),
    ]
    x, _, mask = batch(0)
    example = {"x": x[:1], "attention_mask": mask[:1]}
    return student, Distiller(student, teacher, pairs, example=example)


def wrap(how, student, distiller):
    """Returns a step's task output and transfer loss, and the modules to be trained."""
    if how.startswith("beside"):
        net, heads = DistributedDataParallel(student), DistributedDataParallel(distiller)
        return (lambda **x: (net(**x), heads(**x))), [student, distiller]
    model = DistillationModel(student, distiller)
    if how == "model":
        return DistributedDataParallel(model), [model]
    if how.startswith("fsdp"):
        shard(student, model)
    return model, [model]


def main(rank, processes, folder, how, norms):
    """One rank, or the one process with the joined batch."""
    folder = Path(folder)
    torch.set_num_threads(1)
    try:
        if processes > 1:
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"
            torch.distributed.init_process_group(
                "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes
            )
        torch.save(train(rank, processes, how, norms), folder / f"rank{rank}.pt")
        if processes > 1:
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
    except BaseException:
        (folder / f"rank{rank}.txt").write_text(traceback.format_exc())
        raise


def train(rank, processes, how, norms):
    student, distiller = build(norms, how)
    run, trained = wrap(how, student, distiller)
    parameters = [p for module in trained for p in module.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
    for step in range(STEPS):
        x, labels, mask = (part.chunk(processes)[rank] for part in batch(step))
        optimizer.zero_grad()
        output, transfer = run(x=x, attention_mask=mask)
        (F.cross_entropy(output, labels) + transfer).backward()
        optimizer.step()
    state = {n: x for module in (student, distiller) for n, x in module.named_parameters()}
    state |= {n: x for n, x in distiller.named_buffers() if n.endswith(ESTIMATES)}
    state = {n: (x.full_tensor() if hasattr(x, "full_tensor") else x) for n, x in state.items()}
    result = {"state": {n: x.detach().clone() for n, x in state.items()}}
    result["diagnostics"] = distiller.diagnostics()
    if how == "fsdp":
        result["reloaded"] = reloaded(trained[0], norms)
    return result


def reloaded(model, norms):
    """The estimates of a new model that takes over the whole state of a sharded one."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    _, (other,) = wrap("fsdp", *build(norms))
    set_model_state_dict(other, broadcast(state), options=StateDictOptions(full_state_dict=True))
    return {n: x.clone() for n, x in other.distiller.named_buffers() if n.endswith(ESTIMATES)}


def broadcast(state):
    """Gives every rank what rank 0 has gathered."""
    box = [state]
    torch.distributed.broadcast_object_list(box)
    return box[0]

"""What keeps the user's models as they were, and the user's loop honest."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.optim import Optimizer


@contextmanager
def undisturbed(*models: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; modes, buffers and random states are put back as they were.

    So are attributes of the modules that are numbers, such as counters. What a module builds in its
    first forward stays: lazy parameters and buffers, and buffers that were None or not there.
    """
    modules = dict.fromkeys(module for model in models for module in model.modules())
    devices = {p.device for model in models for p in model.parameters() if p.is_cuda}
    with (
        torch.random.fork_rng([device.index for device in devices]),
        torch.no_grad(),
        # Compiled code hides what a layer's neighbours change in place, and this is one forward.
        torch.compiler.set_stance("force_eager"),
    ):
        before = [_Snapshot(module) for module in modules]
        try:
            for module in modules:
                module.training = False
            with plain_tensors(modules):
                yield
        finally:
            for snapshot in before:
                snapshot.restore()


class _Snapshot:
    """A module's mode, its buffers by identity and value, and its numbers."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.training = module.training
        # What a lazy module finds out from its first input is to stay.
        lazy = isinstance(module, LazyModuleMixin)
        buffers = {} if lazy else module._buffers
        self.buffers = {name: (x, x.clone()) for name, x in buffers.items() if x is not None}
        # Not flags: one may say that something is built that is not taken back here.
        numbers = {} if lazy else vars(module)
        self.numbers = {key: x for key, x in numbers.items() if type(x) in (int, float)}

    def restore(self) -> None:
        """Puts back what has changed."""
        self.module.training = self.training
        vars(self.module).update(self.numbers)
        for name, (buffer, value) in self.buffers.items():
            # Whatever its version says: batch norm and observers do not count their changes.
            if not (buffer.is_inference() or buffer.is_meta or _is_expanded(buffer)):
                _put_back(buffer, value)
            self.module._buffers[name] = buffer


def _put_back(buffer: Tensor, value: Tensor) -> None:
    # An observer of quantization gives its buffers another size, too.
    if buffer.shape != value.shape:
        buffer.resize_(value.shape)
    buffer.copy_(value)


def _is_expanded(buffer: Tensor) -> bool:
    """Whether several of its entries are one place in memory: torch lets nobody write to it."""
    if buffer.layout != torch.strided:
        return False
    sizes = zip(buffer.shape, buffer.stride(), strict=True)
    return any(size > 1 and stride == 0 for size, stride in sizes)


@contextmanager
def own_forwards(model: nn.Module) -> Iterator[None]:
    """Puts back each module's ``forward`` after one that ends early.

    transformers 4.57 replaces it for the length of a call, to record hidden states, and does not
    put it back when an exception comes through.
    """
    own = [(vars(module), vars(module).get("forward")) for module in model.modules()]
    try:
        yield
    finally:
        for attributes, forward in own:
            attributes.pop("forward", None)
            if forward is not None:
                attributes["forward"] = forward


@contextmanager
def plain_tensors(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Has ``nn.TransformerEncoder`` pass padded tensors on to its layers, as in train mode.

    In eval mode, padding makes it pass nested ones, which have no shape.
    """
    encoders = [
        module
        for module in modules
        if isinstance(module, nn.TransformerEncoder) and module.use_nested_tensor
    ]
    for encoder in encoders:
        encoder.use_nested_tensor = False
    try:
        yield
    finally:
        for encoder in encoders:
            encoder.use_nested_tensor = True


def several_processes() -> bool:
    """Whether this process trains together with others."""
    dist = torch.distributed
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_captured(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being made, which replays operations and nothing of the host."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def no_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Computes what is inside in the tensors' own dtypes, on the device of one of them."""
    device = tensor.device.type
    # Compiled it costs nothing, and what it would be asked before is not known to old dynamos.
    if torch.compiler.is_compiling():
        return torch.autocast(device, enabled=False)
    # Entering torch's own costs as much as a small loss, and nearly always there is none to leave.
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


@contextmanager
def hook_guards() -> Iterator[None]:
    """Has dynamo look at the hooks of a layer before it runs what it compiled for another one.

    By default it does not, and where the forward of a model is compiled in parts, a layer without
    hooks lends its code to a tapped one of the same class: the tap then misses its feature.
    """
    import torch._dynamo  # slow to import, and only compiled models need it

    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
        yield


def inside_ddp() -> bool:
    """Whether this is called in the forward of a DistributedDataParallel."""
    if not torch.distributed.is_available():
        return False
    active = nn.parallel.DistributedDataParallel._active_ddp_module  # torch's compiler asks, too
    return active is not None


def without_data_parallel(student: nn.Module) -> nn.Module:
    """Returns the student without DistributedDataParallel, or DataParallel on one device.

    Raises:
        ValueError: if DataParallel copies it to several devices, where no hook of it is called.
    """
    if isinstance(student, nn.DataParallel) and len(student.device_ids) > 1:
        raise ValueError(
            "Distiller, student: expected one model per process; got DataParallel on "
            f"{len(student.device_ids)} devices. Start a process per device (torchrun) and use "
            "DistributedDataParallel."
        )
    if isinstance(student, nn.parallel.DistributedDataParallel | nn.DataParallel):
        return without_data_parallel(student.module)
    return student


def holds_all(optimizer: Optimizer, module: nn.Module) -> bool:
    """Whether an optimizer has every parameter of a module that is to be trained."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return all(id(p) in held for p in module.parameters() if p.requires_grad)

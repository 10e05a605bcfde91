"""What the Accelerate loop writes: checkpoints that are whole or absent, and plain students."""

import os
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from safetensors.torch import save
from torch import Tensor, nn

from vid_loss.durable import rename_folder, write_whole

from ._manifest import damage_of, write_manifest

_NAMES = re.compile(r"epoch-(\d+)")
_LOOP_STATE, _PROCESSES = "loop.pt", "processes"
_LOCK = ".lock"
_SECONDS = 15.0  # for which a killed run's loader workers may hold its lock: they look every five


@contextmanager
def alone(accelerator: Accelerator, output: str | os.PathLike[str]) -> Iterator[None]:
    """Keeps other runs out of a run's folder for a block. Called by every process.

    ``train`` does it; a program that writes there beforehand does it around both.

    Args:
        accelerator: of the run.
        output: its folder.

    Raises:
        ValueError: if another run is writing there.
    """
    output = Path(output)
    lock = FileLock(output.absolute() / _LOCK, timeout=_SECONDS, is_singleton=True)
    with ExitStack() as stack:
        free = [True]
        if accelerator.is_main_process:
            output.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(lock)
            except Timeout:
                free = [False]
        if not broadcast_object_list(free)[0]:
            raise ValueError(
                f"train, output: expected a folder that no other run is writing; got {output}, "
                "where one is. Wait for its end, end it, or name another output."
            )
        yield


def save_checkpoint(
    accelerator: Accelerator, folder: Path, epoch: int, loop_state: Mapping[str, Any]
) -> None:
    """Writes a checkpoint beside the others, and renames it when all of it is on the disk.

    A process that is killed at any moment leaves the previous checkpoint or this one. The one
    before is kept too, in case this one is damaged later. Called by every process.

    Args:
        accelerator: knows the model, the optimizer, the scaler and the random states.
        folder: of all checkpoints of the run, on storage that every process sees.
        epoch: how many epochs are done.
        loop_state: what Accelerate does not know; numbers, strings, tensors and their containers.
    """
    partial = folder / "partial"
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        _remove(partial)  # left by a run that was killed while it saved
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        torch.save({**loop_state, _PROCESSES: accelerator.num_processes}, partial / _LOOP_STATE)
        write_manifest(partial)
        _remove(folder / f"epoch-{epoch:05d}")  # a damaged one, which was passed over
        rename_folder(partial, folder / f"epoch-{epoch:05d}")
        before = [other for other in _checkpoints(folder) if other < epoch]
        for other, path in _checkpoints(folder).items():
            if other not in (epoch, max(before, default=0)):
                _remove(path)
    accelerator.wait_for_everyone()


def load_checkpoint(accelerator: Accelerator, folder: Path) -> dict[str, Any] | None:
    """Loads the last checkpoint that is what was written; warns of those after it.

    Args:
        accelerator: as when it was saved.
        folder: of all checkpoints of the run.

    Returns:
        The ``loop_state`` that was saved, or None if there is no whole checkpoint.
    """
    chosen = [_last_whole(folder) if accelerator.is_main_process else None]
    last = broadcast_object_list(chosen)[0]
    if last is None:
        return None
    state: dict[str, Any] = torch.load(last / _LOOP_STATE, weights_only=True)
    processes = state.pop(_PROCESSES)
    if processes != accelerator.num_processes:
        raise ValueError(
            f"train, output: expected as many processes as wrote {last}, {processes}; got "
            f"{accelerator.num_processes}, which have no random state in it. Start as many, or "
            "name another output."
        )
    accelerator.load_state(str(last))
    return state


def _last_whole(folder: Path) -> Path | None:
    checkpoints = _checkpoints(folder)
    for epoch in sorted(checkpoints, reverse=True):
        damage = damage_of(checkpoints[epoch])
        if damage is None:
            return checkpoints[epoch]
        warnings.warn(
            f"train, output: expected a whole checkpoint in {checkpoints[epoch]}; got {damage}. "
            "It is passed over for the one before it, and for a new start if there is none.",
            stacklevel=2,
        )
    return None


def export_student(accelerator: Accelerator, model: nn.Module, paths: Iterable[Path]) -> None:
    """Writes the student's plain ``state_dict``, without heads or any wrapper's prefix.

    Called by every process: a sharded student is gathered first.

    Args:
        accelerator: that prepared the model.
        model: a prepared module with the student in its attribute ``student``.
        paths: safetensors files to write, each of them at once or not at all.
    """
    prefix = "student."
    state: dict[str, Tensor] = {
        name.replace("_orig_mod.", ""): tensor  # torch.compile's wrapper, which Accelerate keeps
        for name, tensor in accelerator.get_state_dict(model).items()
    }
    if accelerator.is_main_process:
        # Tied weights are written twice: safetensors refuses tensors that share memory.
        student = {
            name.removeprefix(prefix): tensor.detach()
            .cpu()
            .clone(memory_format=torch.contiguous_format)
            for name, tensor in state.items()
            if name.startswith(prefix)
        }
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, save(student))
    accelerator.wait_for_everyone()


def _checkpoints(folder: Path) -> dict[int, Path]:
    if not folder.is_dir():
        return {}
    matches = ((_NAMES.fullmatch(path.name), path) for path in folder.iterdir())
    return {int(match[1]): path for match, path in matches if match}


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

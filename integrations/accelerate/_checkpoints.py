"""What the Accelerate loop writes: checkpoints that are whole or absent, and plain students."""

import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn

_COMPLETE = re.compile(r"epoch-(\d+)")
_LOOP_STATE = "loop.pt"


def save_checkpoint(
    accelerator: Accelerator, folder: Path, epoch: int, loop_state: Mapping[str, Any]
) -> None:
    """Writes a checkpoint beside the others, renames it when all of it is there, drops older ones.

    A process that is killed at any moment leaves the previous checkpoint or this one. Called by
    every process.

    Args:
        accelerator: knows the model, the optimizer, the scaler and the random states.
        folder: of all checkpoints of the run, on storage that every process sees.
        epoch: how many epochs are done.
        loop_state: what Accelerate does not know; numbers, strings, tensors and their containers.
    """
    partial = folder / "partial"
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        _remove([partial])  # left by a run that was killed while it saved
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        torch.save(dict(loop_state), partial / _LOOP_STATE)
        older = list(_complete(folder).values())
        os.rename(partial, folder / f"epoch-{epoch:05d}")
        _remove(older)
    accelerator.wait_for_everyone()


def load_checkpoint(accelerator: Accelerator, folder: Path) -> dict[str, Any] | None:
    """Loads the last complete checkpoint.

    Args:
        accelerator: as when it was saved.
        folder: of all checkpoints of the run.

    Returns:
        The ``loop_state`` that was saved, or None if there is no complete checkpoint.
    """
    complete = _complete(folder)
    if not complete:
        return None
    last = complete[max(complete)]
    accelerator.load_state(str(last))
    state: dict[str, Any] = torch.load(last / _LOOP_STATE, weights_only=True)
    return state


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
            partial = path.with_name(path.name + ".partial")
            save_file(student, partial)
            os.replace(partial, path)
    accelerator.wait_for_everyone()


def _complete(folder: Path) -> dict[int, Path]:
    if not folder.is_dir():
        return {}
    matches = ((_COMPLETE.fullmatch(path.name), path) for path in folder.iterdir())
    return {int(match[1]): path for match, path in matches if match}


def _remove(folders: Iterable[Path]) -> None:
    for folder in folders:
        if folder.exists():
            shutil.rmtree(folder)

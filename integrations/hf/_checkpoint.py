"""Heads beside a Hugging Face checkpoint, and the plain student out of a sharded one."""

import json
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import PreTrainedModel
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ._heads import HEADS, StudentHeads
from ._sharded import check_metadata

HEADS_FILE = f"{HEADS}.safetensors"


def save_heads(folder: str | Path, state: Mapping[str, Tensor]) -> None:
    """Writes the heads' state beside the model's."""
    # Copies: safetensors refuses memory that two pairs share.
    tensors = {key: value.detach().cpu().clone() for key, value in state.items()}
    save_file(tensors, Path(folder) / HEADS_FILE, metadata={"format": "pt"})


def load_heads(folder: str | Path, heads: nn.Module) -> None:
    """Reads the heads' state from beside the model's.

    Raises:
        FileNotFoundError: if the checkpoint has none.
        RuntimeError: if the heads are those of other pairs.
    """
    path = Path(folder) / HEADS_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"VIDTrainer, checkpoint: expected {HEADS_FILE} in {folder}; got a checkpoint without "
            "heads. To start from its weights, load the model with from_pretrained() and train "
            "without resume_from_checkpoint."
        )
    heads.load_state_dict(load_file(path))


def whole_checkpoint(resume: Any, folder: str | None) -> Any:
    """Returns what to resume from: where that is the newest in a folder, the newest that is whole.

    A checkpoint ends with the Trainer's state. One that a kill has cut is warned of by its name.

    Args:
        resume: the Trainer's ``resume_from_checkpoint``; what is not True is returned as it is.
        folder: the Trainer's ``output_dir``.

    Raises:
        ValueError: if there are checkpoints, and none is whole.
    """
    if resume is not True or folder is None:
        return resume
    found = [x for x in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if x.name[11:].isdecimal()]
    cut: list[str] = []
    for checkpoint in sorted(found, key=lambda x: int(x.name[11:]), reverse=True):
        try:
            json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
        except (OSError, ValueError):
            cut.append(checkpoint.name)
            continue
        if cut:
            warnings.warn(
                f"VIDTrainer, resume_from_checkpoint: expected whole checkpoints; got "
                f"{', '.join(cut)} in {folder}, cut while being written. It goes on from "
                f"{checkpoint.name}; delete what is cut.",
                stacklevel=3,
            )
        return str(checkpoint)
    if cut:
        raise ValueError(
            f"VIDTrainer, resume_from_checkpoint: expected a whole checkpoint in {folder}; got "
            f"{', '.join(cut)}, cut while being written. Delete it, and start without."
        )
    return resume  # there is none, which the Trainer says itself


@contextmanager
def plain_student(heads: StudentHeads | None, folder: str | Path) -> Iterator[None]:
    """Has the plain student loaded in a block, and its heads from beside it afterwards.

    FSDP and DeepSpeed have the heads in their own checkpoints, and load them from there.
    """
    if heads is None or heads.in_state:
        yield
        return
    with heads.hidden():
        yield
    load_heads(folder, heads.distiller.losses)


def split_heads(
    state: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Splits a state of student and heads into the plain student's and the heads'."""
    split = {key: key.split(".") for key in state}
    student = {key: state[key] for key, names in split.items() if HEADS not in names}
    heads = {
        ".".join(names[names.index(HEADS) + 1 :]): state[key]
        for key, names in split.items()
        if HEADS in names
    }
    return student, heads


def export_student(checkpoint: str | Path, student: PreTrainedModel, folder: str | Path) -> None:
    """Turns a sharded FSDP checkpoint into a folder for ``from_pretrained``, without the heads.

    Run it in one process, after training.

    Args:
        checkpoint: a ``checkpoint-N`` folder that was written with
            ``fsdp_state_dict_type: SHARDED_STATE_DICT``.
        student: a model of the student's architecture; its weights are replaced.
        folder: where to write the model.

    Raises:
        FileNotFoundError: if the folder holds no sharded model.
        ValueError: if its metadata would run code, or cannot be read.
        RuntimeError: if the student has another architecture.
    """
    shards = sorted(Path(checkpoint).glob("pytorch_model_fsdp_*/"))
    if not shards:
        raise FileNotFoundError(
            f"export_student, checkpoint: expected a folder with pytorch_model_fsdp_0 in it; got "
            f"{checkpoint}. Name a checkpoint-N folder of a run with SHARDED_STATE_DICT."
        )
    check_metadata(shards[0])
    with tempfile.TemporaryDirectory() as scratch:
        merged = Path(scratch) / "model.pt"
        dcp_to_torch_save(shards[0], merged)
        state = torch.load(merged, weights_only=True)
    student.load_state_dict(split_heads(state.get("model", state))[0])
    student.save_pretrained(folder)

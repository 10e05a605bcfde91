"""Heads beside a Hugging Face checkpoint, and the plain student out of a sharded one."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import PreTrainedModel, Trainer

from ._student import HEADS, StudentHeads

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object  # it is given its Trainer where it is mixed in

HEADS_FILE = f"{HEADS}.safetensors"


class HeadsCheckpointMixin(_Base):
    """What VIDTrainer saves and loads: the plain student's model file, and the heads beside it.

    Under FSDP and DeepSpeed the heads travel in the engine's own checkpoint too, and are loaded
    from there.
    """

    _heads: StudentHeads | None

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self._heads is None:
            super()._save(output_dir, state_dict=state_dict)
            return
        heads = self._heads.distiller.losses.state_dict()
        if state_dict is not None:
            state_dict, heads = split_heads(state_dict)
        with self._heads.hidden():
            super()._save(output_dir, state_dict=state_dict)
        if self.args.should_save and heads:
            save_heads(str(output_dir or self.args.output_dir), heads)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self._heads is None or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        with self._heads.hidden():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_heads(resume_from_checkpoint, self._heads.distiller.losses)

    def _load_best_model(self) -> None:
        if self._heads is None or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
            return
        with self._heads.hidden():
            super()._load_best_model()
        load_heads(str(self.state.best_model_checkpoint), self._heads.distiller.losses)


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


def split_heads(
    state: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Splits a state of student and heads into the plain student's and the heads'."""
    prefix = f"{HEADS}."
    student = {key: value for key, value in state.items() if not key.startswith(prefix)}
    heads = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
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
        RuntimeError: if the student has another architecture.
    """
    shards = sorted(Path(checkpoint).glob("pytorch_model_fsdp_*/"))
    if not shards:
        raise FileNotFoundError(
            f"export_student, checkpoint: expected a folder with pytorch_model_fsdp_0 in it; got "
            f"{checkpoint}. Name a checkpoint-N folder of a run with SHARDED_STATE_DICT."
        )
    with tempfile.TemporaryDirectory() as scratch:
        merged = Path(scratch) / "model.pt"
        dcp_to_torch_save(shards[0], merged)
        state = torch.load(merged, weights_only=True)
    student.load_state_dict(split_heads(state.get("model", state))[0])
    student.save_pretrained(folder)

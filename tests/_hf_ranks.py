"""What test_hf_distributed.py runs in each of its processes.

Usage: python _hf_ranks.py FOLDER OUTPUT JSON, where JSON holds the options of TrainingArguments and
"fsdp", "export", "resume".
"""

import json
import sys
from pathlib import Path

import torch
from _hf import LLAMA_PAIR, arguments, llama, llama_teacher, logged, sentences
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from vid_loss import Pair
from vid_loss.integrations.hf_trainer import VIDTrainer


def pretend_fsdp(**options):
    """Takes Accelerate's FSDP2 path on CPU, which it refuses by itself."""
    make = Accelerator.__init__

    def init(self, *args, **kwargs):
        make(self, *args, **kwargs)
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, **options)
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        AcceleratorState._shared_state["distributed_type"] = DistributedType.FSDP
        AcceleratorState._shared_state["fsdp_plugin"] = plugin

    Accelerator.__init__ = init


def main(folder, output, options):
    torch.set_num_threads(1)
    fsdp, resume = options.pop("fsdp", None), options.pop("resume", None)
    if fsdp:
        pretend_fsdp(**fsdp)
    trainer = VIDTrainer(
        llama(),
        arguments(folder, optim="sgd", dataloader_drop_last=True, **options),
        train_dataset=sentences(),
        teacher=llama_teacher(),
        pairs=[Pair(*next(iter(LLAMA_PAIR.items())), weight=1.0)],
    )
    trainer.train(resume_from_checkpoint=resume)
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    state = {
        name: getattr(x, "full_tensor", lambda x=x: x)().cpu().clone()
        for name, x in model.state_dict().items()
    }
    logs = {key: logged(trainer, key) for key in ("loss", "task_loss", "transfer_loss")}
    rank = trainer.args.process_index
    torch.save({"state": state, "logs": logs}, Path(output) / f"rank{rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))

"""What test_hf_deepspeed.py runs in each of its processes: all runs of one ZeRO stage.

DeepSpeed takes seconds to import and longer to build what it speaks through, so it does so once.
"""

import os
import traceback

import torch
from _hf import LLAMA_PAIR, arguments, llama, llama_teacher, logged, sentences
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from transformers import LlamaForCausalLM, Trainer, TrainerCallback
from vid_loss.integrations.hf import VIDTrainer

from vid_loss import Pair

LAYERS = next(iter(LLAMA_PAIR.items()))
AUTO = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def pretend_gloo():
    """Has Accelerate's DeepSpeed path count its processes on CPU, where it names no backend."""
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.NO)


def main(rank, processes, port, folder, stage):
    """One rank: the launcher's environment, then the runs."""
    given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
    given |= {"MASTER_ADDR": "127.0.0.1", "DS_ACCELERATOR": "cpu"}
    os.environ.update({key: str(value) for key, value in given.items()})
    torch.set_num_threads(1)
    pretend_gloo()
    try:
        torch.save(runs(folder, stage), folder / f"rank{rank}.pt")
    except BaseException:
        (folder / f"rank{rank}.txt").write_text(traceback.format_exc())
        raise
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


class Began(TrainerCallback):
    """Notes after how many steps a run begins."""

    def __init__(self, steps):
        self.steps = steps

    def on_train_begin(self, args, state, control, **kwargs):
        self.steps.append(state.global_step)


def heads_of(trainer):
    """Returns the heads' parameters, gathered from the ranks where they are partitioned."""
    import deepspeed  # not above: it would choose its accelerator before main() has

    parameters = dict(trainer.distiller.losses.named_parameters())
    partitioned = [x for x in parameters.values() if hasattr(x, "ds_id")]
    with deepspeed.zero.GatheredParameters(partitioned, enabled=bool(partitioned)):
        return {name: x.detach().clone() for name, x in parameters.items()}


def load(folder, model):
    """Returns the model, saved on one rank and loaded on both."""
    place = folder / f"of {model.config.hidden_size}"
    if torch.distributed.get_rank() == 0:
        model.save_pretrained(place)
    torch.distributed.barrier()
    return LlamaForCausalLM.from_pretrained(place)


def runs(folder, stage):
    zero = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}
    config = {"zero_optimization": zero, "gradient_clipping": "auto"}
    config |= dict.fromkeys(AUTO, "auto")

    def run(name, weight, resume=None, loads=()):
        options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "use_cpu": False}
        args = arguments(folder / name, deepspeed=config, **options)
        # Once there are arguments, ZeRO 3 leaves a rank a part of each weight that is loaded.
        student = load(folder, llama()) if "student" in loads else llama()
        teacher = load(folder, llama_teacher()) if "teacher" in loads else llama_teacher()
        own = {"teacher": teacher, "pairs": [Pair(*LAYERS, weight=weight or 0.0)]}
        plain = weight is None
        trainer = (Trainer if plain else VIDTrainer)(
            student, args, train_dataset=sentences(), **({} if plain else own)
        )
        before = {} if plain else heads_of(trainer)
        trainer.add_callback(Began(steps := []))
        trainer.train(resume_from_checkpoint=resume)
        after = {} if plain else heads_of(trainer)
        seen = {x: logged(trainer, x) for x in ("loss", "grad_norm", "transfer_loss")}
        seen["heads"] = {name: (before[name], x) for name, x in after.items()}
        return {**seen, "began_at": steps[0]}

    return {
        "plain": run("plain", None),
        "weight 0": run("zero", 0.0),
        "weight 1": run("one", 1.0),
        "resumed": run("resumed", 1.0, str(folder / "one" / "checkpoint-2")),
        "loaded": run("loaded", 1.0, loads=["student"]),
        "loaded teacher": refused(run, "refused", 1.0, loads=["teacher"]) if stage == 3 else "",
    }


def refused(run, *args, **options):
    """Returns the message of the error that ends a run."""
    try:
        run(*args, **options)
    except ValueError as error:
        return str(error)
    return "not refused"

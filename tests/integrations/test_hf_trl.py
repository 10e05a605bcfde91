"""TRL's trainers with the mixin in front."""

import pytest
import torch

pytest.importorskip("trl", minversion="1.16")
pytest.importorskip("transformers", minversion="5")
pytest.importorskip("peft")

import datasets
from _asserts import assert_same_state, state_of
from _hf import LLAMA_PAIR, arguments, llama, llama_teacher, logged
from _words import texts, tokenizer
from peft import LoraConfig
from safetensors.torch import load_file
from trl import SFTConfig, SFTTrainer
from vid_loss.integrations.hf import VIDTrainerMixin

from vid_loss import Pair

pytestmark = [
    # TRL's own, of what it will change in itself; and of transformers' older spellings.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:trl"),
]
datasets.disable_progress_bars()
LAYERS = next(iter(LLAMA_PAIR.items()))
OPTIONS = {"bf16": False, "max_length": 16, "gradient_checkpointing": False}


class DistillingSFT(VIDTrainerMixin, SFTTrainer):
    """The README's."""


def completions(count=16):
    pairs = zip(texts(count, 1, least=3), texts(count, 2), strict=True)
    return datasets.Dataset.from_list([{"prompt": p, "completion": f" {c}"} for p, c in pairs])


def lora():
    return LoraConfig(target_modules=["q_proj", "v_proj"])


def sft(folder, weight=None, data=None, **options):
    """The plain SFTTrainer, or at a weight the distilling one, on the same student."""
    own, cls = {}, SFTTrainer
    if weight is not None:
        own = {"teacher": llama_teacher(), "pairs": [Pair(*LAYERS, weight=weight)]}
        cls = DistillingSFT
    peft_config = options.pop("peft_config", None)
    data = data or completions()
    torch.manual_seed(0)  # LoRA's first weights
    return cls(
        llama(),
        arguments(folder, SFTConfig, **{**OPTIONS, "max_steps": 2, **options}),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer(),
        peft_config=peft_config,
        **own,
    )


SETTINGS = {
    "padded": {},
    "all tokens": {"completion_only_loss": False},
    "padding-free": {"padding_free": True, "max_length": None},
    "packing": {"packing": True},
    "packing, wrapped": {"packing": True, "packing_strategy": "wrapped"},
    "checkpointing": {"gradient_checkpointing": True},
    "reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
        "peft_config": lora(),
    },
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "DFT loss": {"loss_type": "dft"},
    "LoRA": {"peft_config": lora()},
    "LoRA, checkpointing": {"peft_config": lora(), "gradient_checkpointing": True},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_sft_at_weight_zero_is_the_plain_sft_trainer_to_the_last_bit(tmp_path, setting):
    plain, trainer = (sft(tmp_path, weight, **SETTINGS[setting]) for weight in (None, 0.0))
    for one in (plain, trainer):
        one.train()
    for key in ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens"):
        assert logged(trainer, key) == logged(plain, key), key
    assert_same_state(trainer.model, state_of(plain.model))  # its heads attached
    assert trainer.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]


@pytest.mark.parametrize("setting", SETTINGS)
def test_sft_distils_in_every_setting(tmp_path, setting):
    trainer = sft(tmp_path, 1.0, **SETTINGS[setting])
    before = state_of(trainer.distiller.losses)
    trainer.train()
    transfer, task, loss = (logged(trainer, f"{x}loss") for x in ("transfer_", "task_", ""))
    assert min(transfer) > 0.3
    assert loss == pytest.approx([a + b for a, b in zip(task, transfer, strict=True)])
    after = state_of(trainer.distiller.losses)
    assert not any(torch.equal(after[key], before[key]) for key in before)


def test_padding_counts_nowhere_and_packed_texts_do_not_see_each_other(tmp_path):
    """All texts in one step: only how they are laid out differs."""
    options = {"per_device_train_batch_size": 16, "max_steps": 1, "completion_only_loss": False}
    layouts = ({}, {"padding_free": True, "max_length": None}, {"packing": True})
    runs = [sft(tmp_path, 1.0, **options, **layout) for layout in layouts]
    for trainer in runs:
        trainer.train()
    for key in ("transfer_loss", "task_loss"):
        values = [logged(trainer, key)[0] for trainer in runs]
        assert values == pytest.approx(values[:1] * 3, rel=1e-5), key


def test_accumulated_metrics_of_evaluation_are_the_plain_trainer_s(tmp_path):
    options = {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    plain, trainer = (sft(tmp_path, weight, **options) for weight in (None, 0.0))
    for one in (plain, trainer):
        one.train()
    for key in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy", "eval_num_tokens"):
        assert logged(trainer, key) == logged(plain, key) != [], key


def test_lora_layers_go_by_their_names_in_the_base_model_and_in_the_logs(tmp_path):
    trainer = sft(tmp_path, 1.0, peft_config=lora())
    trainer.train()
    assert logged(trainer, f"transfer/{LAYERS[0]}->{LAYERS[1]}")
    base = {name for name, p in trainer.model.named_parameters() if "lora" not in name}
    heads = {name for name in base if "vid_heads" in name}
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    for name, parameter in trainer.model.named_parameters():
        assert (id(parameter) in held) == (name in heads or "lora" in name), name


@pytest.mark.parametrize("peft_config", [None, lora()], ids=["whole", "LoRA"])
def test_a_checkpoint_is_the_plain_one_with_the_heads_beside_it_and_resumes(tmp_path, peft_config):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 3}
    runs = [sft(tmp_path, 1.0, peft_config=peft_config, **options) for _ in range(2)]
    runs[0].train()
    runs[1].train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert logged(runs[1], "loss") == logged(runs[0], "loss")
    name = "model" if peft_config is None else "adapter_model"
    keys = load_file(tmp_path / "checkpoint-3" / f"{name}.safetensors").keys()
    assert not any("vid_heads" in key for key in keys)
    assert (tmp_path / "checkpoint-3" / "vid_heads.safetensors").is_file()
    assert "## Distillation" in (tmp_path / "README.md").read_text()

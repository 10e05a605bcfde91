"""TRL's trainers beside SFT, with the mixin in front."""

import pytest
import torch

pytest.importorskip("trl", minversion="1.16")
pytest.importorskip("transformers", minversion="5")
pytest.importorskip("peft")

import datasets
import trl
from _asserts import assert_same_state, state_of
from _hf import LLAMA_PAIR, arguments, llama, llama_teacher, logged
from _words import texts, tokenizer
from peft import LoraConfig
from transformers import LlamaForSequenceClassification
from vid_loss.integrations.hf import VIDTrainerMixin

from vid_loss import Pair

pytestmark = [
    # TRL's own, of what it will change in itself; and of transformers' older spellings.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:trl"),
]
datasets.disable_progress_bars()
LAYERS = next(iter(LLAMA_PAIR.items()))
PROMPTS, GOOD, BAD = texts(16, 1, least=3), texts(16, 2), texts(16, 3)
# What the model is called with, where a data set has only prompts.
CALL = {name: torch.ones(2, 4, dtype=torch.long) for name in ("input_ids", "attention_mask")}


def rows(**columns):
    names = list(columns)
    return datasets.Dataset.from_list(
        [dict(zip(names, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    )


PREFERENCES = rows(prompt=PROMPTS, chosen=GOOD, rejected=BAD)
THUMBS = rows(prompt=PROMPTS, completion=GOOD, label=[True, False] * 8)


def judge(layers=1, width=16, seed=0):
    torch.manual_seed(seed)
    config = llama(width, layers).config
    config.num_labels = 1
    return LlamaForSequenceClassification(config)


def length(completions, **_):
    return [float(len(text)) for text in completions]


GENERATION = {"max_completion_length": 4, "num_generations": 4, "beta": 0.0}
TRAINERS = {
    "DPO": ({}, lambda: {"ref_model": llama()}, PREFERENCES),
    "DPO, LoRA": (
        {},
        lambda: {"peft_config": LoraConfig(target_modules=["q_proj"])},
        PREFERENCES,
    ),
    "KTO": ({}, lambda: {"ref_model": llama()}, THUMBS),
    "Reward": ({}, dict, PREFERENCES),
    "GRPO": (GENERATION, lambda: {"reward_funcs": length}, rows(prompt=PROMPTS)),
    "RLOO": (GENERATION, lambda: {"reward_funcs": length}, rows(prompt=PROMPTS)),
}


def build(folder, name, weight=None, **own):
    options, made, data = TRAINERS[name]
    kind = name.split(",")[0]
    cls, config = getattr(trl, f"{kind}Trainer"), getattr(trl, f"{kind}Config")
    student, teacher = (judge, judge(2, 24, 1)) if kind == "Reward" else (llama, llama_teacher())
    if weight is not None:
        own = {"teacher": teacher, "pairs": [Pair(*LAYERS, weight=weight)], **own}
        cls = type("Distilling", (VIDTrainerMixin, cls), {})
    options = {"bf16": False, "gradient_checkpointing": False, "max_steps": 2, **options}
    torch.manual_seed(0)
    return cls(
        model=student(),
        args=arguments(folder, config, **options),
        train_dataset=data,
        processing_class=tokenizer(),
        **made(),
        **own,
    )


def example_for(name):
    return {"example": CALL} if TRAINERS[name][0] is GENERATION else {}


@pytest.mark.parametrize("name", TRAINERS)
def test_at_weight_zero_it_is_the_plain_trainer_to_the_last_bit(tmp_path, name):
    plain, trainer = build(tmp_path, name), build(tmp_path, name, 0.0, **example_for(name))
    for one in (plain, trainer):
        torch.manual_seed(1)  # what is generated
        one.train()
    assert logged(trainer, "loss") == logged(plain, "loss")
    assert_same_state(trainer.model, state_of(plain.model))


@pytest.mark.parametrize("name", TRAINERS)
def test_it_distils(tmp_path, name):
    trainer = build(tmp_path, name, 1.0, **example_for(name))
    before = state_of(trainer.distiller.losses)
    trainer.train()
    assert min(logged(trainer, "transfer_loss")) > 0.3
    after = state_of(trainer.distiller.losses)
    assert not any(torch.equal(after[key], before[key]) for key in before)


def test_a_batch_that_is_yet_to_be_generated_is_asked_for(tmp_path):
    with pytest.raises(TypeError, match=r"data_collator: .* pass example=, what the model"):
        build(tmp_path, "GRPO", 1.0)

"""Students with adapters."""

import copy

import pytest
import torch

pytest.importorskip("peft", minversion="0.21")

from _asserts import assert_same_state, hook_count, state_of
from _hf import (
    LAYERS,
    NAME,
    PAIR,
    arguments,
    bert,
    bert_teacher,
    distil,
    logged,
    no_dropout_bert,
    texts,
    weighted,
)
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer
from vid_loss.integrations.hf import VIDTrainer

# PEFT's own, of transformers' older spellings.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
WRAPPED = "base_model.model."


def adapted(**options):
    torch.manual_seed(0)
    config = LoraConfig(
        target_modules=["query", "value"], modules_to_save=["classifier"], task_type="SEQ_CLS"
    )
    return get_peft_model(bert(**options), config)


class WithoutAdapters(nn.Module):
    """The student before it learnt: a teacher that needs no weights of its own."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask=None):
        with self.model.disable_adapter():
            return self.model(input_ids=input_ids, attention_mask=attention_mask)


NAMES = {
    "of the base model": (LAYERS[0], LAYERS[1]),
    "of the wrapped one": (WRAPPED + LAYERS[0], LAYERS[1]),
    "of a module with an adapter": ("bert.encoder.layer.1.attention.self.query", LAYERS[1]),
    "of an input": ("classifier:input", "classifier:input"),
}


@pytest.mark.parametrize("names", NAMES)
def test_pairs_go_by_the_names_of_either_model(tmp_path, names):
    pair = NAMES[names]
    trainer = distil(tmp_path, adapted(), pairs=dict([pair]), max_steps=2)
    trainer.train()
    assert len(logged(trainer, "transfer/" + "->".join(pair))) == 2


def test_both_names_are_the_same_run(tmp_path):
    runs = [
        distil(tmp_path, adapted(), pairs=dict([NAMES[names]]), max_steps=2)
        for names in ("of the base model", "of the wrapped one")
    ]
    for trainer in runs:
        torch.manual_seed(0)
        trainer.train()
    assert logged(runs[0], "loss") == logged(runs[1], "loss")


def test_a_teacher_with_adapters_goes_by_its_base_s_names_too(tmp_path):
    trainer = distil(tmp_path, bert(), adapted(width=24, layers=3), max_steps=1)
    trainer.train()
    assert logged(trainer, f"transfer/{NAME}")


def test_a_name_of_neither_is_refused_with_the_closest(tmp_path):
    with pytest.raises(ValueError, match=r"'layer\.1' of the student: .*base_model\.model\.bert"):
        distil(tmp_path, adapted(), pairs={"layer.1": LAYERS[1]})


def test_weight_zero_is_the_plain_trainer_to_the_last_bit(tmp_path):
    plain = Trainer(adapted(), arguments(tmp_path), train_dataset=texts())
    trainer = distil(tmp_path, adapted(), pairs=weighted(0.0))
    for one in (plain, trainer):
        torch.manual_seed(0)
        one.train()
    assert logged(trainer, "loss") == logged(plain, "loss")
    assert_same_state(trainer.model, state_of(plain.model))


def test_adapters_and_heads_are_trained_and_nothing_else(tmp_path):
    trainer = distil(tmp_path, adapted())
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        trained = any(part in name for part in ("lora", "modules_to_save", "vid_heads"))
        assert torch.equal(parameter, before[name]) != trained, name


def test_a_checkpoint_is_an_adapter_with_the_heads_beside_it_and_resumes(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 3}
    whole, resumed = (distil(tmp_path, adapted(), **options) for _ in range(2))
    whole.train()
    folder = tmp_path / "checkpoint-2"
    keys = load_file(folder / "adapter_model.safetensors").keys()
    assert all("lora" in key or "classifier" in key for key in keys)
    assert (folder / "vid_heads.safetensors").is_file()
    resumed.train(resume_from_checkpoint=str(folder))
    assert logged(resumed, "loss") == logged(whole, "loss")
    assert_same_state(resumed.model, state_of(whole.model))
    loaded = PeftModel.from_pretrained(bert(), tmp_path / "checkpoint-3")
    whole.close()
    assert_same_state(loaded, state_of(whole.model))


def test_the_adapter_is_merged_with_and_without_the_heads(tmp_path):
    student = adapted()
    hooks, keys = hook_count(student), student.state_dict().keys()
    trainer = distil(tmp_path, student)
    trainer.train()
    attached = copy.deepcopy(student).merge_and_unload()
    trainer.close()
    assert hook_count(student) == hooks
    assert student.state_dict().keys() == keys
    merged = student.merge_and_unload()
    assert merged.state_dict().keys() == bert().state_dict().keys()
    assert_same_state(attached, state_of(merged))
    merged.save_pretrained(tmp_path / "merged")
    again, info = type(merged).from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_same_state(again, state_of(merged))


def test_the_base_model_with_adapters_off_is_a_teacher(tmp_path):
    lora = LoraConfig(target_modules=["query", "value"])
    torch.manual_seed(0)
    students = [get_peft_model(no_dropout_bert(), lora)]
    students.append(copy.deepcopy(students[0]))
    teachers = WithoutAdapters(students[0]), no_dropout_bert()
    layers = f"model.{WRAPPED}{LAYERS[0]}", LAYERS[0]
    losses = []
    for student, teacher, layer in zip(students, teachers, layers, strict=True):
        trainer = distil(tmp_path, student, teacher, {LAYERS[0]: layer}, max_steps=3)
        trainer.train()
        losses.append(logged(trainer, "loss"))
    assert losses[0] == losses[1]


# That the mask is of other positions, too.
@pytest.mark.filterwarnings("ignore:Pair:UserWarning")
def test_virtual_tokens_that_the_teacher_lacks_are_refused(tmp_path):
    config = PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)
    student = get_peft_model(bert(), config)
    with pytest.raises(ValueError, match="as many tokens of each"):
        VIDTrainer(
            student,
            arguments(tmp_path),
            train_dataset=texts(),
            teacher=bert_teacher(),
            pairs=PAIR,
        )

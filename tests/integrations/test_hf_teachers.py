"""Teachers that are made smaller, or are not in memory as a whole."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import accelerate
from _asserts import assert_same_state, state_of
from _hf import bert_teacher, distil, logged, no_dropout_bert
from torch import nn
from transformers import BertForSequenceClassification, BitsAndBytesConfig

# Of torch's own older ways to quantize, and of libraries' older spellings.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*quantize_per_tensor:UserWarning"),
]


def as_it_is(folder):
    return bert_teacher()


def on_the_cpu_and_loaded_when_needed(folder):
    return accelerate.cpu_offload(bert_teacher(), execution_device="cpu")


def on_disk(folder):
    return accelerate.disk_offload(bert_teacher(), folder / "weights", execution_device="cpu")


def int8(folder):
    layers = {nn.Linear}
    return torch.ao.quantization.quantize_dynamic(bert_teacher().eval(), layers, torch.qint8)


def bfloat16(folder):
    return bert_teacher().to(torch.bfloat16)


def of_bitsandbytes(folder):
    pytest.importorskip("bitsandbytes")
    bert_teacher().save_pretrained(folder / "teacher")
    config = BitsAndBytesConfig(load_in_8bit=True)
    return BertForSequenceClassification.from_pretrained(
        folder / "teacher", quantization_config=config, device_map="cpu"
    )


EXACT = on_the_cpu_and_loaded_when_needed, on_disk
ROUNDED = int8, bfloat16, of_bitsandbytes


@pytest.mark.parametrize("make", [*EXACT, *ROUNDED])
def test_the_student_learns_as_from_the_whole_one(tmp_path, make):
    runs = [distil(tmp_path, no_dropout_bert(), x(tmp_path), max_steps=2) for x in (as_it_is, make)]
    for trainer in runs:
        trainer.train()
    found = [logged(trainer, "transfer_loss") for trainer in runs]
    if make in EXACT:
        assert found[1] == found[0]
        assert_same_state(runs[1].model, state_of(runs[0].model))
        assert any(p.is_meta for p in runs[1].teacher.parameters())
    else:
        assert found[1] == pytest.approx(found[0], rel=1e-2)
        assert found[1] != found[0]

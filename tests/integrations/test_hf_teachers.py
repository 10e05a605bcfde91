"""Teachers that are made smaller, or are not in memory as a whole."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import accelerate
from _asserts import assert_same_state, state_of
from _hf import bert_teacher, distil, logged, no_dropout_bert
from _hf_net import Net
from _hf_net import distil as distil_net
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


def dispatched(folder):
    """One part in memory and one on the disk, as device_map= spreads a model that does not fit."""
    parts = "bert.embeddings", "bert.encoder", "bert.pooler", "dropout", "classifier"
    places = dict.fromkeys(parts, "cpu") | {"bert.encoder": "disk"}
    return accelerate.dispatch_model(bert_teacher(), places, offload_dir=folder / "weights")


def on_disk_by_a_map(folder):
    places = dict.fromkeys(("bert", "dropout", "classifier"), "disk")
    weights = folder / "weights"
    return accelerate.dispatch_model(bert_teacher(), places, main_device="cpu", offload_dir=weights)


def hooked_in_one_place(folder):
    return accelerate.dispatch_model(bert_teacher(), {"": "cpu"}, force_hooks=True)


def of_a_device_map(folder):
    bert_teacher().save_pretrained(folder / "teacher")
    return BertForSequenceClassification.from_pretrained(folder / "teacher", device_map="cpu")


def int8(folder):
    layers = {nn.Linear}
    return torch.ao.quantization.quantize_dynamic(bert_teacher().eval(), layers, torch.qint8)


def int8_of_torchao(folder):
    quantization = pytest.importorskip("torchao.quantization")
    teacher = bert_teacher().eval()
    quantization.quantize_(teacher, quantization.Int8DynamicActivationInt8WeightConfig())
    return teacher


def bfloat16(folder):
    return bert_teacher().to(torch.bfloat16)


def of_bitsandbytes(folder):
    pytest.importorskip("bitsandbytes")
    bert_teacher().save_pretrained(folder / "teacher")
    config = BitsAndBytesConfig(load_in_8bit=True)
    return BertForSequenceClassification.from_pretrained(
        folder / "teacher", quantization_config=config, device_map="cpu"
    )


OFFLOADED = on_the_cpu_and_loaded_when_needed, on_disk, on_disk_by_a_map, dispatched
EXACT = *OFFLOADED, hooked_in_one_place, of_a_device_map
ROUNDED = int8, int8_of_torchao, bfloat16, of_bitsandbytes


@pytest.mark.parametrize("stop", [False, True], ids=["whole", "stopped"])
@pytest.mark.parametrize("make", [*EXACT, *ROUNDED])
def test_the_student_learns_as_from_the_whole_one(tmp_path, make, stop):
    runs = [
        distil(tmp_path, no_dropout_bert(), x(tmp_path), max_steps=2, stop_teacher=stop)
        for x in (as_it_is, make)
    ]
    for trainer in runs:
        trainer.train()
    found = [logged(trainer, "transfer_loss") for trainer in runs]
    if make in EXACT:
        assert found[1] == found[0]
        assert_same_state(runs[1].model, state_of(runs[0].model))
        assert any(p.is_meta for p in runs[1].teacher.parameters()) == (make in OFFLOADED)
    else:
        assert found[1] == pytest.approx(found[0], rel=1e-2)
        assert found[1] != found[0]


@pytest.mark.parametrize("place", ["cpu", "0"])  # a GPU may be named by its number
@pytest.mark.parametrize("teacher_inputs", [None, lambda x: (x,)])
def test_a_teacher_of_a_device_map_is_given_its_inputs_where_it_has_been_moved(
    tmp_path, teacher_inputs, place
):
    class Moved(Net):
        def forward(self, x):
            seen.append(x.device.type)
            return super().forward(torch.eye(*x.shape))

    seen = []
    teacher = Moved(7)
    teacher.hf_device_map = {"": place}
    trainer = distil_net(tmp_path, teacher=teacher, teacher_inputs=teacher_inputs)
    # Stands for all of it on another GPU: of meta's, nothing comes back.
    teacher.first = nn.Parameter(torch.empty(0, device="meta"))
    trainer.train()
    assert min(logged(trainer, "transfer_loss")) > 0
    assert set(seen) == {"cpu", "meta"}  # the heads were sized before

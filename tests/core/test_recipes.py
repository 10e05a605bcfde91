"""The recipes of the page on choosing layers, each on models that have its names."""

import re

import pytest
import torch
from _pages import ROOT, blocks
from paper.models import VGG9, WideResNet

from vid_loss import Distiller

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")
torchvision = pytest.importorskip("torchvision")

PAGE = ROOT / "vid_loss" / "matching" / "README.md"


def recipes() -> dict:
    (block,) = (block for block in blocks(PAGE, "python") if "recipes = {" in block.code)
    names: dict = {}
    exec(compile(block.code, str(block), "exec"), names)
    return names["recipes"]


def resnet(depth):
    return timm.create_model(f"resnet{depth}", channels=(4, 4, 8, 8), stem_width=4)


def vit(embed_dim):
    return timm.create_model("vit_tiny_patch16_224", embed_dim=embed_dim, num_heads=2)


def swin():
    size = {"embed_dim": 8, "num_heads": (1, 2, 4, 8)}
    return timm.create_model("swin_tiny_patch4_window7_224", **size)


def bert(layers):
    size = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "vocab_size": 30}
    config = transformers.BertConfig(num_hidden_layers=layers, **size)
    return transformers.BertForSequenceClassification(config)


def gpt2(layers):
    size = {"n_embd": 8, "n_head": 2, "vocab_size": 30, "bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=layers, **size))


def llama(layers):
    size = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "vocab_size": 30}
    config = transformers.LlamaConfig(num_hidden_layers=layers, num_key_value_heads=2, **size)
    return transformers.LlamaForCausalLM(config)


MODELS = {
    "ResNet-34 -> ResNet-18": lambda: (resnet(18), resnet(34)),
    "ResNet-34 -> vgg11_bn": lambda: (torchvision.models.vgg11_bn(), resnet(34)),
    "ResNet-34 -> VGG-9": lambda: (VGG9(10), resnet(34)),
    "WRN-40-2 -> WRN-16-1": lambda: (WideResNet(16, 1, 10), WideResNet(40, 2, 10)),
    "vit_base -> vit_tiny": lambda: (vit(8), vit(16)),
    "swin_tiny -> ResNet-18": lambda: (resnet(18), swin()),
    "ResNet-50 -> vit_tiny": lambda: (vit(8), resnet(50)),
    "vit_base -> ResNet-18": lambda: (resnet(18), vit(16)),
    "BERT-base -> 4 layers": lambda: (bert(4), bert(12)),
    "GPT-2 -> 6 layers": lambda: (gpt2(6), gpt2(12)),
    "Llama, 16 -> 4 layers": lambda: (llama(4), llama(16)),
}


def test_every_recipe_is_tried():
    assert list(recipes()) == list(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_a_recipe_fits_its_models_and_trains(name):
    torch.manual_seed(0)
    student, teacher = MODELS[name]()
    if re.search("BERT|GPT|Llama", name):
        args, batch = (), {"input_ids": torch.arange(12).view(2, 6)}
    else:
        size = 32 if "WRN" in name else 224
        args, batch = (torch.randn(1, 3, size, size),), {}
    distiller = Distiller(student, teacher, recipes()[name], example=batch or args)
    student.train()
    student(*args, **batch)
    loss = distiller(*args, **batch)
    loss.backward()
    assert len(distiller.pairs) == 2
    assert loss.isfinite()
    assert any(p.grad is not None and p.grad.any() for p in student.parameters())

"""Pairs by name, two steps with them, and models of which they are chosen."""

import pytest
import torch

from vid_loss import Distiller


def names(pairs):
    return {pair.student: pair.teacher for pair in pairs}


def train_two_steps(student, teacher, pairs, example, **options):
    """Trains on the pairs alone; every parameter of a head must have moved."""
    distiller = Distiller(student, teacher, pairs, example=example, **options)
    heads = [parameter.detach().clone() for parameter in distiller.parameters()]
    optimizer = torch.optim.SGD([*student.parameters(), *distiller.parameters()], lr=1e-3)
    call = example if isinstance(example, dict) else {}
    args = () if call else (example,)
    for _ in range(2):
        student.train()
        student(*args, **call)
        loss = distiller(*args, **call)
        optimizer.zero_grad()
        loss.backward()
        assert loss.isfinite()
        optimizer.step()
    assert all((a != b).any() for a, b in zip(heads, distiller.parameters(), strict=True))


IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
STAGES = {f"layer{i}": f"layer{i}" for i in range(1, 5)}


def resnet(depth):
    timm = pytest.importorskip("timm")
    size = {"channels": (4, 4, 8, 8), "stem_width": 4}
    return timm.create_model(f"resnet{depth}", num_classes=10, **size)


def vit(depth, embed_dim, image=64, **options):
    timm = pytest.importorskip("timm")
    name, size = "vit_tiny_patch16_224", {"embed_dim": embed_dim, "depth": depth, "num_heads": 2}
    return timm.create_model(name, img_size=image, num_classes=10, **size, **options)


def swin():
    timm = pytest.importorskip("timm")
    size = {"embed_dim": 8, "num_heads": (1, 2, 4, 8), "window_size": 2, "img_size": 64}
    return timm.create_model("swin_tiny_patch4_window7_224", num_classes=10, **size)


def bert(depth, width):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=2,
        intermediate_size=width,
        vocab_size=30,
    )
    return transformers.BertForSequenceClassification(config)

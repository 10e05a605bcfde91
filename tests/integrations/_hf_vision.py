"""Tiny vision models of transformers, and images for them."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import transformers


def images(rows=8, size=32):
    generator = torch.Generator().manual_seed(4)
    pixels = torch.randn(rows, 3, size, size, generator=generator)
    return [{"pixel_values": x, "labels": row % 3} for row, x in enumerate(pixels)]


def vit(width, layers, seed):
    torch.manual_seed(seed)
    config = transformers.ViTConfig(
        image_size=32,
        patch_size=8,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=width,
        num_labels=3,
    )
    return transformers.ViTForImageClassification(config)


def resnet(width, seed):
    torch.manual_seed(seed)
    config = transformers.ResNetConfig(
        embedding_size=width,
        hidden_sizes=[width, 2 * width],
        depths=[1, 1],
        layer_type="basic",
        num_labels=3,
    )
    return transformers.ResNetForImageClassification(config)


def swin(width, seed):
    torch.manual_seed(seed)
    config = transformers.SwinConfig(
        image_size=32,
        patch_size=4,
        embed_dim=width,
        depths=[1, 1],
        num_heads=[1, 2],
        window_size=4,
        num_labels=3,
    )
    return transformers.SwinForImageClassification(config)


def last_layer(model):
    """The name of the last layer of a ViT, which moved in transformers 5."""
    names = [name for name, part in model.named_modules() if type(part).__name__ == "ViTLayer"]
    return names[-1]

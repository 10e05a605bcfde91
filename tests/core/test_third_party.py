"""The three lines in loops that are not ours."""

import pytest
import torch
import torch.nn.functional as F
from _asserts import assert_same_state, hook_count, state_of

from vid_loss import Distiller, Pair


def two_steps(student, teacher, distiller, batch, labels, logits_of=lambda output: output):
    """The diff of the README, in a loop that knows nothing else of this library."""
    teacher_state = state_of(teacher)
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3)
    optimizer.add_param_group({"params": distiller.parameters()})
    for _ in range(2):
        loss = F.cross_entropy(logits_of(student(**batch)), labels) + distiller(**batch)
        optimizer.zero_grad()
        loss.backward()
        assert torch.isfinite(loss)
        for name, parameter in (*student.named_parameters(), *distiller.named_parameters()):
            if parameter.grad is None:
                assert "pooler" in name  # BERT's, when the task does not use it
                continue
            assert torch.isfinite(parameter.grad).all(), name
        optimizer.step()
    assert all(p.grad is None for p in teacher.parameters())
    assert_same_state(teacher, teacher_state)
    distiller.close()
    assert hook_count(student) == hook_count(teacher) == 0


def test_torchvision_resnet18_from_resnet34():
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    student, teacher = models.resnet18(num_classes=4), models.resnet34(num_classes=4)
    # Untrained, its features grow to hundreds; the last block's norm is where that comes from.
    batch = {"x": torch.randn(4, 3, 32, 32)}
    pairs = {"layer3": "layer3", "layer4": "layer4", "fc:input": "fc"}
    distiller = Distiller(student, teacher, pairs, example=batch)
    two_steps(student, teacher, distiller, batch, torch.tensor([0, 1, 2, 3]))


def test_timm_vit_from_vit():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    student, teacher = (
        timm.create_model(
            "vit_tiny_patch16_224",
            img_size=32,
            patch_size=8,
            embed_dim=width,
            depth=depth,
            num_heads=2,
            num_classes=4,
        )
        for width, depth in ((16, 2), (32, 4))
    )
    batch = {"x": torch.randn(4, 3, 32, 32)}
    pairs = [Pair("blocks.0", "blocks.1"), Pair("blocks.1", "blocks.3"), Pair("head:input", "head")]
    distiller = Distiller(student, teacher, pairs, example=batch)
    two_steps(student, teacher, distiller, batch, torch.tensor([0, 1, 2, 3]))


def test_hugging_face_bert_from_a_larger_one_with_padded_batches():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    student, teacher = (
        transformers.BertForSequenceClassification(
            transformers.BertConfig(
                vocab_size=50,
                hidden_size=width,
                num_hidden_layers=layers,
                num_attention_heads=2,
                intermediate_size=32,
                num_labels=2,
            )
        )
        for width, layers in ((8, 2), (16, 4))
    )
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] * 2 + [0] * 5])
    batch = {"input_ids": torch.randint(1, 50, (3, 7)) * mask, "attention_mask": mask}
    pairs = {
        "bert.encoder.layer.0": "bert.encoder.layer.1",
        "bert.encoder.layer.1": "bert.encoder.layer.3",
    }
    distiller = Distiller(student, teacher, pairs, example=batch)
    labels = torch.tensor([0, 1, 0])
    two_steps(student, teacher, distiller, batch, labels, lambda output: output.logits)


def test_hugging_face_padding_does_not_reach_the_transfer_terms():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    student, teacher = transformers.BertModel(config), transformers.BertModel(config)
    ids = torch.randint(1, 50, (2, 4))
    short = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    padded = {name: F.pad(value, (0, 3)) for name, value in short.items()}
    distiller = Distiller(student, teacher, {"encoder.layer.1": "encoder.layer.1"}, example=short)
    values = []
    for batch in (short, padded):
        student(**batch)
        values.append(distiller(**batch))
    torch.testing.assert_close(*values)

"""Pairs with masks of their own under VIDTrainer: of columns, also of those no model takes."""

import pytest
import torch
import torch.nn.functional as F
from _hf import arguments, logged
from _models import TokenNet
from transformers import CLIPConfig, CLIPModel, Wav2Vec2Config, Wav2Vec2ForSequenceClassification
from vid_loss.integrations.hf import VIDTrainer

from vid_loss import Pair


def clip(width, layers):
    torch.manual_seed(0)
    size = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "intermediate_size": width,
        "attention_dropout": 0.0,
    }
    text = {"vocab_size": 60, "max_position_embeddings": 17, "eos_token_id": 59, "pad_token_id": 0}
    vision = {"image_size": 32, "patch_size": 8}  # 17 tokens, with its class token
    return CLIPModel(
        CLIPConfig(text_config={**size, **text}, vision_config={**size, **vision}, projection_dim=8)
    )


def captions(length, padding):
    generator = torch.Generator().manual_seed(1)
    rows = []
    for row in range(8):
        ids = torch.randint(1, 58, (length,), generator=generator)
        ids[-1] = 59
        mask = torch.ones(length, dtype=torch.long)
        mask[1 : 1 + padding * (row % 2)] = 0
        pixels = torch.randn(3, 32, 32, generator=generator)
        rows.append({"input_ids": ids, "attention_mask": mask, "pixel_values": pixels})
    return rows


def collated(rows):
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    return {**batch, "return_loss": True}


TOWERS = {f"{t}_model.encoder.layers.0": f"{t}_model.encoder.layers.1" for t in ("text", "vision")}


@pytest.mark.parametrize("length", [12, 17])
def test_two_towers_and_the_mask_of_one(tmp_path, length):
    found = {}
    for padding in (0, 6):
        torch.manual_seed(0)
        trainer = VIDTrainer(
            clip(8, 1),
            arguments(tmp_path, max_steps=1),
            data_collator=collated,
            train_dataset=captions(length, padding),
            teacher=clip(16, 2),
            pairs=TOWERS,
        )
        trainer.train()
        for text, term in (("text", 0), ("vision", 1)):
            name = list(trainer.distiller.pairs)[term]
            found[text, padding] = logged(trainer, f"transfer/{name}")
    assert found["vision", 0] == found["vision", 6]
    assert found["text", 0] != found["text", 6]


def sounds():
    generator = torch.Generator().manual_seed(1)
    rows = []
    for row in range(8):
        mask = torch.ones(400, dtype=torch.long)
        mask[200 + 200 * (row % 2) :] = 0
        x = torch.randn(400, generator=generator)
        rows.append({"input_values": x, "attention_mask": mask, "labels": row % 2})
    return rows


def speech(width, layers):
    torch.manual_seed(0)
    return Wav2Vec2ForSequenceClassification(
        Wav2Vec2Config(
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=width,
            layerdrop=0.0,
            mask_time_prob=0.0,
            classifier_proj_size=8,
            conv_dim=(8, 8),
            conv_stride=(5, 4),
            conv_kernel=(10, 8),
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=2,
            feat_extract_norm="layer",
        )
    )


SPEECH = "wav2vec2.encoder.layers.0", "wav2vec2.encoder.layers.1"


def test_frames_of_a_sound(tmp_path):
    student, teacher = speech(8, 1), speech(16, 2)
    lengths = student._get_feat_extract_output_lengths
    seen = []

    def frames(attention_mask):
        most = int(lengths(torch.tensor(attention_mask.shape[1])))
        seen.append(student._get_feature_vector_attention_mask(most, attention_mask))
        return seen[-1]

    options = {"train_dataset": sounds(), "teacher": teacher}
    args = arguments(tmp_path, max_steps=2)
    with pytest.warns(UserWarning, match=r"shape \(2, 400\), of other ones"):
        VIDTrainer(student, args, pairs=dict([SPEECH]), **options)
    trainer = VIDTrainer(student, args, pairs=[Pair(*SPEECH, mask=frames)], **options)
    trainer.train()
    assert len(logged(trainer, "transfer_loss")) == 2
    assert len(seen) > 2
    assert all(0 < int(x.sum()) < x.numel() for x in seen)


def rows_with_a_mask_of_their_own():
    generator = torch.Generator().manual_seed(1)
    rows = []
    for row in range(8):
        valid = torch.ones(6, dtype=torch.long)
        valid[2 + row % 4 :] = 0
        ids = torch.randint(1, 20, (6,), generator=generator)
        rows.append({"input_ids": ids, "valid": valid, "labels": row % 2})
    return rows


class Classifier(TokenNet):
    def forward(self, input_ids, labels=None):
        logits = super().forward(input_ids)
        task = logits.sum() if labels is None else F.cross_entropy(logits, labels)
        return task, logits


@pytest.mark.parametrize("source", ["valid", lambda valid: valid, lambda valid, **_: valid])
def test_a_column_that_is_only_a_mask_is_kept_and_no_model_sees_it(tmp_path, source):
    terms = {}
    for mask in (source, False):
        torch.manual_seed(0)
        trainer = VIDTrainer(
            Classifier(4),
            arguments(tmp_path, max_steps=1),
            train_dataset=rows_with_a_mask_of_their_own(),
            teacher=Classifier(6),
            pairs=[Pair("layer", "layer", mask=mask)],
        )
        trainer.train()
        terms[mask is False] = logged(trainer, "transfer_loss")
    assert len(terms[True]) == 1
    assert terms[True] != terms[False]


def test_a_column_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"expected a column 'frames' for a pair's mask; got"):
        VIDTrainer(
            Classifier(4),
            arguments(tmp_path, max_steps=1),
            train_dataset=rows_with_a_mask_of_their_own(),
            teacher=Classifier(6),
            pairs=[Pair("layer", "layer", mask="frames")],
        )

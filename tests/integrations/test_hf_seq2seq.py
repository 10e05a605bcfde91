"""Encoder-decoders, padded on both sides, under Seq2SeqTrainer with the mixin in front."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from _asserts import assert_same_state, state_of
from _hf import arguments, logged, without_estimates
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)
from vid_loss.integrations.hf import VIDTrainerMixin

from vid_loss import Pair

ENCODER, DECODER = "model.encoder.layers.1", "model.decoder.layers.1"


class Distilling(VIDTrainerMixin, Seq2SeqTrainer):
    """The README's."""


def bart(width=16, layers=2, seed=0):
    torch.manual_seed(seed)
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=32,
            d_model=width,
            encoder_layers=layers,
            decoder_layers=layers,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=2 * width,
            decoder_ffn_dim=2 * width,
            max_position_embeddings=32,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=2,
            forced_eos_token_id=None,
            dropout=0.0,
        )
    )


def translations(rows=8):
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(3, 32, (12,), generator=generator).tolist() for _ in range(rows)]
    return [{"input_ids": x[: 4 + i % 4], "labels": x[-2 - i % 3 :]} for i, x in enumerate(drawn)]


class Padded:
    """Pads each side to at least so many tokens."""

    def __init__(self, source=0, target=0):
        self.least = {"input_ids": (source, 0), "labels": (target, -100)}

    def __call__(self, rows):
        batch = {}
        for key, (least, fill) in self.least.items():
            width = max(least, *(len(row[key]) for row in rows))
            padded = [row[key] + [fill] * (width - len(row[key])) for row in rows]
            batch[key] = torch.tensor(padded)
        return {**batch, "attention_mask": (batch["input_ids"] > 0).long()}


def build(folder, cls=Distilling, collate=None, **own):
    options = {"max_steps": 2, "predict_with_generate": True, "generation_max_length": 4}
    return cls(
        bart(),
        arguments(folder, Seq2SeqTrainingArguments, **options),
        train_dataset=translations(),
        eval_dataset=translations(),
        data_collator=collate or Padded(),
        **own,
    )


def distil(folder, layers, weight=1.0, **options):
    pairs = [Pair(layer, layer, weight=weight) for layer in layers]
    pairs = options.pop("pairs", pairs)
    return build(folder, teacher=bart(24, 3, seed=1), pairs=pairs, **options)


def test_at_weight_zero_it_is_the_plain_trainer_to_the_last_bit(tmp_path):
    plain, trainer = build(tmp_path, Seq2SeqTrainer), distil(tmp_path, [ENCODER, DECODER], 0.0)
    for one in (plain, trainer):
        one.train()
    for key in ("loss", "grad_norm"):
        assert logged(trainer, key) == logged(plain, key), key
    assert_same_state(trainer.model, state_of(plain.model))
    assert trainer.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]
    generated = [one.predict(translations()).predictions.tolist() for one in (plain, trainer)]
    assert generated[0] == generated[1]


@pytest.mark.parametrize(("source", "target"), [(20, 0), (0, 20), (9, 9)])
def test_padding_of_either_side_counts_nowhere(tmp_path, source, target):
    """Also where both sides have the same length, and one mask would fit both."""
    pairs = without_estimates({ENCODER: ENCODER, DECODER: DECODER})
    runs = [
        distil(tmp_path, [], pairs=pairs, collate=collate)
        for collate in (Padded(), Padded(source, target))
    ]
    for trainer in runs:
        trainer.train()
    for layer in (ENCODER, DECODER):
        values = [logged(trainer, f"transfer/{layer}->{layer}")[0] for trainer in runs]
        assert values[1] == pytest.approx(values[0], rel=1e-5), layer


def test_a_decoder_s_own_mask_is_used_if_the_batch_has_one(tmp_path):
    padded, seen = Padded(), []

    def collate(rows):
        batch = padded(rows)
        first = torch.zeros_like(batch["labels"])
        first[:, 0] = 1
        return {**batch, "decoder_attention_mask": first}

    trainer = distil(tmp_path, [DECODER], collate=collate)
    (loss,) = trainer.distiller.losses.values()
    loss.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["mask"]), with_kwargs=True
    )
    trainer.train()
    assert len(seen) == 2
    assert all(mask[:, 0].all() and not mask[:, 1:].any() for mask in seen)

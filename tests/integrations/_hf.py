"""Tiny transformers models and data, built from configurations."""

from functools import partial

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    TrainingArguments,
)
from vid_loss.integrations.hf import VIDTrainer

from vid_loss import Pair, VIDLoss

PAIR = {"bert.encoder.layer.1": "bert.encoder.layer.2"}
LAYERS = next(iter(PAIR.items()))
NAME = "->".join(LAYERS)
LLAMA_PAIR = {"model.layers.0": "model.layers.1"}


def bert(width: int = 16, layers: int = 2, seed: int = 0, **config) -> nn.Module:
    torch.manual_seed(seed)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=32,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=2 * width,
            max_position_embeddings=16,
            num_labels=3,
            **config,
        )
    )


def bert_teacher() -> nn.Module:
    return bert(24, 3, seed=1)


def llama(width: int = 16, layers: int = 1, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=2 * width,
            max_position_embeddings=16,
            pad_token_id=0,
        )
    )


def llama_teacher() -> nn.Module:
    return llama(24, 2, seed=1)


class Wordy(nn.Module):
    """A teacher with columns of its own, which refuses labels."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.embed = nn.Embedding(32, 24)

    def forward(self, words, attention_mask=None):
        return self.embed(words)


def texts(rows: int = 16, length: int = 8, padding: int = 3) -> list[dict]:
    """Rows for a classifier; the end of every second one is padding."""
    generator = torch.Generator().manual_seed(2)
    data = []
    for row in range(rows):
        ids = torch.randint(1, 32, (length,), generator=generator)
        mask = torch.ones(length, dtype=torch.long)
        mask[length - padding * (row % 2) :] = 0
        data.append({"input_ids": ids * mask, "attention_mask": mask, "labels": row % 3})
    return data


def sentences(rows: int = 16, length: int = 8) -> list[dict]:
    """Rows for a causal language model, all of one length."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 32, (rows, length), generator=generator)
    return [{"input_ids": x, "attention_mask": torch.ones_like(x), "labels": x} for x in ids]


def arguments(folder, cls=TrainingArguments, **options) -> TrainingArguments:
    defaults = {
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "log_level": "error",
        "dataloader_pin_memory": False,
    }
    return cls(output_dir=str(folder), **{**defaults, **options})


def logged(trainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def no_dropout_bert():
    return bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def without_estimates(pairs):
    """Pairs of the paper's loss, which keeps no running means: the same function of any batch."""
    loss = partial(VIDLoss, variance="trained", standardize=False, init_var=5.0)
    return [Pair(student, teacher, 1.0, loss) for student, teacher in pairs.items()]


def weighted(weight):
    return [Pair(*LAYERS, weight=weight)]


def distil(folder, student=None, teacher=None, pairs=PAIR, rows=None, cls=VIDTrainer, **options):
    of_trainer = ("compute_loss_func", "model_init", "args", "stop_teacher", "teacher_dtype")
    of_trainer += ("cache", "data_collator")
    rest = {k: options.pop(k) for k in list(options) if k in of_trainer}
    if "model_init" not in rest:
        rest["model"] = student or bert()
    return cls(
        args=arguments(folder, **options),
        train_dataset=rows or texts(),
        eval_dataset=rows or texts(),
        teacher=teacher or bert_teacher(),
        pairs=pairs,
        **rest,
    )

"""A tokenizer of 32 words, and texts in them."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(29))]


def tokenizer() -> PreTrainedTokenizerFast:
    words = models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    model = Tokenizer(words)
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=model, model_max_length=16, **special)


def texts(count: int, seed: int, least: int = 2) -> list[str]:
    """Texts of ``least`` to ``least + 3`` words."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [least + i % 4 for i in range(count)]
    drawn = [torch.randint(3, 32, (length,), generator=generator).tolist() for length in lengths]
    return [" ".join(WORDS[i] for i in row) for row in drawn]

"""Models whose pairs have masks of their own, and a batch for each."""

import torch
import torch.nn.functional as F
from _models import TokenNet
from torch import nn

from vid_loss import Distiller


class Towers(nn.Module):
    """Tokens of text and of an image, each through a layer of its own."""

    def __init__(self, width):
        super().__init__()
        self.embed = nn.Embedding(20, width)
        self.text = nn.Linear(width, width)
        self.patch = nn.Conv2d(1, width, 2, 2)
        self.image = nn.Linear(width, width)

    def forward(self, input_ids, pixel_values, attention_mask=None, pixel_mask=None):
        text = self.text(self.embed(input_ids))
        image = self.image(self.patch(pixel_values).flatten(2).mT)
        return text.mean(1), image.mean(1)


class EncoderDecoder(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.embed = nn.Embedding(20, width)
        self.encoder = nn.Linear(width, width)
        self.decoder = nn.MultiheadAttention(width, 1, batch_first=True)

    def forward(
        self, input_ids, decoder_input_ids, attention_mask=None, decoder_attention_mask=None
    ):
        memory = self.encoder(self.embed(input_ids))
        target = self.embed(decoder_input_ids)
        return self.decoder(target, memory, memory)[0] + target


class Padded(TokenNet):
    """Pads its tokens to a multiple of four, as Longformer does to its window."""

    def forward(self, input_ids, attention_mask=None):
        return super().forward(F.pad(input_ids, (0, -input_ids.shape[1] % 4)))


class Frames(nn.Module):
    """Samples of a sound become fewer tokens."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv1d(1, width, 4, 4)
        self.layer = nn.Linear(width, width)

    def forward(self, input_values, attention_mask=None):
        return self.layer(self.conv(input_values.unsqueeze(1)).mT).mean(1)


def mask_of(*lengths, most):
    return (torch.arange(most) < torch.tensor(lengths)[:, None]).long()


def batch_of(cls, length=8):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 20, (2, length), generator=generator)
    batch = {"input_ids": ids, "attention_mask": mask_of(length, length // 2, most=length)}
    if cls is Towers:
        batch["pixel_values"] = torch.randn(2, 1, 4, 8, generator=generator)
    if cls is EncoderDecoder:
        batch["decoder_input_ids"] = ids.flip(1)
    if cls is Frames:
        del batch["input_ids"]
        batch["input_values"] = torch.randn(2, length, generator=generator)
    return batch


def build(cls, pairs, **batch):
    torch.manual_seed(0)
    student, teacher = cls(4), cls(6)
    return student, Distiller(student, teacher, pairs, example=batch)

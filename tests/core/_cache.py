"""A small student and teacher with a cache between them."""

import torch
from _models import cnn_pair, images
from torch import nn

from vid_loss import Distiller
from vid_loss.teacher import Teacher


class Counted(nn.Module):
    """A teacher that counts its samples."""

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.body = teacher
        self.samples = 0

    def forward(self, x):
        self.samples += len(x)
        return self.body(x)


def build(cache, pairs=None, **options):
    student, teacher = cnn_pair()
    teacher = Counted(teacher.eval())
    pairs = pairs or {"stage1": "body.stage1", "fc:input": "body.fc"}
    distiller = Distiller(student, teacher, pairs, example=images(), cache=cache, **options)
    teacher.samples = 0
    return student, teacher, distiller


def loss(student, distiller, x, index):
    student(x)
    return distiller(x, sample_index=torch.as_tensor(index))


def fill(cache, rows=range(8), **options):
    """Another process, which has left its files."""
    student, _, distiller = build(cache, **options)
    value = loss(student, distiller, images()[list(rows)], rows)
    cache.flush()
    return value


class Plain(nn.Module):
    """A teacher that depends on what is neither weight nor shown."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out = nn.Linear(6, 8), nn.Linear(8, 8)
        self.act, self.heads, self.scale = torch.relu, 2, 1.0
        self.body = nn.Identity()
        self.runs = 0

    def forward(self, x, positions=None, temperature=1.0, weights=None):
        self.runs += 1
        h = self.act(self.embed(x)) * self.scale / temperature
        h = h.unflatten(-1, (self.heads, -1)).softmax(-1).flatten(-2)
        if positions is not None:  # (L,), added to tokens (N, L, C)
            h = h + positions[:, None]
        if weights is not None:  # (N,)
            h = h * weights.reshape(-1, *[1] * (h.ndim - 1))
        return self.body(self.out(h))


def ask(cache, teacher, x, rows, **arguments):
    """The features of the body, by a teacher of its own as another process would have."""
    return cache.features(Teacher(teacher, ["body"], None), (x,), arguments, rows)["body"]


def ask_often(times, *arguments):
    for _ in range(times):
        ask(*arguments)


def tokens(count=4, length=5):
    return torch.randn(count, length, 6, generator=torch.Generator().manual_seed(count))

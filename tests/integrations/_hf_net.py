"""A model that keeps what it was given, and the Trainers that it is trained with."""

from collections import namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from _hf import arguments
from torch import Tensor, nn
from torch.utils.data import default_collate
from transformers import Trainer
from transformers.utils import ModelOutput
from vid_loss.integrations.hf import VIDTrainer

PAIR = {"body": "body"}
Entries = namedtuple("Entries", ["loss", "logits"])


@dataclass
class NetOutput(ModelOutput):
    loss: Tensor | None = None
    logits: Tensor | None = None


OUTPUTS = {
    "tuple": lambda loss, logits: (loss, logits),
    "named tuple": Entries,
    "dict": lambda loss, logits: {"loss": loss, "logits": logits},
    "ModelOutput": NetOutput,
    "object": lambda loss, logits: SimpleNamespace(loss=loss, logits=logits),
}


class Net(nn.Module):
    def __init__(self, width: int, output="dict"):
        super().__init__()
        torch.manual_seed(width)
        self.body, self.head = nn.Linear(4, width), nn.Linear(width, 3)
        self.output = OUTPUTS[output]
        self.seen = []

    def forward(self, x, labels=None):
        self.seen.append(x.detach().clone())
        logits = self.head(self.body(x).relu())
        loss = F.cross_entropy(logits, torch.zeros(len(x)).long() if labels is None else labels)
        return self.output(loss, logits)


def rows(count: int = 8) -> list[dict]:
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(0))
    return [{"x": row, "labels": i % 3} for i, row in enumerate(x)]


def plain(folder, student=None, cls=Trainer, data=None, **options):
    return train_with(folder, student, cls, data, {}, options)


def distil(folder, student=None, cls=VIDTrainer, data=None, **options):
    of_trainer = ("teacher_inputs", "head_learning_rate", "pairs")
    own = {"teacher": options.pop("teacher", None) or Net(7), "pairs": PAIR}
    own.update({name: options.pop(name) for name in of_trainer if name in options})
    return train_with(folder, student, cls, data, own, options)


def train_with(folder, student, cls, data, own, options):
    rest = {k: options.pop(k) for k in list(options) if k in ("compute_loss_func", "optimizers")}
    collate = options.pop("data_collator", default_collate)
    return cls(
        model=student or Net(5),
        args=arguments(folder, **{"optim": "sgd", "max_steps": 2, **options}),
        train_dataset=data or rows(),
        eval_dataset=data or rows(),
        data_collator=collate,
        **own,
        **rest,
    )

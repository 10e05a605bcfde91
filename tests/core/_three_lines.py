"""The three lines of a script that distills."""

import torch
import torch.nn.functional as F
from _models import cnn_pair, images
from torch.optim import SGD

from vid_loss import Distiller

PAIRS = {"stage1": "stage1", "stage2": "stage2"}
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])


class Script:
    """A student, its optimizer and a distiller; by default the three lines are all there."""

    def __init__(self, optimizer=SGD, pairs=PAIRS, add=True, seed=0, **options):
        self.student, teacher = cnn_pair()
        torch.manual_seed(seed)
        self.distiller = Distiller(self.student, teacher, pairs, example=images())
        self.optimizer = optimizer(self.student.parameters(), lr=0.01, **options)
        if add:
            self.optimizer.add_param_group({"params": self.distiller.parameters()})

    def steps(self, number, *others):
        for _ in range(number):
            output = self.student(images())
            loss = F.cross_entropy(output, LABELS) + self.distiller(images())
            for optimizer in (self.optimizer, *others):
                optimizer.zero_grad()
            loss.backward()
            for optimizer in (self.optimizer, *others):
                optimizer.step()

"""What is measured: a step of training, whole and in parts."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from functools import cached_property, partial

import timm
import torch
import torch.nn.functional as F
from paper.methods import matching_layers, pairs_of
from paper.models import build_model
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from vid_loss import DistillationModel, Distiller, Pair, VIDLoss

# student, teacher, resolution or length, batch
NETWORKS = {
    "wrn": ("wrn-16-1", "wrn-40-2", 32, 64),
    "resnet": ("resnet18", "resnet34", 224, 8),
}
TOKENS = {
    "vit": ("vit_tiny_patch16_224", "vit_small_patch16_224", 224, 8),
    "bert": ("4", "12", 128, 8),  # how many layers of BERT-base
}
SHARES = {"quarter": 1 / 4, "ninth": 1 / 9}
_BLOCKS = {
    "vit": {f"blocks.{i}": f"blocks.{i}" for i in (2, 5, 8, 11)},
    "bert": {f"bert.encoder.layer.{i}": f"bert.encoder.layer.{3 * i + 2}" for i in range(4)},
}


class HeadAlone(VIDLoss):
    """The same head with the plainest loss: what VIDLoss takes beyond it is its own."""

    def forward(
        self, student_feature: Tensor, teacher_feature: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Returns the mean squared difference, padding included."""
        return F.mse_loss(self.head(student_feature), teacher_feature)


def _build(network: str, name: str) -> nn.Module:
    if network == "vit":
        return timm.create_model(name, num_classes=10)
    if network == "bert":
        config = BertConfig(num_hidden_layers=int(name), num_labels=10)
        return BertForSequenceClassification(config)
    return build_model(name, 10)


def pairs(network: str, which: str) -> list[Pair]:
    """MI-I at all stages, with a part of the positions or the heads alone; at the last; MI-L."""
    if network in TOKENS:
        found = [Pair(*layers) for layers in _BLOCKS[network].items()]
    else:
        student, teacher, *_ = NETWORKS[network]
        layers = matching_layers(student, teacher)
        if which == "mi-l":
            return pairs_of("mi-l", layers)
        found = pairs_of("mi-i", layers)
    if which == "heads-alone":
        return [replace(pair, loss=HeadAlone) for pair in found]
    if which in SHARES:
        loss = partial(VIDLoss, positions=SHARES[which])
        return [replace(pair, loss=loss) for pair in found]
    return found[-1:] if which == "last-stage" else found


class Task:
    """A student, a teacher and a batch; each step starts from the gradients of none."""

    def __init__(
        self, network: str, chosen: list[Pair], *, batch=None, channels_last=False, **options
    ) -> None:
        student, teacher, size, usual_batch = {**NETWORKS, **TOKENS}[network]
        batch = batch or usual_batch
        torch.manual_seed(0)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.student = _build(network, student).to(device, memory_format=layout)
        self.teacher = _build(network, teacher).to(device, memory_format=layout).eval()
        self.mask: dict[str, Tensor] = {}
        if network == "bert":
            self.images = torch.randint(1000, (batch, size), device=device)
            lengths = torch.linspace(size / 4, size, batch, device=device)  # padded to the longest
            mask = torch.arange(size, device=device) < lengths.unsqueeze(1)
            self.mask["attention_mask"] = mask.long()
        else:
            images = torch.randn(batch, 3, size, size, device=device)
            self.images = images.contiguous(memory_format=layout)
        self.labels = torch.randint(10, (batch,), device=device)
        self.index = torch.arange(batch)
        self.distiller = Distiller(
            self.student,
            self.teacher,
            chosen,
            example={"input_ids": self.images, **self.mask} if self.mask else self.images,
            **options,
        )
        self.model = DistillationModel(self.student, self.distiller)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)

    @cached_property
    def compiled(self) -> nn.Module:
        return torch.compile(self.model, fullgraph=True)

    @cached_property
    def compiled_parts(self) -> tuple[nn.Module, nn.Module, torch.optim.Optimizer]:
        # Copies, which no tap looks into.
        student, teacher = deepcopy(self.student), deepcopy(self.teacher)
        for module in (*student.modules(), *teacher.modules()):
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        optimizer = torch.optim.SGD(student.parameters(), lr=1e-3, momentum=0.9)
        compiled = (torch.compile(part, fullgraph=True) for part in (student, teacher))
        return *compiled, optimizer

    def student_step(self) -> None:
        self._finish(self._task_loss(self.student(self.images, **self.mask)))

    @torch.no_grad()
    def teacher_forward(self) -> None:
        self.teacher(self.images, **self.mask)

    def floor(self) -> None:
        """The student's own step and the teacher's forward."""
        self.student_step()
        self.teacher_forward()

    def compiled_floor(self) -> None:
        student, teacher, optimizer = self.compiled_parts
        self._finish(self._task_loss(student(self.images, **self.mask)), optimizer)
        with torch.no_grad():
            teacher(self.images, **self.mask)

    def step(self, model: nn.Module | None = None) -> None:
        model = self.model if model is None else model
        output, transfer = model(self.images, sample_index=self.index, **self.mask)
        self._finish(self._task_loss(output) + transfer)

    def three_lines(self) -> None:
        """The plain loop of the README, in which the student comes first."""
        output = self.student(self.images, **self.mask)
        transfer = self.distiller(self.images, sample_index=self.index, **self.mask)
        self._finish(self._task_loss(output) + transfer)

    def compiled_step(self) -> None:
        self.step(self.compiled)

    def _task_loss(self, output: object) -> Tensor:
        return F.cross_entropy(getattr(output, "logits", output), self.labels)

    def _finish(self, loss: Tensor, optimizer: torch.optim.Optimizer | None = None) -> None:
        optimizer = optimizer or self.optimizer
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


class Heads:
    """The losses of one task alone, forward and backward, on features that are there already."""

    def __init__(self, task: Task) -> None:
        self.distiller = task.distiller
        task.model(task.images)
        self.teacher_features = task.distiller.teacher_features(task.images)
        task.student(task.images)
        self.student_features: Mapping[str, Tensor] = {
            layer: x.detach().requires_grad_() for layer, x in task.distiller._tap.collect().items()
        }

    def features(self, pair: Pair) -> tuple[Tensor, Tensor]:
        return self.student_features[pair.student], self.teacher_features[pair.teacher]

    def ours(self) -> None:
        terms = self.distiller.weighted(self.student_features, self.teacher_features, {})
        sum(terms.values()).backward()

"""What an adapter's step costs: over the engine's own step and the teacher's forward.

Each pair is of the two models' last features, so that the heads, which the plain loop has as well,
are next to nothing of it.
"""

import itertools
import logging

import pytest
import timm
import torch
from _tasks import TOKENS, Task, pairs
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from lightning.pytorch import LightningModule, Trainer
from timm.task import FeatureDistillationTask
from torch import nn
from torch.optim.lr_scheduler import ConstantLR
from torch.utils.data import DataLoader
from transformers import Trainer as HfTrainer
from transformers import TrainingArguments
from vid_loss.integrations.accelerate import train
from vid_loss.integrations.hf import VIDTrainer
from vid_loss.integrations.lightning import VIDCallback
from vid_loss.integrations.timm import VIDTask

# What the engines' own code warns of is not this benchmark's.
pytestmark = pytest.mark.filterwarnings("default")
STEPS = 8  # of one round


def bench_vidtrainer_over_trainer_and_teacher(compare, tmp_path):
    """Four layers of BERT-base learn from twelve; the first and the last step are part of it."""
    task = Task("bert", pairs("bert", "last-stage"))
    task.distiller.close()
    columns = {"input_ids": task.images, **task.mask, "labels": task.labels}
    rows = [{k: x[i] for k, x in columns.items()} for i in range(len(task.labels))] * STEPS
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=STEPS,
        per_device_train_batch_size=len(task.labels),
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_steps=STEPS,
        learning_rate=1e-5,
    )
    logging.getLogger("transformers").setLevel(logging.ERROR)
    plain = HfTrainer(task.student, arguments, train_dataset=rows)
    ours = VIDTrainer(
        task.student,
        arguments,
        train_dataset=rows,
        teacher=task.teacher,
        pairs=pairs("bert", "last-stage"),
    )

    def floor():
        plain.train()
        for _ in range(STEPS):
            task.teacher_forward()

    compare(ours.train, floor, rounds=8)


def bench_timm_task_over_timms_feature_task(compare):
    student, teacher, _, batch = TOKENS["vit"]

    def step(task):
        optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=1e-3)
        images, labels = torch.randn(batch, 3, 224, 224), torch.randint(10, (batch,))

        def run():
            optimizer.zero_grad()
            task(images, labels)["loss"].backward()
            optimizer.step()

        return run

    def models():
        return [timm.create_model(name, num_classes=10) for name in (student, teacher)]

    theirs = FeatureDistillationTask(*models(), criterion=nn.CrossEntropyLoss(), verbose=False)
    ours = VIDTask(*models(), pairs=pairs("vit", "last-stage"), verbose=False)
    compare(step(ours), step(theirs), rounds=40)


def bench_lightning_over_lightning_and_teacher(compare):
    task = Task("wrn", pairs("wrn", "mi-l"))
    task.distiller.close()

    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.student = task.student

        def training_step(self, batch, batch_idx):
            images, labels = batch
            return nn.functional.cross_entropy(self.student(images), labels)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)

    batches = DataLoader([(task.images, task.labels)] * STEPS, batch_size=None)

    def fit(*callbacks):
        Trainer(
            max_steps=STEPS,
            callbacks=[*callbacks],
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(Module(), batches)

    example = task.images[:1]  # both models run on it in each round, which has few steps

    def ours():
        fit(VIDCallback(task.teacher, pairs("wrn", "mi-l"), student="student", example=example))

    def floor():
        fit()
        for _ in range(STEPS):
            task.teacher_forward()

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    compare(ours, floor, rounds=8)


def bench_accelerate_over_accelerate_and_teacher(compare, tmp_path):
    """An epoch with its checkpoint; the validation is of one image."""
    task = Task("wrn", pairs("wrn", "mi-l"))
    in_order = DataLoaderConfiguration(use_seedable_sampler=True)
    accelerator = Accelerator(cpu=True, dataloader_config=in_order)
    folders = map(str, itertools.count())
    rows = list(zip(task.images, task.labels, strict=True)) * STEPS

    def loop(distiller):
        parameters = [*task.student.parameters(), *(distiller.parameters() if distiller else ())]
        optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)
        train(
            accelerator,
            task.student,
            distiller,
            optimizer=optimizer,
            schedule=ConstantLR(optimizer),
            train_loader=DataLoader(rows, len(task.labels)),
            validation_loader=DataLoader(rows[:1], 1),
            epochs=1,
            output=tmp_path / next(folders),
            show_progress=False,
        )

    def floor():
        loop(None)
        for _ in range(STEPS):
            task.teacher_forward()

    compare(lambda: loop(task.distiller), floor, rounds=8)

"""Two teachers as one, in the adapters; in loops: tests/core/test_offline.py."""

import torch
from _hf import PAIR, Wordy, arguments, bert, bert_teacher, logged, texts
from _models import TinyCNN, images
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader, TensorDataset
from vid_loss.integrations.accelerate import train
from vid_loss.integrations.hf import VIDTrainer

from vid_loss import Distiller, Pair
from vid_loss.teachers import Teachers


def test_in_vid_trainer(tmp_path):
    """One of them is called with other columns."""
    layer, taught = next(iter(PAIR.items()))
    teachers = Teachers(
        {"large": bert_teacher(), "wordy": Wordy()},
        inputs={"wordy": lambda input_ids, **_: (input_ids,)},
    )
    pairs = [Pair(layer, f"large.{taught}"), Pair(layer, "wordy.embed")]
    trainer = VIDTrainer(
        bert(),
        arguments(tmp_path, max_steps=2),
        train_dataset=texts(),
        teacher=teachers,
        pairs=pairs,
    )
    trainer.train()
    for pair in pairs:
        assert len(logged(trainer, f"transfer/{pair.label}")) == 2


def test_in_the_accelerate_loop(tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.manual_seed(0)
    student = TinyCNN(4)
    teachers = Teachers({"a": TinyCNN(8), "b": TinyCNN(6)})
    pairs = [Pair("stage2", "a.stage2"), Pair("stage2", "b.stage2")]
    distiller = Distiller(student, teachers, pairs, example=images())
    optimizer = torch.optim.SGD([*student.parameters(), *distiller.parameters()], lr=0.01)
    loader = DataLoader(TensorDataset(images(), torch.arange(8) % 3), batch_size=4)
    config = DataLoaderConfiguration(use_seedable_sampler=True)
    progress = train(
        Accelerator(cpu=True, dataloader_config=config),
        student,
        distiller,
        optimizer=optimizer,
        schedule=torch.optim.lr_scheduler.ConstantLR(optimizer),
        train_loader=loader,
        validation_loader=loader,
        epochs=1,
        output=tmp_path,
        show_progress=False,
    )
    assert len(progress.history) == 1
    assert list(distiller.terms) == ["stage2->a.stage2", "stage2->b.stage2"]

"""A script that uses timm's task API the way timm's train.py does, on random images.

The lines that the patch looks for are in it, so that it can be patched and run as that one is.
"""

import argparse

import timm
import torch
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.task import (
    ClassificationTask,
    LogitDistillationTask,
    load_task_ema_checkpoint,
    resume_task_checkpoint,
)
from timm.utils import CheckpointSaver
from torch import nn

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="test_resnet")
parser.add_argument("--kd-model-name")
parser.add_argument("--kd-distill-type", default="logit", choices=["logit"])
parser.add_argument("--distill-loss-weight", type=float)
parser.add_argument("--task-loss-weight", type=float)
parser.add_argument("--opt", default="sgd")
parser.add_argument("--lr", type=float, default=0.05)
parser.add_argument("--momentum", type=float, default=0.9)
parser.add_argument("--weight-decay", type=float, default=1e-4)
parser.add_argument("--layer-decay", type=float)
parser.add_argument("--opt-kwargs", type=dict, default={})
parser.add_argument("--img-size", type=int, default=32)
parser.add_argument("--epochs", type=int, default=1)
parser.add_argument("--resume", default="")
parser.add_argument("--output")


def _parse_args():
    return parser.parse_args()


def main():
    args = _parse_args()
    torch.manual_seed(0)
    model = timm.create_model(args.model, num_classes=3)
    train_loss_fn = nn.CrossEntropyLoss()

    # Setup training task (classification or distillation)
    if args.kd_model_name is not None:
        # Create distillation task (teacher created internally from model name)
        task = LogitDistillationTask(model, args.kd_model_name, criterion=train_loss_fn)
    else:
        task = ClassificationTask(model, criterion=train_loss_fn, verbose=False)

    model = task.get_trainable_module()
    eval_model = task.get_eval_model()
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args), **args.opt_kwargs)

    start_epoch = 0
    if args.resume:
        start_epoch = resume_task_checkpoint(task, args.resume, optimizer=optimizer)
    task.setup_ema(decay=0.9)
    if args.resume:
        load_task_ema_checkpoint(task, args.resume)
    saver = CheckpointSaver(model, optimizer, args=args, checkpoint_dir=args.output, task=task)

    for epoch in range(start_epoch, args.epochs):
        task.get_trainable_module().train()
        generator = torch.Generator().manual_seed(epoch)
        for _ in range(2):
            images = torch.randn(4, 3, args.img_size, args.img_size, generator=generator)
            loss = task(images, torch.tensor([0, 1, 2, 0]))["loss"]
            loss.backward()
            nn.utils.clip_grad_norm_(task.get_clip_parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            task.update_ema()
        for evaluated in (eval_model, task.get_eval_model(ema=True)):
            with torch.inference_mode():
                evaluated.eval()(images)
        saver.save_checkpoint(epoch, metric=-loss.item())


if __name__ == "__main__":
    main()

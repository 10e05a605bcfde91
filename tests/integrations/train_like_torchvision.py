"""A script in the order of torchvision's for classification, on random images.

The lines that the page's patch looks for are in it, as they stand there.
"""
# ruff: noqa: E501
# fmt: off

import os

import torch
import torchvision
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset


def mixup(image, target, classes, alpha):
    """Mixes each image with the one before it, and its label with that one's."""
    portion = float(torch._sample_dirichlet(torch.tensor([alpha, alpha]))[0])
    target = nn.functional.one_hot(target, classes).float()
    mixed = (x.roll(1, 0).mul_(1 - portion).add_(x, alpha=portion) for x in (image, target))
    return tuple(mixed)


def train_one_epoch(model, criterion, optimizer, data_loader, device, epoch, args, model_ema=None, scaler=None):
    model.train()
    torch.manual_seed(epoch)
    for image, target in data_loader:
        image, target = mixup(image.to(device), target.to(device), 5, args.mixup_alpha)
        with torch.cuda.amp.autocast(enabled=scaler is not None):
            output = model(image)
            loss = criterion(output, target)
        optimizer.zero_grad()
        if scaler is not None:
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad_norm)
            scaler.step(optimizer)
            scaler.update()
        else:
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad_norm)
            optimizer.step()
        model_ema.update_parameters(model)


def evaluate(model, criterion, data_loader, device):
    model.eval()
    with torch.inference_mode():
        return [criterion(model(image.to(device)), target).item() for image, target in data_loader]


def main(args):
    device = torch.device(args.device)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(16, 3, 8, 8, generator=generator)
    dataset = TensorDataset(images, torch.randint(5, (16,), generator=generator))
    sampler = DistributedSampler(dataset) if args.distributed else None
    data_loader = DataLoader(dataset, batch_size=4, sampler=sampler)

    model = torchvision.models.get_model(args.model, weights=None, num_classes=5)
    model.to(device)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=args.lr, momentum=0.9, weight_decay=args.weight_decay
    )
    scaler = torch.amp.GradScaler("cpu") if args.amp else None

    args.lr_scheduler = args.lr_scheduler.lower()
    main_lr_scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.epochs)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=1)
    lr_scheduler = torch.optim.lr_scheduler.SequentialLR(
        optimizer, schedulers=[warmup, main_lr_scheduler], milestones=[1]
    )

    model_without_ddp = model
    if args.distributed:
        model = torch.nn.parallel.DistributedDataParallel(model, device_ids=[args.gpu])
        model_without_ddp = model.module

    model_ema = AveragedModel(model_without_ddp, use_buffers=True)

    if args.resume:
        checkpoint = torch.load(args.resume, map_location="cpu", weights_only=True)
        model_without_ddp.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        lr_scheduler.load_state_dict(checkpoint["lr_scheduler"])
        args.start_epoch = checkpoint["epoch"] + 1
        model_ema.load_state_dict(checkpoint["model_ema"])
        if scaler:
            scaler.load_state_dict(checkpoint["scaler"])

    for epoch in range(args.start_epoch, args.stop_epoch):
        if args.distributed:
            sampler.set_epoch(epoch)
        train_one_epoch(model, criterion, optimizer, data_loader, device, epoch, args, model_ema, scaler)
        lr_scheduler.step()
        evaluate(model, criterion, data_loader, device)
        evaluate(model_ema, criterion, data_loader, device)
        if args.output_dir:
            checkpoint = {
                "model": model_without_ddp.state_dict(),
                "optimizer": optimizer.state_dict(),
                "lr_scheduler": lr_scheduler.state_dict(),
                "model_ema": model_ema.state_dict(),
                "epoch": epoch,
            }
            if scaler:
                checkpoint["scaler"] = scaler.state_dict()
            torch.save(checkpoint, os.path.join(args.output_dir, "checkpoint.pth"))
    return checkpoint

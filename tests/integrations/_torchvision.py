"""A script in torchvision's order with the patch of its page."""

from pathlib import Path
from types import SimpleNamespace

import torch
from _pages import ROOT, blocks
from torch import nn


def page_patch(script):
    """Applies the patch of torchvision's page, each hunk where its lines first are."""
    (block,) = blocks(ROOT / "integrations" / "torchvision" / "README.md", "patch")
    after = 0
    for hunk in block.code.split("@@\n"):
        lines = hunk.splitlines(keepends=True)
        old, new = ("".join(x[1:] for x in lines if x[0] in kinds) for kinds in (" -", " +"))
        place = script.find(old, after)
        assert place >= 0, f"the script has no {old}"
        script = script[:place] + new + script[place + len(old) :]
        after = place + len(new)
    return script


class Net(nn.Module):
    """Has the layers that torchvision's page pairs."""

    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1)
        self.layer3 = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width))
        self.layer4 = nn.Sequential(nn.ReLU(), nn.Conv2d(width, width, 3, 2, padding=1))
        self.fc = nn.Linear(width, 5)

    def forward(self, x):
        return self.fc(self.layer4(self.layer3(self.conv1(x))).mean((2, 3)))


def patched_torchvision(folder, *, patched=True, resume=False, distributed=False, **options):
    """Runs a script in torchvision's order with the page's patch; returns its last checkpoint."""
    path = Path(__file__).with_name("train_like_torchvision.py")
    script = page_patch(path.read_text()) if patched else path.read_text()
    for on_gpu, on_cpu in (
        ("device_ids=[args.gpu]", "device_ids=None"),
        ("torch.cuda.amp.autocast(", "torch.autocast('cpu', torch.bfloat16, "),
        ("torchvision.models.get_model", "get_model"),  # whose weights are not here
    ):
        assert on_gpu in script
        script = script.replace(on_gpu, on_cpu)

    def get_model(name, weights=None, **_):
        torch.manual_seed(5 if weights else 0)
        return Net(8 if weights else 4)

    folder.mkdir(exist_ok=True, parents=True)
    args = {"lr_scheduler": "CosineAnnealingLR", "epochs": 4, "start_epoch": 0, "amp": False}
    args |= {"mixup_alpha": 0.2, "lr": 0.1, "weight_decay": 1e-2, "clip_grad_norm": 1.0}
    args |= {"model": "small", "device": "cpu", "gpu": None, "output_dir": str(folder)}
    args |= {"resume": folder / "checkpoint.pth" if resume else "", "distributed": distributed}
    names = {"get_model": get_model, "__name__": "train"}
    exec(compile(script, str(path), "exec"), names)
    return names["main"](SimpleNamespace(**{**args, **options}))


def torchvision_page(rank, folder, *, resume=False, steps=(0, 6)):
    """torchvision's own order, with its page's patch."""
    end = {3: 1, 6: 3}[steps[1]]  # epochs, of two steps each
    checkpoint = patched_torchvision(
        folder / str(rank), stop_epoch=end, resume=resume, distributed=True
    )
    return {
        **{f"student.{k}": v for k, v in checkpoint["model"].items()},
        **{f"heads.{k}": v for k, v in checkpoint["distiller"].items()},
    }

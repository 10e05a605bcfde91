"""A large network teaches a small one to read digits, with and without distillation.

    python examples/quickstart.py
    python examples/quickstart.py --methods student kd fitnet at vid kd+vid

scikit-learn's digits come with the package, so nothing is downloaded. A teacher learns from all
of the training images, a much smaller student from a few of each class. Lines that end in `# +`
are all that distillation adds to an ordinary training loop.
"""

import argparse
from collections.abc import Callable
from statistics import mean, stdev

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset
from tqdm import tqdm

from vid_loss import ATLoss, Distiller, FitNetLoss, KDLoss, Pair
from vid_loss.subsets import images_per_class

STAGES = ("stage1", "stage2")
VID = [Pair(stage, stage) for stage in STAGES]
KD = [Pair("classifier", "classifier", loss=KDLoss(temperature=4))]
METHODS: dict[str, list[Pair]] = {
    "student": [],
    "vid": VID,
    "kd": KD,
    "fitnet": [Pair("stage2", "stage2", loss=FitNetLoss)],
    "at": [Pair(stage, stage, loss=ATLoss()) for stage in STAGES],
    "kd+vid": KD + VID,
}


class DigitNet(nn.Module):
    """Two convolutional stages and a classifier.

    Args:
        width: channels of the first stage; the second has twice as many.
        depth: convolutions in each stage.
    """

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.stage1 = _stage(1, width, depth)
        self.stage2 = nn.Sequential(nn.MaxPool2d(2), *_stage(width, 2 * width, depth))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(2 * width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Maps images (N, 1, 8, 8) to logits (N, 10)."""
        features = self.stage2(self.stage1(images))
        return self.classifier(self.pool(features).flatten(1))


def _stage(in_channels: int, channels: int, depth: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index in range(depth):
        source = channels if index else in_channels
        layers += [
            nn.Conv2d(source, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers)


def load() -> tuple[TensorDataset, TensorDataset, TensorDataset]:
    """Returns training, validation and test digits, always the same ones."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(digits.target)
    rest, test = train_test_split(
        range(len(labels)), test_size=500, stratify=labels, random_state=0
    )
    train, val = train_test_split(rest, test_size=300, stratify=labels[rest], random_state=0)
    return tuple(TensorDataset(images[part], labels[part]) for part in (train, val, test))


@torch.no_grad()
def accuracy(model: nn.Module, dataset: TensorDataset, device: torch.device) -> float:
    """Returns the accuracy on a data set in percent."""
    images, labels = (tensor.to(device) for tensor in dataset.tensors)
    return 100 * (model.eval()(images).argmax(1) == labels).float().mean().item()


def train(
    model: nn.Module,
    dataset: TensorDataset | Subset,
    steps: int,
    device: torch.device,
    *,
    teacher: nn.Module | None = None,
    pairs: list[Pair] = (),
    after_epoch: Callable[[], None] = lambda: None,
) -> None:
    """An ordinary training loop; with pairs, it distils."""
    loader = DataLoader(dataset, batch_size=min(64, len(dataset)), shuffle=True, drop_last=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    if pairs:
        example = next(iter(loader))[0].to(device)
        distiller = Distiller(model, teacher, pairs, example=example)  # +
        optimizer.add_param_group({"params": distiller.parameters()})  # +
    epochs = -(-steps // len(loader))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 3e-3, total_steps=epochs * len(loader)
    )
    for _ in range(epochs):
        model.train()
        for images, labels in loader:
            images, labels = shift(images.to(device)), labels.to(device)
            loss = F.cross_entropy(model(images), labels)
            if pairs:
                loss = loss + distiller(images)  # +
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        after_epoch()


def shift(images: Tensor) -> Tensor:
    """Moves a batch by up to one pixel each way."""
    padded = F.pad(images, (1, 1, 1, 1), value=-1.0)
    top, left = torch.randint(0, 3, (2,)).tolist()
    return padded[..., top : top + 8, left : left + 8]


def main() -> None:
    """Trains the teacher once and a student for every method and seed; prints and draws."""
    args = parse_arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train_set, val_set, test_set = load()
    torch.manual_seed(0)
    teacher = DigitNet(width=32, depth=3).to(device)
    train(teacher, train_set, 600, device)
    print(f"teacher: {accuracy(teacher, test_set, device):.1f} % of the test set")

    runs = [(method, seed) for method in args.methods for seed in range(args.seeds)]
    curves: dict[str, list[list[float]]] = {method: [] for method in args.methods}
    results: dict[str, list[float]] = {method: [] for method in args.methods}
    for method, seed in tqdm(runs, desc="students"):
        few = Subset(
            train_set, images_per_class(train_set.tensors[1], args.images_per_class, seed=seed)
        )
        torch.manual_seed(seed)
        student = DigitNet(width=args.width, depth=1).to(device)
        curve: list[float] = []
        train(
            student,
            few,
            args.steps,
            device,
            teacher=teacher,
            pairs=METHODS[method],
            after_epoch=lambda: curve.append(accuracy(student, val_set, device)),
        )
        curves[method].append(curve)
        results[method].append(accuracy(student, val_set if args.val else test_set, device))
    print(table(results))


def table(results):
    return "\n".join(
        f"{m:10} {mean(v):6.2f} +- {stdev(v):.2f}   {[round(x, 1) for x in v]}"
        for m, v in results.items()
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["student", "vid"])
    parser.add_argument("--images-per-class", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--weight", type=float)
    parser.add_argument("--init_var", type=float)
    parser.add_argument("--val", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()

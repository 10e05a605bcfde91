"""A large network teaches a small one to read digits, with and without distillation.

    python examples/quickstart.py
    python examples/quickstart.py --methods student kd fitnet at vid kd+vid

scikit-learn's digits come with the package, so nothing is downloaded. A teacher learns from all
training images, a much smaller student from a few of each class. The lines that end in `# +` are
all that distillation adds to an ordinary training loop.
"""

import argparse
import math
from pathlib import Path
from statistics import mean, stdev

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset
from tqdm import tqdm

from vid_loss import ATLoss, Distiller, FitNetLoss, KDLoss, Pair
from vid_loss.subsets import images_per_class

# Layers, weights and settings were chosen on the validation images; the test images are looked
# at once, by the finished students.
VID = [Pair("stage2", "stage2"), Pair("classifier:input", "classifier")]
KD = [Pair("classifier", "classifier", loss=KDLoss(temperature=4))]
METHODS: dict[str, list[Pair]] = {
    "student": [],
    "kd": KD,
    "fitnet": [Pair("stage2", "stage2", loss=FitNetLoss)],
    "at": [Pair("stage2", "stage2", loss=ATLoss())],
    "vid": VID,
    "kd+vid": KD + VID,
}
LEARNING_RATE = 3e-3
CURVE_POINTS = 20


class DigitNet(nn.Module):
    """Two convolutional stages and a classifier.

    Args:
        width: channels of the first stage; the second has twice as many.
        depth: convolutions in each stage.
    """

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.stage1 = nn.Sequential(*_convolutions(1, width, depth))
        self.stage2 = nn.Sequential(nn.MaxPool2d(2), *_convolutions(width, 2 * width, depth))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(2 * width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Maps images (N, 1, 8, 8) to logits (N, 10)."""
        return self.classifier(self.pool(self.stage2(self.stage1(images))).flatten(1))


def _convolutions(in_channels: int, channels: int, depth: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for index in range(depth):
        source = channels if index else in_channels
        layers += [
            nn.Conv2d(source, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        ]
    return layers


def load() -> tuple[TensorDataset, TensorDataset, TensorDataset]:
    """Returns training, validation and test digits, the same ones always."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(digits.target)
    rest, test = train_test_split(
        range(len(labels)), test_size=500, stratify=labels, random_state=0
    )
    train, val = train_test_split(rest, test_size=300, stratify=labels[rest], random_state=0)
    train_set, val_set, test_set = (
        TensorDataset(images[part], labels[part]) for part in (train, val, test)
    )
    return train_set, val_set, test_set


def augment(images: Tensor) -> Tensor:
    """Turns, scales and shifts each image a little."""
    angle = math.radians(15) * torch.empty(len(images)).uniform_(-1, 1)
    scale = torch.empty(len(images)).uniform_(0.85, 1.15)
    shift = torch.empty(len(images), 2, 1).uniform_(-0.25, 0.25)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    rotation = torch.stack([cos, -sin, sin, cos], dim=1).view(-1, 2, 2)
    theta = torch.cat([rotation, shift], dim=2).to(images.device)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1  # -1 is black


@torch.no_grad()
def accuracy(model: nn.Module, dataset: TensorDataset, device: torch.device) -> float:
    """Returns the accuracy on a data set in percent."""
    images, labels = (tensor.to(device) for tensor in dataset.tensors)
    correct = model.eval()(images).argmax(1) == labels
    return 100 * correct.float().mean().item()


def train(
    model: nn.Module,
    dataset: TensorDataset | Subset,
    val_set: TensorDataset,
    epochs: int,
    device: torch.device,
    teacher: nn.Module | None = None,
    pairs: list[Pair] | None = None,
) -> list[float]:
    """An ordinary training loop, which distils if there is a teacher.

    Returns:
        The accuracy on the validation images after each twentieth of the epochs.
    """
    batch_size = min(50, len(dataset))
    loader = DataLoader(dataset, batch_size=batch_size, shuffle=True, drop_last=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    if teacher is not None and pairs:
        example, _ = next(iter(loader))
        distiller = Distiller(model, teacher, pairs, example=example.to(device))  # +
        distiller.add_to(optimizer)  # +
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    curve = []
    for epoch in range(1, epochs + 1):
        model.train()
        for images, labels in loader:
            images, labels = augment(images.to(device)), labels.to(device)
            loss = F.cross_entropy(model(images), labels)
            if pairs:
                loss = loss + distiller(images)  # +
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        if epoch % max(epochs // CURVE_POINTS, 1) == 0:
            curve.append(accuracy(model, val_set, device))
    return curve


def draw(curves: dict[str, list[list[float]]], images_per_class: int, path: Path) -> None:
    """Draws each method's mean validation accuracy and its range over the seeds."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for method, runs in curves.items():
        points = list(zip(*runs, strict=True))
        done = [100 * (index + 1) / len(points) for index in range(len(points))]
        (line,) = axes.plot(done, [mean(point) for point in points], label=method)
        low, high = [min(point) for point in points], [max(point) for point in points]
        axes.fill_between(done, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set_xlabel("training done (%)")
    axes.set_ylabel("validation accuracy (%)")
    axes.set_title(f"Students on {images_per_class} digits per class: mean and range over seeds")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=150)


def main() -> None:
    """Trains the teacher once and a student for every method and seed; prints and draws."""
    args = parse_arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train_set, val_set, test_set = load()
    torch.manual_seed(0)
    teacher = DigitNet(width=32, depth=2).to(device)
    train(teacher, train_set, val_set, args.teacher_epochs, device)

    curves: dict[str, list[list[float]]] = {method: [] for method in args.methods}
    finished: dict[str, list[nn.Module]] = {method: [] for method in args.methods}
    runs = [(method, seed) for method in args.methods for seed in range(args.seeds)]
    for method, seed in tqdm(runs, desc="students", unit="run"):
        few = images_per_class(train_set.tensors[1], args.images_per_class, seed=seed)
        torch.manual_seed(seed)
        student = DigitNet(width=12, depth=2).to(device)
        few_set = Subset(train_set, few)
        curve = train(student, few_set, val_set, args.epochs, device, teacher, METHODS[method])
        curves[method].append(curve)
        finished[method].append(student)

    print(
        f"\n{args.images_per_class} images per class, {args.seeds} seeds, test accuracy in percent"
    )
    print(f"{'teacher':10}{accuracy(teacher, test_set, device):6.1f}   (all training images)")
    for method, students in finished.items():
        results = [accuracy(student, test_set, device) for student in students]
        spread = stdev(results) if len(results) > 1 else 0.0
        print(f"{method:10}{mean(results):6.1f} +- {spread:.1f}")
    draw(curves, args.images_per_class, args.output)
    print(f"learning curves: {args.output}")


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["student", "vid"])
    parser.add_argument("--images-per-class", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=600, help="of each student")
    parser.add_argument("--teacher-epochs", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("quickstart.png"))
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""Looks inside a distillation: how much was transferred, by which layer, and where.

    python examples/inspect_transfer.py

Prints the layers, the pairs that were chosen with their reasons and the gradient's shares, and
draws `curves.png`, `variances.png` and `log_likelihood.png`, all from a saved run: the weights of
teacher, student and heads, and the history of the diagnostics. If the file `--run` is not there
yet, the student of quickstart.py is trained on scikit-learn's digits first, for about a minute.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from quickstart import DigitNet, augment, load
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from vid_loss import Distiller, gradient_shares, list_layers, match_layers
from vid_loss.diagnostics import PairDiagnostics, log_likelihood
from vid_loss.plots import plot_diagnostics, plot_log_likelihood, plot_variances

BATCH_SIZE = 50
EVERY = 20  # steps between two points of a curve
SHOWN = 6  # digits in the heat map

History = dict[int, dict[str, PairDiagnostics]]


def enlarged(dataset: TensorDataset) -> TensorDataset:
    """Digits of 16 x 16, so that a heat map has something to show."""
    images, labels = dataset.tensors
    return TensorDataset(F.interpolate(images, size=16, mode="bilinear"), labels)


def fit(
    model: nn.Module, dataset: TensorDataset, epochs: int, distiller: Distiller | None = None
) -> History:
    """Trains, with the transfer terms if there is a distiller, and returns its diagnostics."""
    heads = [] if distiller is None else list(distiller.parameters())
    optimizer = torch.optim.Adam([*model.parameters(), *heads], lr=3e-3)
    loader = DataLoader(dataset, BATCH_SIZE, shuffle=True, drop_last=True)
    history: History = {}
    step = 0
    for _ in tqdm(range(epochs), desc="student" if distiller else "teacher", unit="epoch"):
        model.train()
        for images, labels in loader:
            images = augment(images)
            loss = F.cross_entropy(model(images), labels)
            if distiller is not None:
                loss = loss + distiller(images)
                if step % EVERY == 0:
                    history[step] = distiller.diagnostics()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    return history


def print_shares(distiller: Distiller, images: Tensor, labels: Tensor) -> None:
    """Prints which loss the student's gradient comes from."""
    student = distiller.student.train()
    task = F.cross_entropy(student(images), labels)
    shares = gradient_shares({"task": task, **distiller.weighted_terms(images)}, student)
    print("\nparts in the student's gradient, in percent")
    for name, share in shares.items():
        print(f"{name:24}{100 * share:6.1f}")


def main() -> None:
    """Trains or loads a run, and shows what is in it."""
    args = parse_arguments()
    train_set, _, test_set = (enlarged(part) for part in load())
    images, labels = test_set[:BATCH_SIZE]
    torch.manual_seed(0)
    teacher, student = DigitNet(width=32, depth=2), DigitNet(width=8, depth=1)
    pairs = match_layers(student, teacher, images[:1])
    print(list_layers(student, images[:1]), pairs, sep="\n\n")
    distiller = Distiller(student, teacher, pairs, example=images[:1])
    models = {"teacher": teacher, "student": student, "distiller": distiller}

    if not args.run.exists():
        fit(teacher, train_set, args.teacher_epochs)
        history = fit(student, train_set, args.epochs, distiller)
        states = {name: model.state_dict() for name, model in models.items()}
        torch.save({"states": states, "history": history}, args.run)
    torch.serialization.add_safe_globals([PairDiagnostics])
    run = torch.load(args.run, weights_only=True)
    for name, model in models.items():
        model.load_state_dict(run["states"][name])

    print_shares(distiller, images, labels)
    args.output.mkdir(parents=True, exist_ok=True)
    figures = {
        "curves": plot_diagnostics(run["history"]),
        "variances": plot_variances(distiller),
        "log_likelihood": plot_log_likelihood(
            images[:SHOWN], log_likelihood(distiller, images[:SHOWN])
        ),
    }
    for name, figure in figures.items():
        path = args.output / f"{name}.png"
        figure.savefig(path, dpi=120)
        print(path)


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("transfer.pt"), help="the saved run")
    parser.add_argument("--output", type=Path, default=Path(), help="folder of the pictures")
    parser.add_argument("--teacher-epochs", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=12)
    return parser.parse_args()


if __name__ == "__main__":
    main()

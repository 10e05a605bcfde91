"""How much of a method's gain is in its student's features, and how much in the classifier.

    cd examples
    python -m paper.tables.probe --data FOLDER

Students of Table 1a's small form with 10 images per class, each method with the choice that is in
`results/running-variance`, other seeds. Of each student's last feature, a logistic regression is
trained on the images that the student had, and one on 20,000 others, whose labels no method has.
All accuracies are of validation images. A line per student; one whose line is there is not trained
again.
"""

import argparse
import json
from pathlib import Path

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.utils.data import DataLoader

from paper.datasets.small_image_loaders import Batches
from paper.datasets.small_images import Images, SmallImages, read_small_images
from paper.lines import read_lines
from paper.models import build_model
from paper.program import start_accelerator
from paper.training import train_student
from paper.weights import read_weights

from .cells import Cell, Run, models_of
from .plans import plan_of
from .runner import Runner

_RESULTS = Path(__file__).parents[1] / "results"
_MANY = 20_000
_METHODS = ("student", "kd", "fitnet", "at", "mi", "kd+mi")


def main() -> None:
    """Trains the students that are missing, and reads their features."""
    options = _parse()
    accelerator = start_accelerator()
    runner = Runner(accelerator, options.data, options.work)
    data, plan = read_small_images("fashion-mnist", options.data), plan_of("1a", "small")
    for model in models_of(plan):
        runner.execute(model.tests(model.choices[0])[0])
    choices = {
        line["method"]: line["choice"]
        for line in read_lines(_RESULTS / "running-variance" / "1a-fashion-mnist.jsonl")
        if line["stage"] == "test" and not line["pretrained"]
    }
    done = read_lines(options.output) if options.output.exists() else []
    for seed in options.seeds:
        for method in _METHODS:
            if any((line["method"], line["seed"]) == (method, seed) for line in done):
                continue
            run = Run(Cell(plan, method, 10), "search", seed, choices[method])
            line = {"method": method, "seed": seed, "choice": choices[method]}
            line |= {**_probe(runner, run, data), **runner.origin}
            with options.output.open("a") as file:
                file.write(json.dumps(line) + "\n")


def _probe(runner: Runner, run: Run, data: SmallImages) -> dict[str, float]:
    settings = runner.settings(run)
    loaders, folder = runner.loaders(run.cell, settings), runner.output / "probes" / run.name
    train_student(runner.accelerator, settings, loaders, folder, show_progress=False)
    runner.accelerator.free_memory()
    student = build_model(settings.student, loaders.classes)
    student.load_state_dict(read_weights(folder / "best.safetensors"))

    def read(images: Images) -> tuple[Tensor, Tensor, Tensor]:
        batches = Batches(images, data, augmented=False, device=runner.accelerator.device)
        return _features(student.to(runner.accelerator.device), batches)

    had, held_out = (
        Images(x.pixels.cpu(), x.labels.cpu())
        for x in (loaders.train.dataset, loaders.validation.dataset)
    )
    many, few, validation = read(_others(data.train, held_out)), read(had), read(held_out)
    mean, std = many[0].mean(0), many[0].std(0).clamp(min=1e-6)

    def fitted_to(part: tuple[Tensor, Tensor, Tensor]) -> float:
        probe = LogisticRegression(max_iter=2000)
        probe.fit(((part[0] - mean) / std).numpy(), part[1].numpy())
        return 100 * probe.score(((validation[0] - mean) / std).numpy(), validation[1].numpy())

    own = (validation[2].argmax(1) == validation[1]).float().mean().item()
    return {"own": 100 * own, "few_labels": fitted_to(few), "many_labels": fitted_to(many)}


def _others(train: Images, held_out: Images) -> Images:
    """Returns images that are not held out; some of them the student may have had."""
    held = {pixels.numpy().tobytes() for pixels in held_out.pixels}
    drawn = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(1))
    kept = [i for i in drawn.tolist() if train.pixels[i].numpy().tobytes() not in held][:_MANY]
    return Images(train.pixels[kept], train.labels[kept])


@torch.no_grad()
def _features(student: nn.Module, images: Batches) -> tuple[Tensor, Tensor, Tensor]:
    """Returns what the classifier is given, the labels and the logits."""
    seen: list[Tensor] = []
    hook = student.fc.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    loader = DataLoader(images, batch_size=500, collate_fn=lambda batch: batch)
    parts = [(labels, student.eval()(pixels)) for pixels, labels in loader]
    hook.remove()
    labels, logits = (torch.cat(x).cpu() for x in zip(*parts, strict=True))
    return torch.cat(seen).cpu(), labels, logits


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, default=Path("data"), help="folder of Fashion-MNIST (%(default)s)")
    add("--seeds", type=int, nargs="+", default=[100, 101, 102, 103, 104])
    add("--output", type=Path, default=_RESULTS / "probe.jsonl", help="lines (%(default)s)")
    add("--work", type=Path, default=Path("runs/tables"), help="the teacher's folder (%(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""What a table would cost: every run that it has, and the hours that they may take."""

from paper.methods import WITHOUT_TEACHER
from paper.small_images import FORMATS

from .cells import Cell, Plan, items_of

# Of the photographs: classes, images a class for training if all are taken, on average.
_PHOTOGRAPHS = {"mit67": (67, 80), "cub200": (200, 30)}


def dry_run(plan: Plan) -> str:
    """Returns a line a run, and the sum of the hours."""
    lines, total = [], 0.0
    for item in (item for items in items_of(plan) for item in items):
        hours = _seconds(item.work) / 3600
        runs = item.search() or []
        for run in runs:
            text = ", ".join(f"{name} {value}" for name, value in run.items())
            lines.append(f"{item.name}: {text}: {hours:.3f} h")
        choice = "of the best, " if runs else ""
        for seed in item.test_seeds:
            lines.append(f"{item.name}: test, {choice}seed {seed}: {hours:.3f} h")
        total += hours * (len(runs) + len(item.test_seeds))
    lines.append(
        f"{len(lines)} runs, {total:.1f} hours of one device in all. An estimate: "
        f"{_milliseconds(plan)} ({plan.estimate})."
    )
    return "\n".join(lines)


def _milliseconds(plan: Plan) -> str:
    alone, taught = (1000 * seconds for seconds in plan.step_seconds)
    return f"{alone:g} ms a step of a student alone, {taught:g} ms with its teacher"


def _seconds(cell: Cell) -> float:
    plan = cell.plan
    alone, taught = plan.step_seconds
    if cell.pretrained == plan.teacher:  # forward and backward, where teaching has the forward only
        step = alone + 3 * (taught - alone)
    else:
        step = alone if cell.method in WITHOUT_TEACHER else taught
    recipe = plan.teacher_recipe if cell.pretrained else plan.recipe
    dataset = plan.teacher_dataset if cell.pretrained else plan.dataset
    return step * recipe["epochs"] * _steps(cell, dataset, recipe)


def _steps(cell: Cell, dataset: str, recipe: dict[str, int]) -> int:
    if recipe.get("steps_per_epoch"):
        return recipe["steps_per_epoch"]
    if dataset in _PHOTOGRAPHS:
        classes, all_images = _PHOTOGRAPHS[dataset]
        images = round(0.8 * classes * (cell.n or all_images))
    else:
        images = FORMATS[dataset].training_images
    return -(-images // recipe["batch_size"])

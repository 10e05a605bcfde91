"""What a table would cost: every run that it has, and the hours that they may take."""

from paper.datasets.small_images import FORMATS
from paper.methods import WITHOUT_TEACHER

from .cells import Cell, cells_of, models_of
from .plans import Plan

# Of the photographs: classes, images per class for training if all are taken, on average.
_PHOTOGRAPHS = {"mit67": (67, 80), "cub200": (200, 30)}


def dry_run(plan: Plan) -> str:
    """Returns a line for each run, and the sum of the hours."""
    lines, total = [], 0.0
    for cell in (*models_of(plan), *cells_of(plan)):
        hours = _seconds(cell) / 3600
        searches, tests = cell.searches(), cell.tests({})
        best = ", of the best" if searches else ""
        names = [run.name for run in searches] + [f"{run.name}{best}" for run in tests]
        lines += [f"{name}: {hours:.3f} h" for name in names]
        total += hours * len(names)
    lines.append(
        f"{len(lines)} runs, {total:.1f} hours of one device in all. An estimate: "
        f"{_milliseconds(plan)} ({plan.estimate})."
    )
    return "\n".join(lines)


def _milliseconds(plan: Plan) -> str:
    alone, taught = (1000 * seconds for seconds in plan.step_seconds)
    return f"{alone:g} ms per step of a student alone, {taught:g} ms with its teacher"


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

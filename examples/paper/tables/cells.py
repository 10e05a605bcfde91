"""A cell of a table: the runs that choose its hyper-parameters, and those that test the choice."""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import mean
from typing import Any, Literal

from .grids import GRIDS, Choice
from .plans import Plan

Record = Mapping[str, Any]  # what is remembered of a finished run


@dataclass(frozen=True)
class Run:
    """One training.

    Args:
        cell: that it is for.
        stage: whether it chooses hyper-parameters or tests the choice.
        seed: of the images drawn, of the student's weights and of the batches.
        choice: the hyper-parameters.
    """

    cell: "Cell"
    stage: Literal["search", "test"]
    seed: int
    choice: Choice

    @property
    def name(self) -> str:
        """Of its folder, its lock and its record: one that no other run of a folder has."""
        choice = [f"{name}={value:g}" for name, value in self.choice.items()]
        return "-".join([self.cell.name, self.stage, *choice, f"seed={self.seed}"])


@dataclass(frozen=True)
class Cell:
    """A method in a regime: its hyper-parameters are chosen on validation data, then tested.

    Args:
        plan: the table.
        method: the row.
        n: the column; a model that is trained beforehand has none.
        pretrained: the name of that model.
    """

    plan: Plan
    method: str
    n: int | None
    pretrained: str | None = None

    @property
    def name(self) -> str:
        """Of a cell within a folder, of a model that is trained beforehand within all tables."""
        if self.pretrained is None:
            return f"{self.plan.table}-{self.plan.dataset}-{self.method}-{self.n or 'all'}"
        recipe = [f"{value}" for value in self.plan.teacher_recipe.values()]
        return "-".join(["pretrained", str(self.plan.teacher_dataset), self.pretrained, *recipe])

    @property
    def choices(self) -> tuple[Choice, ...]:
        """The grid; where there is one choice, nothing is searched."""
        return self.plan.grids.get(self.method, GRIDS[self.method])

    def searches(self) -> list[Run]:
        """Returns the runs that choose: every choice with every seed for this."""
        if len(self.choices) == 1:
            return []
        seeds = self.plan.search_seeds
        return [Run(self, "search", seed, choice) for choice in self.choices for seed in seeds]

    def tests(self, choice: Choice) -> list[Run]:
        """Returns the runs that test a choice, with seeds of their own."""
        seeds = self.plan.test_seeds if self.pretrained is None else (0,)
        return [Run(self, "test", seed, choice) for seed in seeds]

    def chosen(self, finished: Mapping[str, Record]) -> Choice | None:
        """Returns the choice of the best mean validation accuracy, the grid's first of equal ones.

        Args:
            finished: the records of finished runs by these runs' names.

        Returns:
            None before every run that chooses is finished.
        """
        if len(self.choices) == 1:
            return self.choices[0]
        accuracies: list[tuple[Choice, list[float]]] = [(choice, []) for choice in self.choices]
        for run in self.searches():
            if run.name not in finished:
                return None
            of_choice = accuracies[self.choices.index(run.choice)][1]
            of_choice.append(finished[run.name]["validation"])
        return max(accuracies, key=lambda of_choice: mean(of_choice[1]))[0]

    def wanted(self, finished: Mapping[str, Record]) -> list[Run]:
        """Returns the runs that choose and, once the choice is known, those that test it."""
        choice = self.chosen(finished)
        return self.searches() + ([] if choice is None else self.tests(choice))


def models_of(plan: Plan) -> list[Cell]:
    """Returns what is trained before a table: its teacher, and a student that is finetuned."""
    if plan.teacher_dataset is None:
        return []
    names = [plan.teacher] + [plan.student] * ("finetuned" in plan.methods)
    return [Cell(plan, "student", None, pretrained=name) for name in names]


def cells_of(plan: Plan) -> list[Cell]:
    """Returns the cells of a table."""
    return [Cell(plan, method, n) for n in plan.regimes for method in plan.methods]

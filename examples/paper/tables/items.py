"""A cell of a table: the runs that choose its hyper-parameters, and those that test the choice."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

Run = Mapping[str, Any]  # stage, seed, and the hyper-parameters


@dataclass(frozen=True)
class Item:
    """A cell: hyper-parameters are chosen on validation data, then tested with other seeds.

    Args:
        name: of the study.
        choices: the grid; without an alternative, nothing is searched.
        search_seeds: each choice is run with these, and the best mean validation accuracy wins.
        test_seeds: of the runs of the winner, which alone see the test data.
        work: what a run needs to know besides.
    """

    name: str
    choices: tuple[Mapping[str, float], ...]
    search_seeds: tuple[int, ...]
    test_seeds: tuple[int, ...]
    work: Any = None

    def search(self) -> list[Run]:
        """Returns the runs that choose."""
        if len(self.choices) == 1:
            return []
        return [
            {"stage": "search", "seed": seed, **choice}
            for choice in self.choices
            for seed in self.search_seeds
        ]

    def tests(self, choice: Mapping[str, float]) -> list[Run]:
        """Returns the runs that test a choice."""
        return [{"stage": "test", "seed": seed, **choice} for seed in self.test_seeds]

    def possible(self) -> list[Run]:
        """Returns every run that there may be."""
        return self.search() + [run for choice in self.choices for run in self.tests(choice)]

    def wanted(self, trials: Sequence[FrozenTrial]) -> list[Run]:
        """Returns the runs that choose and, once it is known, those that test the choice."""
        choice = self.chosen(trials)
        return self.search() + ([] if choice is None else self.tests(choice))

    def chosen(self, trials: Sequence[FrozenTrial]) -> Mapping[str, float] | None:
        """Returns the choice, or None before every run that chooses is complete."""
        accuracies = {key_of(run_of(t)): t.value for t in trials if t.state == TrialState.COMPLETE}
        if not {key_of(run) for run in self.search()} <= accuracies.keys():
            return None
        if len(self.choices) == 1:
            return self.choices[0]
        return max(  # the first of the grid, where some are equal
            self.choices,
            key=lambda choice: mean(
                accuracies[key_of({"stage": "search", "seed": seed, **choice})]
                for seed in self.search_seeds
            ),
        )


def run_of(trial: FrozenTrial | optuna.Trial) -> Run | None:
    """Returns what a trial is to do; None for one that Optuna made up, which nobody runs."""
    return trial.user_attrs.get("run")


def key_of(run: Run) -> tuple[tuple[str, Any], ...]:
    """Returns what equal runs have in common, to look them up by."""
    return tuple(sorted(run.items()))

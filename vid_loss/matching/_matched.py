"""Pairs that say why they were chosen, and what was not."""

from collections.abc import Iterable

from vid_loss.pairs import Pair

Choice = tuple[Pair, str]  # a pair and the reason for it


class MatchedPairs(list[Pair]):
    """A list of pairs that prints what it holds, and why each was chosen.

    Args:
        choices: pairs with their reasons.
        left_out: what was not paired although it could be, and why.

    Attributes:
        left_out: as given; printed after the pairs.
        reasons: why a student and a teacher layer were paired. It holds for a pair of these layers
            whatever else of it is changed; one that was put in by hand has none.
    """

    def __init__(self, choices: Iterable[Choice], left_out: Iterable[str] = ()) -> None:
        choices = list(choices)
        super().__init__(pair for pair, _ in choices)
        self.reasons = {(pair.student, pair.teacher): reason for pair, reason in choices}
        self.left_out = list(left_out)

    def __repr__(self) -> str:
        lines = [
            f"{pair.label}: {self.reasons.get((pair.student, pair.teacher), 'added by hand')}"
            for pair in self
        ]
        return "\n".join(lines + [f"left out: {what}" for what in self.left_out])

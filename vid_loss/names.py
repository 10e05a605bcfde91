"""Pairs by their names."""

from collections.abc import Iterable, Mapping

from .pairs import Pair


def pairs_by_name(pairs: Mapping[str, str] | Iterable[Pair]) -> dict[str, Pair]:
    """Returns the pairs by their labels.

    Raises:
        TypeError: if they are neither a dict of layers nor pairs.
        ValueError: if there is none, or two have one name.
    """
    if isinstance(pairs, Mapping):
        pairs = [Pair(student, teacher) for student, teacher in pairs.items()]
    given = pairs
    pairs = list(pairs) if isinstance(pairs, Iterable) else [pairs]
    if isinstance(given, Pair) or not all(isinstance(pair, Pair) for pair in pairs):
        raise TypeError(
            "Distiller, pairs: expected a dict of student layer to teacher layer or a list of "
            f'Pair; got {given!r}. For example {{"layer4": "layer4"}}.'
        )
    if not pairs:
        raise ValueError("Distiller, pairs: expected at least one pair; got none.")
    by_name: dict[str, Pair] = {}
    for pair in pairs:
        if module_key(pair.label) in map(module_key, by_name):
            raise ValueError(
                f"{pair}: expected a name of its own; got {pair.label!r} twice. Set name=."
            )
        by_name[pair.label] = pair
    return by_name


def module_key(name: str) -> str:
    """A pair's name as a module's, which must have no dot."""
    return name.replace(".", "/")

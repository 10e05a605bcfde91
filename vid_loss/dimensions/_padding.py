"""Pairs whose padding counts, or which a mask is not for: which they are, and what helps."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vid_loss.advice import of_rows, one_by_one
from vid_loss.pairs import Pair


def flattened_pairs(
    shapes: Mapping[str, Sequence[int]], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[str]:
    """Yields the pairs of vectors that are as many as the tokens of some input.

    Args:
        shapes: of each pair's student feature; ``(N * L, C)`` is looked for.
        args: the example's positional arguments.
        kwargs: its keyword arguments.
    """
    given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim in (2, 3)]
    counts = {x.shape[:2].numel() for x in given if len(x) == len(given[0]) and x.shape[1] > 1}
    yield from (name for name, x in shapes.items() if len(x) == 2 and x[0] in counts)


def is_of(mask: Tensor, shape: Sequence[int], layer: str, of_mask: set[str] | None) -> bool:
    """Whether a mask ``(N, L)`` may be of a feature ``(N * L, C)``.

    Args:
        mask: of the batch.
        shape: of the feature.
        layer: its layer.
        of_mask: those that change with what the mask is of; None if that is not known.
    """
    return shape[0] == mask.numel() and (of_mask is None or layer in of_mask)


def mask_of_decoder(kwargs: Mapping[str, Any]) -> str:
    """Returns what counts in a decoder, in terms of its arguments."""
    return "labels != -100" if "labels" in kwargs else "decoder_attention_mask"


def padding_counts(pairs: str, name: str) -> str:
    """Says that a mask of padding, set at what does not count, is not used."""
    return (
        f"{pairs}: expected a mask of the tokens that count; got {name!r}, which is set at the "
        f"others and is not used, so that padding counts. Write Pair(..., mask=lambda *_, {name}, "
        f"**__: ~{name}), or mask=False if all count."
    )


def flattened(pair: Pair, shape: Sequence[int], mask: str) -> str:
    """Says that tokens which lost their samples, ``(N * L, C)``, are not masked, and what does it.

    Args:
        pair: what they are of.
        shape: of the student's.
        mask: ``(N, L)``, true where they count, in terms of one of the batch's arguments.
    """
    return (
        f"{pair}, mask: expected tokens (N, L, C), of which a mask (N, L) says what counts; got "
        f"shape {tuple(shape)}, the tokens of all samples in a row, for which it is not used, so "
        f"that padding counts. {one_by_one(mask)}"
    )


def of_other_positions(pair: Pair, mask: Tensor, shape: torch.Size) -> str:
    """Says that the batch's mask has other positions than a feature."""
    return (
        f"{pair}, mask: expected an attention_mask of the feature's positions; got shape "
        f"{tuple(mask.shape)}, of other ones, for a feature of shape {tuple(shape)}, so that its "
        "padding counts. Say which of them count: Pair(..., mask=lambda attention_mask, **_: ...), "
        "a function of the student's arguments that returns (N, L), or the name of one, such as "
        '"decoder_attention_mask"; or that all do: mask=False.'
    )


def for_no_pair(mask: Tensor, kind: str) -> str:
    """Says that a call's ``token_mask`` is of the positions of no pair."""
    if mask.ndim == 1:
        return (
            "Distiller, token_mask: expected a mask (N, L) of tokens or (N, H, W) of maps; got "
            f"shape {tuple(mask.shape)}. {of_rows()}"
        )
    pairs = "tokens (N, L, C)" if kind == "tokens" else "maps (N, C, H, W)"
    return (
        f"Distiller, token_mask: expected a mask of some pair's positions; got shape "
        f"{tuple(mask.shape)}, but none of the pairs without mask= is of {pairs}. Drop it, or "
        "give it to the pair that it is for: Pair(..., mask=...)."
    )

"""Remedies for two features that do not fit, in the words of a pair."""

import re

from torch import Tensor

from .losses.layouts import Kind, kind_of

_ADVICE: dict[tuple[Kind, Kind], str] = {
    ("map", "vector"): "Tap the student where it is a vector ('fc:input', a pooling layer) "
    "or pool it: student_transform=lambda x: x.mean((2, 3)).",
    ("map", "tokens"): "Turn the map into tokens: student_transform=lambda x: x.flatten(2).mT.",
    ("tokens", "map"): "Turn the tokens into a grid: "
    "student_transform=lambda x: x.mT.unflatten(2, (height, width)).",
    ("tokens", "vector"): "Pick or pool the tokens: student_transform=lambda x: x[:, 0].",
    ("vector", "map"): "Tap a student layer that has a resolution, or pool the teacher: "
    "teacher_transform=lambda x: x.mean((2, 3)).",
    ("vector", "tokens"): "Tap a student layer that keeps its tokens, or pick one of the "
    "teacher's: teacher_transform=lambda x: x[:, 0].",
}


def told(error: Exception, student: Tensor, teacher: Tensor) -> str:
    """Returns an error's message; torch's of a batch norm in the words of a pair."""
    message = str(error)
    if type(error) is TypeError and "unexpected keyword argument 'mask'" in message:
        return (
            f"expected a loss that takes the batch's mask; got {message}. Let its forward have "
            "mask=None, or give the pair mask=False."
        )
    if type(error) is RuntimeError:
        return (
            "expected a loss that works on the two features; got from it, for shapes "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}: {message}. VIDLoss and FitNetLoss "
            "have heads that bring the first to the channels of the second; a head or loss of "
            "your own must take these shapes."
        )
    if "more than 1 value per channel" not in message:
        return message
    norm = "layer" if student.ndim == 3 else "group"
    return (
        "expected more than one position that counts for the batch norm in its head; got a student "
        f"feature of shape {tuple(student.shape)}, such as a last batch of one. Drop that: "
        "DataLoader(..., drop_last=True); or take a norm that needs no batch: "
        f'loss=functools.partial(VIDLoss, norm="{norm}").'
    )


def advice(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> str:
    """Says what a pair can do about two features that do not fit; empty if they do."""
    kinds = kind_of(student.shape), kind_of(teacher.shape)
    if kinds[0] != kinds[1]:
        return f" {_ADVICE[kinds]}"
    if len(student) != len(teacher):
        return (
            " Give the distiller the batch that the student has just seen; if the batch is not the "
            "first dimension of a feature, move it there: "
            "student_transform=lambda x: x.transpose(0, 1)."
        )
    if kinds[0] == "tokens" and student.shape[1] != teacher.shape[1]:
        longer = "student" if student.shape[1] > teacher.shape[1] else "teacher"
        return (
            f" Drop a class token: {longer}_transform=lambda x: x[:, 1:]; or pool it, with torch."
            f"nn.functional.adaptive_avg_pool1d(x.mT, {min(student.shape[1], teacher.shape[1])}).mT"
            ". If these are signals (N, C, L): channel_dim=1."
        )
    if student.ndim != teacher.ndim:
        deeper = "student" if student.ndim > teacher.ndim else "teacher"
        return f" Pool the depth: {deeper}_transform=lambda x: x.mean(2)."
    if mask is not None and kinds[0] == "vector" and mask.numel() == len(student):
        return f" {of_rows() if mask.ndim == 1 else one_by_one('attention_mask')}"
    if mask is not None and kinds[0] == "tokens" and mask.shape != student.shape[:2]:
        return (
            " Give the pair a mask of its own: Pair(..., mask=lambda attention_mask, **_: ...), a "
            "function of the student's arguments, or mask=False if all tokens count."
        )
    return ""


def of_rows() -> str:
    """Says how rows ``(N, C)``, such as the nodes of a graph, get a mask ``(N,)``."""
    return (
        "Rows (N, C), such as samples or nodes, of which some count: Pair(..., student_transform="
        "lambda x: x.unsqueeze(1), teacher_transform=lambda x: x.unsqueeze(1)), and a mask (N, 1), "
        "mask.unsqueeze(1). If all count, mask=False."
    )


def one_by_one(mask: str) -> str:
    """Says how tokens that lost their samples, ``(N * L, C)``, get a mask ``(N, L)``.

    Args:
        mask: what is true where they count, in terms of one of the batch's arguments.
    """
    name = re.sub(r"\W*(\w+).*", r"\1", mask)
    rows = mask if mask == name else f"({mask})"
    return (
        "Write Pair(..., student_transform=lambda x: x.unsqueeze(1), "
        "teacher_transform=lambda x: x.unsqueeze(1), "
        f"mask=lambda *_, {name}, **__: {rows}.reshape(-1, 1)), which needs distiller(**batch); if "
        f"the first tokens of all samples come first, {rows}.T.reshape(-1, 1). If all count, "
        "mask=False."
    )

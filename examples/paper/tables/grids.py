"""Hyper-parameters that each method of the paper's tables chooses from."""

from collections.abc import Mapping

# Lambda by the method's term, and KD's temperature, FitNet's hint, a learning rate of its own.
Choice = Mapping[str, float]

# Chosen from on validation data. Three each, so that no method has the advantage of a finer search.
# Where the best of Table 1's small pair was at an end of its three, they were moved, for every
# method alike. FitNet's lambda ends at 3: with 10 and more, and a learning rate of 0.1, its
# training diverged (10 % of the validation images).
GRIDS: dict[str, tuple[Choice, ...]] = {
    "student": ({},),
    "finetuned": ({},),
    "kd": (
        {"kd": 1.0, "temperature": 4.0},
        {"kd": 3.0, "temperature": 4.0},
        {"kd": 3.0, "temperature": 10.0},
    ),
    "fitnet": (
        {"fitnet": 1.0, "hint": 1},
        {"fitnet": 3.0, "hint": 1},
        {"fitnet": 3.0, "hint": 2},
    ),
    "at": ({"at": 3.0}, {"at": 10.0}, {"at": 30.0}),
    "mi": ({"mi": 10.0}, {"mi": 30.0}, {"mi": 100.0}),
    "kd+at": ({"kd": 1.0, "at": 3.0}, {"kd": 1.0, "at": 10.0}, {"kd": 3.0, "at": 10.0}),
    "kd+mi": ({"kd": 1.0, "mi": 10.0}, {"kd": 1.0, "mi": 30.0}, {"kd": 3.0, "mi": 30.0}),
    "lwf": ({"lwf": 1.0}, {"lwf": 3.0}, {"lwf": 10.0}),
    "mi-l": ({"mi-l": 1.0}, {"mi-l": 3.0}, {"mi-l": 10.0}),
    "mi-i": ({"mi-i": 3.0}, {"mi-i": 10.0}, {"mi-i": 30.0}),
    "lwf+fitnet": (
        {"lwf": 1.0, "fitnet": 1.0},
        {"lwf": 3.0, "fitnet": 1.0},
        {"lwf": 1.0, "fitnet": 3.0},
    ),
    "mi-l+mi-i": (
        {"mi-l": 1.0, "mi-i": 3.0},
        {"mi-l": 3.0, "mi-i": 3.0},
        {"mi-l": 1.0, "mi-i": 10.0},
    ),
}

# In place of these for an ImageNet teacher of clip art, whose features have variances up to 240:
# FitNet takes them as they are.
CLIP_ART: dict[str, tuple[Choice, ...]] = {
    "finetuned": ({"lr": 0.003}, {"lr": 0.01}, {"lr": 0.03}),
    "fitnet": (
        {"fitnet": 0.01, "hint": 1},
        {"fitnet": 0.1, "hint": 1},
        {"fitnet": 1.0, "hint": 1},
    ),
    "at": ({"at": 3.0}, {"at": 30.0}, {"at": 300.0}),
    "mi-l": ({"mi-l": 1.0}, {"mi-l": 3.0}, {"mi-l": 10.0}),
    "mi-i": ({"mi-i": 10.0}, {"mi-i": 30.0}, {"mi-i": 100.0}),
    "lwf+fitnet": (
        {"lwf": 1.0, "fitnet": 0.1},
        {"lwf": 3.0, "fitnet": 0.1},
        {"lwf": 3.0, "fitnet": 0.01},
    ),
    "mi-l+mi-i": (
        {"mi-l": 1.0, "mi-i": 10.0},
        {"mi-l": 3.0, "mi-i": 10.0},
        {"mi-l": 3.0, "mi-i": 30.0},
    ),
}

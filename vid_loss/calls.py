"""Errors of a model that cannot run on what it is called with, in the words of an argument."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

# Of torch and of Python, not a class of the model's own, such as that of a device out of memory.
_PLAIN = (
    TypeError,
    ValueError,
    RuntimeError,
    NotImplementedError,
    AttributeError,
    IndexError,
    KeyError,
)
_LONGEST = 300


def explained(
    error: Exception,
    source: str,
    owner: str,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    remedy: str,
) -> Exception | None:
    """Returns an error that says what a model was called with; None if the error says enough.

    Args:
        error: what its forward raised.
        source: the object and the argument that the inputs are from.
        owner: what the model is called.
        model: the model.
        args: its positional arguments.
        kwargs: its keyword arguments.
        remedy: what to do.
    """
    if type(error) not in _PLAIN or _is_own(error.__traceback__):
        return None
    expected = f"inputs that the {owner} runs on"
    if not takes(model.forward, args, kwargs):
        expected = f"arguments for forward{inspect.signature(model.forward)}"
    given = [_described(x) for x in args] + [f"{k}={_described(x)}" for k, x in kwargs.items()]
    said = str(error).strip().split("\n")[0][:_LONGEST].rstrip(".")
    return type(error)(
        f"{source}: expected {expected}; got ({', '.join(given)}), and from its forward: {said}. "
        f"{remedy}"
    )


def inputs_of_teacher(
    teacher: nn.Module, tensors: Iterable[Tensor], dtype: torch.dtype | None
) -> str:
    """Returns what to do where a teacher does not run on tensors, which may be of another type.

    Args:
        teacher: the model.
        tensors: what it is called with.
        dtype: what it is cast to for the call; None if it is not.
    """
    weight = next((x for x in teacher.parameters() if x.is_floating_point()), None)
    given = next((x.dtype for x in tensors if x.is_floating_point()), None)
    is_cast = dtype or (weight is not None and torch.is_autocast_enabled(weight.device.type))
    if is_cast or weight is None or given in (None, weight.dtype):
        return (
            "Map the student's with teacher_inputs=lambda ...: (...), or give the part of the "
            "teacher that takes them."
        )
    half = weight.dtype.itemsize < torch.float32.itemsize
    low = f" To run it in less, add teacher_dtype={weight.dtype}." if half else ""
    return f"Its weights are {weight.dtype}, these {given}: give teacher.to({given}).{low}"


def takes(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a function can be called with these arguments at all."""
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError:
        return False
    except ValueError:  # it has no signature
        return True
    return True


def refuse_no_module(source: str, model: Any) -> None:
    """Raises the TypeError that says what to make of something that is no module."""
    if isinstance(model, nn.Module):
        return
    got = type(model).__name__
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise TypeError(
            f"{source}: expected an nn.Module; got the class {model.__name__}. Build it: "
            f"{model.__name__}(...)."
        )
    if isinstance(model, Mapping):
        remedy = "Load it into a model: load_state_dict(...)."
    elif isinstance(model, list | tuple):
        remedy = 'Several teachers are one: vid_loss.teachers.Teachers({"a": one, "b": other}).'
    elif callable(model):
        remedy = "Wrap it: a module whose forward calls it."
    else:
        got, remedy = repr(model), "Load the model first, and pass that."
    raise TypeError(f"{source}: expected an nn.Module; got {got}. {remedy}")


def _is_own(traceback: TracebackType | None) -> bool:
    """Whether an error was raised here, and says what is meant."""
    name = ""
    while traceback is not None:
        name = traceback.tb_frame.f_globals.get("__name__", "")
        traceback = traceback.tb_next
    return name == "vid_loss" or name.startswith("vid_loss.")


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        kind = "" if value.dtype == torch.float32 else f" {str(value.dtype).removeprefix('torch.')}"
        return f"{tuple(value.shape)}{kind}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_described(x)}" for key, x in value.items()) + "}"
    return type(value).__name__


def positional(model: nn.Module) -> list[str]:
    """Returns the names of the parameters that a model takes by position."""
    kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = inspect.signature(model.forward).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind in kinds]

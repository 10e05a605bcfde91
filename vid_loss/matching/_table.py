"""A model's layers, as one forward shows them."""

import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

from torch import Tensor, nn

from vid_loss.calls import explained, refuse_no_module
from vid_loss.dimensions import OF_SIGNALS
from vid_loss.guards import undisturbed
from vid_loss.taps import items_of, unwrap
from vid_loss.teacher import Inputs, as_call

_COLUMNS = ("name", "type", "shape", "note")


@dataclass(frozen=True)
class Layer:
    """What one layer returned in one forward.

    Attributes:
        name: as a :class:`~vid_loss.Pair` takes it, with the index of an entry where the layer
            returns several tensors.
        type: name of the module's class.
        shape: shape of the output, the batch first.
        note: why it cannot be tapped; empty if it can.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    note: str
    # What the choice of pairs needs besides. The calls inside this one are those that begin
    # after it and up to ``last``.
    path: str = field(repr=False)
    input_shape: tuple[int, ...] = field(repr=False)
    begin: int = field(repr=False)
    last: int = field(repr=False)
    size: int = field(repr=False)  # number of trained numbers, its children's included
    is_signal: bool | None = field(repr=False)  # (N, C, L), not (N, L, C); None: cannot be told
    is_block: bool = field(repr=False)  # has children, and a weight matrix among them

    def cells(self) -> tuple[str, str, str, str]:
        """Returns the texts of the four columns."""
        return self.name, self.type, str(self.shape), self.note


class LayerTable(Sequence[Layer]):
    """The layers in the order in which they are called. Prints as a table.

    Args:
        rows: the layers.
        input_shape: shape of the model's input: the first with four dimensions, or the first; of
            inputs in lists, of what the model makes of them first.
    """

    def __init__(self, rows: Sequence[Layer], input_shape: tuple[int, ...]) -> None:
        self.rows = tuple(rows)
        self.input_shape = input_shape

    @overload
    def __getitem__(self, index: int) -> Layer: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Layer]: ...
    def __getitem__(self, index: int | slice) -> Layer | Sequence[Layer]:
        """Returns a layer, or a tuple of them."""
        return self.rows[index]

    def __len__(self) -> int:
        """Returns the number of layers."""
        return len(self.rows)

    def __repr__(self) -> str:
        table = [_COLUMNS, *(layer.cells() for layer in self.rows)]
        widths = [max(len(line[i]) for line in table) for i in range(len(_COLUMNS))]
        lines = ("  ".join(map(str.ljust, line, widths)).rstrip() for line in table)
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """The table in a notebook."""
        head = "".join(f"<th>{column}</th>" for column in _COLUMNS)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in layer.cells()) + "</tr>"
            for layer in self.rows
        )
        return f"<table><tr>{head}</tr>{body}</table>"


_EXAMPLE = "Give what model(...) is called with, without labels; to match_layers, teacher_inputs=."


def list_layers(model: nn.Module, example: Inputs, *, depth: int | None = None) -> LayerTable:
    """Lists the layers that an example runs through, to choose pairs from.

    The model runs once, in eval mode and without gradients; its modes, buffers and the random
    state stay as they were. Every output is kept until the end: one sample is enough.

    Args:
        model: the model.
        example: a batch of its inputs: a tensor, a tuple of positional or a dict of keyword
            arguments.
        depth: list what is nested so deep at most: 1 is the model's own children. None lists all.

    Returns:
        A sequence of layers with ``name``, ``type``, ``shape`` and ``note``, which prints as a
        table in a terminal and in a notebook.

    Raises:
        TypeError: if the example is none of the three forms.
        ValueError: if the depth is below 1.

    Example:
        >>> import torch
        >>> list_layers(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), torch.zeros(4, 2))
        name  type        shape   note
              Sequential  (4, 3)
        0     Linear      (4, 3)
        1     ReLU        (4, 3)
    """
    if depth is not None and (not isinstance(depth, int) or depth < 1):
        raise ValueError(f"list_layers, depth: expected 1 or more, or None; got {depth!r}.")
    refuse_no_module("list_layers, model", model)
    args, kwargs = as_call(example, "list_layers, example")
    model = unwrap(model)
    names = {module: name for name, module in model.named_modules()}
    recorder = _Recorder()
    handles = []
    try:
        for module in names:
            handles.append(module.register_forward_pre_hook(recorder.begin, with_kwargs=True))
            handles.append(module.register_forward_hook(recorder.end))
        with undisturbed(model):
            model(*args, **kwargs)
    except Exception as error:
        found = explained(error, "list_layers, example", "model", model, args, kwargs, _EXAMPLE)
        if found is None:
            raise
        raise found from error
    finally:
        for handle in handles:
            handle.remove()
    calls = recorder.calls
    rows = [row for module, call in calls.items() for row in _rows(names[module], module, calls)]
    shown = [row for row in rows if depth is None or row.path.count(".") < depth]
    return LayerTable(shown, _input_shape(calls, model))


@dataclass
class _Call:
    begin: int
    input_shape: tuple[int, ...]
    times: int = 0
    last: int = 0
    outputs: dict[str, tuple[Tensor, int]] = field(default_factory=dict)


class _Recorder:
    def __init__(self) -> None:
        self.calls: dict[nn.Module, _Call] = {}

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        images = [x for x in given if x.ndim == 4]
        shape = tuple((images or given)[0].shape) if given else ()
        self.calls.setdefault(module, _Call(len(self.calls), shape)).times += 1

    def end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        call = self.calls[module]
        call.last = len(self.calls) - 1
        call.outputs = {index: (x, _version(x)) for index, x in _tensors(output).items()}


def _version(tensor: Tensor) -> int:
    """Counts a tensor's changes in place; inference tensors keep no count."""
    return 0 if tensor.is_inference() else tensor._version


def _tensors(output: Any) -> dict[str, Tensor]:
    """The tensors in an output by the index that a layer spec takes; "" where none is needed."""
    if isinstance(output, Tensor):
        return {"": output}
    tensors = {f"[{key!r}]": x for key, x in items_of(output).items() if isinstance(x, Tensor)}
    return {"": next(iter(tensors.values()))} if len(tensors) == 1 else tensors


def _input_shape(calls: Mapping[nn.Module, "_Call"], model: nn.Module) -> tuple[int, ...]:
    """The model's own, or, of inputs in lists or dicts, that of the first part that has some."""
    shapes = [call.input_shape for call in calls.values() if call.input_shape]
    images = [shape for shape in shapes if len(shape) == 4]
    return calls[model].input_shape or (images or shapes or [()])[0]


def _rows(path: str, module: nn.Module, calls: Mapping[nn.Module, "_Call"]) -> Iterator[Layer]:
    parameters, call = list(module.parameters()), calls[module]
    for index, (tensor, version) in call.outputs.items():
        note = "changed in place afterwards" if _version(tensor) != version else ""
        if not tensor.is_floating_point():
            note = f"{str(tensor.dtype).removeprefix('torch.')}, not floating point"
        if call.times > 1:
            note = f"called {call.times} times"
        yield Layer(
            name=path + index,
            type=type(module).__name__,
            shape=tuple(tensor.shape),
            note=note,
            path=path,
            input_shape=call.input_shape,
            begin=call.begin,
            last=call.last,
            size=sum(p.numel() for p in parameters),
            is_signal=_is_signal(tuple(tensor.shape), module, calls),
            is_block=any(module.children()) and any(p.ndim > 1 for p in parameters),
        )


def _is_signal(
    shape: tuple[int, ...], module: nn.Module, calls: Mapping[nn.Module, "_Call"]
) -> bool | None:
    """Whether three dimensions are (N, C, L), told by the last weights inside that made them."""
    if len(shape) != 3:
        return False
    last = None
    for part in module.modules():
        weighted = part in calls and any(True for _ in part.parameters(recurse=False))
        if weighted and (last is None or calls[part].begin > calls[last].begin):
            last = part
    if last is None:
        return False
    made = [tuple(x.shape) for x, _ in calls[last].outputs.values() if x.ndim == 3]
    second = isinstance(last, OF_SIGNALS)  # torch's others have their channels last
    if not made or last is module:
        return second and bool(made)
    if shape[1] == shape[2] and second:
        return None  # it may have been transposed afterwards
    return second != (made[0] == (shape[0], shape[2], shape[1]) and shape[1] != shape[2])

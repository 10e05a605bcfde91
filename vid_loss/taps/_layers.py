"""How a layer of a model is named, and found."""

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from torch import Tensor, nn

from vid_loss.calls import refuse_no_module

from ._recorder import Mode

_ENTRY = re.compile(r"""\[(-?\d+|'[^']*'|"[^"]*")\]""")
_SPEC = re.compile(rf"(?P<name>[^:\[\]]*)(?P<input>:input)?(?P<entries>({_ENTRY.pattern})*)")


@dataclass(frozen=True)
class LayerSpec:
    """A feature of a model: ``name``, ``name:input``, ``name[1]`` or ``name["key"][0]``."""

    text: str
    name: str
    of_input: bool
    entries: tuple[int | str, ...]

    @classmethod
    def parse(cls, text: str) -> "LayerSpec":
        """Reads a layer spec.

        Raises:
            TypeError: if it is not a string.
            ValueError: if it does not have one of these forms.

        Example:
            >>> LayerSpec.parse("fc:input").of_input
            True
        """
        if not isinstance(text, str):
            raise TypeError(f"Layer: expected a module's name; got {text!r}.")
        match = _SPEC.fullmatch(text)
        if match is None:
            raise ValueError(
                f"Layer {text!r}: expected 'name', 'name:input', 'name[0]' or 'name[\"key\"]', "
                "with a name from named_modules()."
            )
        entries = tuple(
            entry[1:-1] if entry[0] in "'\"" else int(entry)
            for entry in _ENTRY.findall(match["entries"])
        )
        return cls(text, match["name"], match["input"] is not None, entries)

    def select(self, value: Any) -> Tensor:
        """Picks this spec's tensor out of what a layer returned or was given.

        A container that holds a single tensor needs no index.

        Raises:
            TypeError: if that is not one tensor, saying what there is.
        """
        for depth, entry in enumerate(self.entries):
            value = self._entry_of(value, depth, entry)
        if not self.entries and not isinstance(value, Tensor):
            tensors = [x for x in items_of(value).values() if isinstance(x, Tensor)]
            value = tensors[0] if len(tensors) == 1 else value
        if isinstance(value, Tensor):
            return value
        found = self._describe(value, len(self.entries))
        raise TypeError(f"Layer {self.text!r}: expected a tensor; got {found}.")

    def _entry_of(self, value: Any, depth: int, entry: int | str) -> Any:
        if isinstance(value, Tensor):
            raise TypeError(
                f"Layer {self.text!r}: expected a tuple or a mapping to take {entry!r} from; "
                f"got a tensor of shape {tuple(value.shape)}. Drop the index."
            )
        try:
            # A named tuple's and a dataclass's by their names, a sequence's by their places.
            return value[entry] if hasattr(value, "__getitem__") else items_of(value)[entry]
        except (KeyError, IndexError, TypeError):
            if isinstance(value, tuple) and entry in getattr(value, "_fields", ()):
                return getattr(value, str(entry))
            raise TypeError(
                f"Layer {self.text!r}: expected an entry {entry!r}; "
                f"got {self._describe(value, depth)}."
            ) from None

    def _describe(self, value: Any, depth: int) -> str:
        """Says what a container holds, as specs that choose from it."""
        base = self.name + (":input" if self.of_input else "")
        base += "".join(f"[{_quoted(entry)}]" for entry in self.entries[:depth])
        choices = [
            f"{base}[{_quoted(key)}]" + (f" {tuple(x.shape)}" if isinstance(x, Tensor) else " ...")
            for key, x in items_of(value).items()
            if isinstance(x, Tensor) or items_of(x)
        ]
        if not choices:
            return f"{type(value).__name__} without a tensor in it. Tap another layer"
        return f"{type(value).__name__}. Choose one of {', '.join(choices)}"


def items_of(value: Any) -> dict[Any, Any]:
    """Returns what is in a mapping, a sequence or a dataclass; nothing of anything else."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, tuple | list):
        return dict(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return {}


def _quoted(key: Any) -> str:
    return f'"{key}"' if isinstance(key, str) else repr(key)


def unwrap(model: nn.Module) -> nn.Module:
    """Looks through wrappers of torch and Lightning Fabric, whose layers have other names."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = model.module
        else:
            inner = getattr(model, "_orig_mod", getattr(model, "_original_module", None))
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def find_layer(name: str, modules: Mapping[str, nn.Module], owner: str) -> nn.Module:
    """Returns the module of that name.

    Raises:
        ValueError: if there is none, with the closest names.
    """
    if name in modules:
        return modules[name]
    nested = [other for other in modules if other.endswith(f".{name}")]
    close = [*nested[:3], *difflib.get_close_matches(name, modules, n=3)]
    hint = f"The closest are {', '.join(map(repr, dict.fromkeys(close)))}." if close else ""
    raise ValueError(
        f"Layer {name!r} of the {owner}: expected a name from named_modules(). "
        f"{hint or f'List them: print(list_layers({owner}, images)).'}"
    )


def check_arguments(model: Any, layers: Any, record: Any, owner: str) -> None:
    """Refuses what a tap cannot be built from.

    Raises:
        TypeError: if the model is no module, or the layers are no list of names.
        ValueError: if ``record`` is none of its choices.
    """
    refuse_no_module(f"FeatureTap, {owner}", model)
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        raise TypeError(
            f"FeatureTap, layers: expected a list of names; got {layers!r}. For example "
            '["layer3", "layer4"].'
        )
    if record not in get_args(Mode):
        raise ValueError(f"FeatureTap, record: expected one of {get_args(Mode)}; got {record!r}.")

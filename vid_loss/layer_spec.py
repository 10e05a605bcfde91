"""How a layer of a model is named, and found."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

_SPEC = re.compile(r"(?P<name>[^:\[\]]*)(?P<input>:input)?(\[(?P<entry>-?\d+|'.+'|\".+\")\])?")


@dataclass(frozen=True)
class LayerSpec:
    """A feature of a model, parsed from ``name``, ``name:input``, ``name[1]``, ``name["key"]``."""

    text: str
    name: str
    of_input: bool
    entry: int | str | None

    @classmethod
    def parse(cls, text: str) -> "LayerSpec":
        """Reads a layer spec.

        Raises:
            TypeError: if it is not a string.
            ValueError: if it does not have one of the four forms.

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
        entry: int | str | None = match["entry"]
        if isinstance(entry, str):
            entry = entry[1:-1] if entry[0] in "'\"" else int(entry)
        return cls(text, match["name"], match["input"] is not None, entry)

    def select(self, value: Any) -> Tensor:
        """Picks this spec's tensor out of what a layer returned or was given.

        A container that holds a single tensor needs no index.

        Raises:
            TypeError: if that is not one tensor, saying what there is.
        """
        if self.entry is not None:
            value = self._entry_of(value)
        elif not isinstance(value, Tensor):
            tensors = [x for x in _entries(value).values() if isinstance(x, Tensor)]
            value = tensors[0] if len(tensors) == 1 else value
        if isinstance(value, Tensor):
            return value
        raise TypeError(f"Layer {self.text!r}: expected a tensor; got {_summary(self, value)}.")

    def _entry_of(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            raise TypeError(
                f"Layer {self.text!r}: expected a tuple or a mapping to take {self.entry!r} from; "
                f"got a tensor of shape {tuple(value.shape)}. Drop the index."
            )
        try:
            return value[self.entry]
        except (KeyError, IndexError, TypeError):
            raise TypeError(
                f"Layer {self.text!r}: expected an entry {self.entry!r}; "
                f"got {_summary(self, value)}."
            ) from None


def _entries(value: Any) -> dict[Any, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    return dict(enumerate(value)) if isinstance(value, tuple | list) else {}


def _summary(spec: LayerSpec, value: Any) -> str:
    tensors = {k: x for k, x in _entries(value).items() if isinstance(x, Tensor)}
    if not tensors:
        return f"{type(value).__name__} without a tensor in it. Tap another layer"
    base = spec.name + (":input" if spec.of_input else "")
    choices = ", ".join(f"'{base}[{key!r}]' {tuple(x.shape)}" for key, x in tensors.items())
    return f"{type(value).__name__}. Choose one of {choices}"


def unwrap(model: nn.Module) -> nn.Module:
    """Looks through ``torch.compile`` and data-parallel wrappers, whose layers have other names."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = model.module
        else:
            inner = getattr(model, "_orig_mod", None)
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
        f"{hint or 'List them with [name for name, _ in model.named_modules()].'}"
    )

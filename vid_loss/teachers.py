"""Several teachers in the place of one."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from .teacher import Inputs, as_call


class Teachers(nn.Module):
    """Several teachers as one model, wherever a teacher is expected.

    Their layers are ``"<name>.<layer>"``: ``Pair("layer4", "large.layer4")``. Each runs on the
    same arguments, but for those that it is called with by name and does not name in its forward.

    Args:
        models: the teachers by name.
        inputs: by name, for teachers that have other inputs: a function of the arguments that
            returns the teacher's, as ``Distiller(teacher_inputs=)``.

    Raises:
        TypeError: if they are no modules by name, or the inputs no functions.
        ValueError: if there is none, a name has a dot, or ``inputs`` has another name.

    Example:
        >>> import torch
        >>> teachers = Teachers({"a": nn.Linear(2, 3), "b": nn.Linear(2, 4)})
        >>> {name: tuple(x.shape) for name, x in teachers(torch.zeros(5, 2)).items()}
        {'a': (5, 3), 'b': (5, 4)}
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        *,
        inputs: Mapping[str, Callable[..., Inputs]] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(models, Mapping) or not all(
            isinstance(model, nn.Module) for model in models.values()
        ):
            got: Any = type(models).__name__
            if isinstance(models, Mapping):
                got = {name: type(model).__name__ for name, model in models.items()}
            raise TypeError(
                f"Teachers, models: expected a dict of names to modules; got {got}. For example "
                'Teachers({"large": teacher, "old": other}).'
            )
        if not models:
            raise ValueError("Teachers, models: expected at least one; got none.")
        if inputs is not None and not (
            isinstance(inputs, Mapping) and all(map(callable, inputs.values()))
        ):
            raise TypeError(
                f"Teachers, inputs: expected a dict of names to functions; got {inputs!r}. For "
                'example inputs={"large": lambda images: resize(images)}.'
            )
        self.inputs = dict(inputs or {})
        unknown = sorted(self.inputs.keys() - models.keys())
        if unknown:
            raise ValueError(
                f"Teachers, inputs: expected names among {list(models)}; got {unknown}."
            )
        self._names = list(models)
        for name, model in models.items():
            if not name or "." in name or hasattr(self, name):
                raise ValueError(
                    f"Teachers, models: expected a name without a dot that nn.Module does not use "
                    f"itself; got {name!r}. Choose another."
                )
            self.add_module(name, model)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Returns each teacher's output, by name."""
        return {name: self._run(name, args, kwargs) for name in self._names}

    def _run(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        model = self.get_submodule(name)
        if name in self.inputs:
            args, kwargs = as_call(self.inputs[name](*args, **kwargs), f"Teachers, inputs {name!r}")
        else:
            takes = inspect.signature(model.forward).parameters
            if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in takes.values()):
                kwargs = {key: value for key, value in kwargs.items() if key in takes}
        return model(*args, **kwargs)

"""Where the tapped layers stand in their model, to notice when they no longer do."""

from collections.abc import Mapping

from torch import nn


class Places:
    """The way to each tapped layer, as it was when it was looked up.

    Args:
        model: the model.
        tapped: its tapped layers by the names that they were asked for by.
    """

    def __init__(self, model: nn.Module, tapped: Mapping[str, nn.Module]) -> None:
        self._model = model
        self._tapped = tapped
        self.update()

    def intact(self) -> bool:
        """Whether each module on the way is the one that it was. Asked in every step."""
        try:
            for holder, key, module in self._steps:
                if holder._modules[key] is not module:
                    return False
        except KeyError:
            return False
        return True

    def update(self) -> None:
        """Takes the places as they are now: a layer may have moved within its model."""
        names: dict[nn.Module, list[str]] = {}
        for name, module in self._model.named_modules(remove_duplicate=False):
            names.setdefault(module, []).append(name)
        steps: dict[tuple[nn.Module, str], nn.Module] = {}
        for name, module in self._tapped.items():
            known = names.get(module, [])
            path = name if name in known or not known else known[0]
            holder = self._model
            for key in filter(None, path.split(".")):
                child = holder._modules.get(key)
                if child is None:
                    break
                steps[holder, key] = child
                holder = child
        self._steps = [(holder, key, module) for (holder, key), module in steps.items()]

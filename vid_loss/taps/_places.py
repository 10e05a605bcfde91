"""Where the tapped layers stand in their model, to notice when they no longer do."""

from collections.abc import Mapping

from torch import nn

Step = tuple[nn.Module, str, nn.Module]  # a module, the name of a child of it, and the child


def ways_to(model: nn.Module, tapped: Mapping[str, nn.Module]) -> list[Step]:
    """Returns the steps from a model to each of its layers, as they are now.

    Args:
        model: the model.
        tapped: layers by the names that they were asked for by; a layer may have moved since.
    """
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    steps: dict[tuple[nn.Module, str], nn.Module] = {}
    for name, module in tapped.items():
        known = names.get(module, [])
        path = name if name in known or not known else known[0]
        holder = model
        for key in filter(None, path.split(".")):
            child = holder._modules.get(key)
            if child is None:
                break
            steps[holder, key] = child
            holder = child
    return [(holder, key, module) for (holder, key), module in steps.items()]

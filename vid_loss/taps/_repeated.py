"""Layers that run several times in one forward, and what runs once around them."""

from collections.abc import Iterator

from torch import nn

from ._layers import LayerSpec


def has_forward(module: nn.Module) -> bool:
    """Whether a module can be called, as a ``ModuleList`` cannot."""
    return type(module).forward is not nn.Module.forward


def around(model: nn.Module, spec: LayerSpec) -> Iterator[str]:
    """Yields the layers around one that can be called, the closest first, without the model."""
    name = spec.name.rpartition(".")[0]
    while name:
        if has_forward(model.get_submodule(name)):
            yield name
        name = name.rpartition(".")[0]


def repeated(model: nn.Module, owner: str, spec: LayerSpec, calls: int) -> str:
    """Says that a layer ran several times in one forward, and what can be tapped instead.

    Args:
        model: the model that is tapped.
        owner: what messages call it.
        spec: the layer.
        calls: how often it ran.
    """
    module = model.get_submodule(spec.name)
    names = [name for name, x in model.named_modules(remove_duplicate=False) if x is module]
    others = [repr(name) for name in names if name != spec.name]
    same = f", which is {' and '.join(others)} as well," if others else ""
    outer = [repr(name) for name in around(model, spec)]
    choices = [f"a layer around it that does, {' or '.join(outer)}"] if outer else []
    if hasattr(getattr(model, "config", None), "output_hidden_states"):
        choices.append(
            f"hidden states, '[\"hidden_states\"][1]' and so on, with {owner}.config."
            "output_hidden_states = True set before"
        )
    elif not outer:
        choices.append(f'what the {owner} returns, ""')
    choices.append(
        "an nn.Identity for each call: add self.marks = nn.ModuleList(nn.Identity() for _ in "
        f"range({calls})), write x = self.marks[i](x) after call i, tap 'marks.0' and so on"
    )
    return (
        f"Layer {spec.text!r} of the {owner}{same} was reached {calls} times in one forward, so "
        f"which call is meant is not clear. Tap what runs once: {'; or '.join(choices)}. "
        f"print(vid_loss.list_layers({owner}, example)) notes what is called several times."
    )

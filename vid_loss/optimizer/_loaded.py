"""Whether the heads have been loaded, where an optimizer's state of them has."""

from typing import Any

from torch import Tensor, nn

from vid_loss.taps import UncopiedHook

NOT_LOADED = (
    "Distiller: expected the heads that the optimizer's state is of; got new ones beside a state "
    "that was loaded. Load theirs too: distiller.load_state_dict(checkpoint['distiller']), of what "
    "distiller.state_dict() was when the checkpoint was saved. To start them anew: "
    "for p in distiller.parameters(): optimizer.state.pop(p, None)"
)


class Loaded(UncopiedHook):
    """Notes whether heads have been loaded, on their own or with a model that they are in."""

    def __init__(self, heads: nn.Module) -> None:
        self.happened = False
        heads.register_load_state_dict_post_hook(self)  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def __call__(self, heads: nn.Module, incompatible: Any) -> None:
        """Called by torch after loading; with strict=False there may have been nothing of them."""
        own = [name for name, _ in heads.named_parameters()]
        missing = tuple(incompatible.missing_keys)
        if not all(any(key.endswith(name) for key in missing) for name in own):
            self.happened = True


def has_history(state: dict[str, Any], earlier: int) -> bool:
    """Whether a parameter's state in an optimizer is of more steps than were taken here."""
    if "step" in state:
        return float(state["step"]) > earlier
    tensors = [x for x in state.values() if isinstance(x, Tensor)]
    return not earlier and any(bool(x.any()) for x in tensors)

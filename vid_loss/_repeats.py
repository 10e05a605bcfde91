"""Whether a teacher says the same of the same inputs twice."""

import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

_ROUNDING = 1e-2  # relative; of kernels that add up in any order, and far below a noise
_RANDOM = (
    "Distiller, teacher: expected the same features whenever it runs on the same inputs; got "
    "others of {layers} in a second run. Its forward, or teacher_inputs, draws random numbers "
    "(noise, masks, time steps), and the student's draws others. Draw them before, and give both "
    "models the same, as in distiller(noisy_images, times), of networks that take them."
)


def read_twice_if_random(
    read: Callable[[], Mapping[str, Tensor]], teacher: nn.Module
) -> Mapping[str, Tensor]:
    """Returns a teacher's features; warns if they depend on random numbers that it draws.

    It runs a second time if it has drawn any: some draw what they do not use in eval mode, such as
    whether a layer is to be dropped.

    Args:
        read: runs the teacher and returns its features by layer.
        teacher: the model that it runs.
    """
    before = _random_states(teacher)
    features = read()
    drawn = not all(map(torch.equal, before, _random_states(teacher)))
    if drawn:
        again = read()
        layers = [name for name, x in features.items() if _differ(x, again[name])]
        if layers:
            warnings.warn(_RANDOM.format(layers=", ".join(map(repr, layers))), stacklevel=4)
    return features


def _random_states(model: nn.Module) -> list[Tensor]:
    devices = dict.fromkeys(p.device for p in model.parameters() if p.is_cuda)
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(x) for x in devices)]


def _differ(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return True
    if one.is_meta:
        return False
    one, other = one.float(), other.float()
    return bool((one - other).norm() > _ROUNDING * one.norm())

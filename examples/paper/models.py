"""The networks of the paper's tables, and any other by its torchvision or timm name."""

from torch import Tensor, nn


class WideResNet(nn.Module):
    """WRN-depth-width for small images: Zagoruyko & Komodakis 2016, arXiv:1605.07146.

    Its three groups of residual blocks are ``group1``, ``group2`` and ``group3``. A stem of stride
    2 takes a quarter of the time; the papers' has 1.
    """

    def __init__(self, depth: int, width: int, classes: int, stem_stride: int = 1) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 4, 6)
        if rest or blocks < 1:
            raise ValueError(f"WideResNet, depth: expected 6 n + 4, such as 16 or 40; got {depth}.")
        channels = [16, 16 * width, 32 * width, 64 * width]
        self.stem = nn.Conv2d(3, channels[0], 3, stem_stride, padding=1, bias=False)
        self.group1 = _group(channels[0], channels[1], blocks, stride=1)
        self.group2 = _group(channels[1], channels[2], blocks, stride=2)
        self.group3 = _group(channels[2], channels[3], blocks, stride=2)
        self.norm = nn.BatchNorm2d(channels[3])
        self.fc = nn.Linear(channels[3], classes)
        _initialize(self)

    def forward(self, images: Tensor) -> Tensor:
        """Maps ``(N, 3, H, W)`` to logits ``(N, classes)``."""
        maps = self.group3(self.group2(self.group1(self.stem(images))))
        logits: Tensor = self.fc(self.norm(maps).relu().mean(dim=(2, 3)))
        return logits


class _PreActivationBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = None
        if inputs != outputs or stride != 1:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        active = self.norm1(maps).relu()
        skipped = maps if self.shortcut is None else self.shortcut(active)
        residual: Tensor = self.conv2(self.norm2(self.conv1(active)).relu())
        return skipped + residual


def _group(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    first = _PreActivationBlock(inputs, outputs, stride)
    return nn.Sequential(
        first, *(_PreActivationBlock(outputs, outputs, 1) for _ in range(blocks - 1))
    )


class VGG9(nn.Module):
    """Eight 3x3 convolutions with batch norm, five max-pools, one linear layer.

    The paper names VGG-9 and does not draw it. This reading is VGG-11 (Simonyan & Zisserman 2014)
    with one linear layer, after an average over positions, in the place of three. ``stage1`` to
    ``stage5`` end with the max-pools.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stage1 = _vgg_stage(3, 64, convolutions=1)
        self.stage2 = _vgg_stage(64, 128, convolutions=1)
        self.stage3 = _vgg_stage(128, 256, convolutions=2)
        self.stage4 = _vgg_stage(256, 512, convolutions=2)
        self.stage5 = _vgg_stage(512, 512, convolutions=2)
        self.fc = nn.Linear(512, classes)
        _initialize(self)

    def forward(self, images: Tensor) -> Tensor:
        """Maps ``(N, 3, H, W)``, 32 x 32 or larger, to logits ``(N, classes)``."""
        maps = self.stage3(self.stage2(self.stage1(images)))
        maps = self.stage5(self.stage4(maps))
        logits: Tensor = self.fc(maps.mean(dim=(2, 3)))
        return logits


def _vgg_stage(inputs: int, outputs: int, convolutions: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in [inputs] + [outputs] * (convolutions - 1):
        layers += [
            nn.Conv2d(width, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers, nn.MaxPool2d(2))


def _initialize(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def build_model(name: str, classes: int) -> nn.Module:
    """Builds a model with random weights.

    Args:
        name: ``vgg9``, ``wrn-DEPTH-WIDTH``, ``wrn-DEPTH-WIDTH-s2`` with a stem of stride 2, or a
            name of torchvision's or timm's.
        classes: number of outputs.

    Raises:
        ValueError: if no source knows the name.
    """
    if name == "vgg9":
        return VGG9(classes)
    if name.startswith("wrn-"):
        depth, width, *stride = name.removeprefix("wrn-").replace("-s", "-").split("-")
        return WideResNet(int(depth), int(width), classes, *map(int, stride))
    import timm  # here and below: slow to import, and the two names above need neither
    import torchvision

    if name in torchvision.models.list_models(module=torchvision.models):
        # GoogLeNet and Inception would return a second output beside the logits.
        options = {"aux_logits": False} if name in ("googlenet", "inception_v3") else {}
        model: nn.Module = torchvision.models.get_model(
            name, weights=None, num_classes=classes, **options
        )
        return model
    if timm.is_model(name):
        return timm.create_model(name, pretrained=False, num_classes=classes)
    raise ValueError(
        f"build_model, name: expected vgg9, wrn-DEPTH-WIDTH or a torchvision or timm name; got "
        f"{name!r}. List them with torchvision.models.list_models() and timm.list_models()."
    )

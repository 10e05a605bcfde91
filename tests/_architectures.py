"""The paper's networks for small images, narrowed: the shapes and names are what counts."""

from torch import nn


class WRNBlock(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(width_in), nn.BatchNorm2d(width)
        self.relu1, self.relu2 = nn.ReLU(inplace=True), nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        same = width_in == width and stride == 1
        self.shortcut = None if same else nn.Conv2d(width_in, width, 1, stride, bias=False)

    def forward(self, x):
        y = self.relu1(self.bn1(x))
        skip = x if self.shortcut is None else self.shortcut(y)
        return skip + self.conv2(self.relu2(self.bn2(self.conv1(y))))


class WRN(nn.Module):
    """WRN-depth-width, a quarter as wide."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        widths = [4, 4 * width, 8 * width, 16 * width]
        self.conv = nn.Conv2d(3, 4, 3, 1, 1, bias=False)
        groups = []
        for i in range(3):
            first = WRNBlock(widths[i], widths[i + 1], 1 if i == 0 else 2)
            more = [WRNBlock(widths[i + 1], widths[i + 1], 1) for _ in range((depth - 4) // 6 - 1)]
            groups.append(nn.Sequential(first, *more))
        self.group1, self.group2, self.group3 = groups
        self.bn, self.relu = nn.BatchNorm2d(widths[3]), nn.ReLU(inplace=True)
        self.fc = nn.Linear(widths[3], 10)

    def forward(self, x):
        x = self.group3(self.group2(self.group1(self.conv(x))))
        return self.fc(self.relu(self.bn(x)).mean((2, 3)))


class VGG9(nn.Module):
    """Eight convolutions in five groups, a max-pooling after each, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        features: list[nn.Module] = []
        channels = 3
        for width, count in ((4, 1), (8, 1), (8, 2), (16, 2), (16, 2)):
            for _ in range(count):
                features += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
                channels = width
            features.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*features)
        self.classifier = nn.Linear(16, 10)

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))

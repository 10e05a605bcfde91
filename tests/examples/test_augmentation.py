import pytest
import torch
from torch import Tensor

pytest.importorskip("torchvision", reason="needs the examples extra")
pytest.importorskip("timm", reason="needs the examples extra")

from paper.datasets import augmentation
from paper.datasets.augmentation import AUGMENTATIONS, cuts
from paper.datasets.small_image_loaders import small_image_loaders
from paper.datasets.small_images import FORMATS, Images, SmallImages
from paper.settings import Settings

CLIP_ART = FORMATS["openclipart"]
SIZE = CLIP_ART.size


def ramps(count: int) -> Tensor:
    """Images whose first channel is where a pixel is from left to right, the second from above."""
    line = (torch.arange(SIZE) + 0.5) * 200 / SIZE
    down, right = torch.meshgrid(line, line, indexing="ij")
    return torch.stack([right, down, torch.zeros_like(down)]).expand(count, -1, -1, -1)


def test_a_cut_is_an_upright_part_of_the_image_of_the_promised_size_and_shape(monkeypatch):
    monkeypatch.setattr(augmentation, "_recolored", lambda pixels: pixels)
    torch.manual_seed(0)
    cut = cuts(ramps(500), CLIP_ART) / 200
    inside = cut[:, :2, 1:-1, 1:-1]  # at the border the middle of a pixel may be beyond the image
    assert inside.min() > 0
    assert inside.max() < 1
    steps = inside[:, 0, 0, :].diff().mean(1), inside[:, 1, :, 0].diff().mean(1)
    even = steps[0][:, None].expand(-1, SIZE - 3)  # nothing of what is beyond the image
    torch.testing.assert_close(inside[:, 0, 0, :].diff(), even, atol=1e-5, rtol=1e-3)
    width, height = steps[0].abs() * SIZE, steps[1] * SIZE
    assert (height > 0).all()  # never upside down
    assert 0.4 < (steps[0] < 0).float().mean() < 0.6  # half of them mirrored
    assert 0.29 < (width * height).min() < 0.35
    assert (width * height).max() > 0.9
    assert 0.74 < (width / height).min() < 0.78
    assert 1.28 < (width / height).max() < 1.35
    torch.testing.assert_close(inside[:, 0], inside[:, 0, :1].expand_as(inside[:, 0]))  # not turned


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_what_is_augmented_has_the_memory_format_of_what_is_not(name):
    assert AUGMENTATIONS[name](ramps(4).byte(), CLIP_ART).is_contiguous()


def test_colors_change_by_up_to_two_fifths_and_gray_stays_gray():
    torch.manual_seed(0)

    def found(pixels: Tensor) -> Tensor:
        return augmentation._recolored(pixels.expand(1000, 3, 2, 2))

    halves = torch.tensor([100.0, 150.0]).view(1, 1, 1, 2)
    gray = found(halves)
    torch.testing.assert_close(gray[:, 0], gray[:, 2])
    brightness = gray.mean((1, 2, 3)) / 125
    contrast = gray[:, 0, 0].diff()[:, 0] / (brightness * 50)
    # Channels are farther from each other by contrast and by saturation.
    channels = found(torch.tensor([140.0, 125.0, 110.0]).view(1, 3, 1, 1))[:, :, 0, 0]
    colorful = (channels[:, 0] - channels[:, 2]) / 30 / (channels.mean(1) / 125)
    for factors, power in ((brightness, 1), (contrast, 1), (colorful, 2)):
        assert 0.6**power <= factors.min() + 1e-4 < 0.65**power
        assert 1.35**power < factors.max() - 1e-4 <= 1.4**power
    red = found(torch.tensor([255.0, 0.0, 0.0]).view(1, 3, 1, 1))
    assert red.min() >= 0
    assert red.max() <= 255


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_the_settings_choose_what_is_done_to_the_images_for_training_alone(monkeypatch, name):
    monkeypatch.setitem(AUGMENTATIONS, name, lambda pixels, form: torch.full_like(pixels, 7))
    images = Images(torch.zeros(42, 3, 8, 8, dtype=torch.uint8), torch.arange(42) % 21)
    data = SmallImages(images, images, CLIP_ART, torch.zeros(3), torch.ones(3))
    settings = Settings("student", augmentation=name, images_per_class=2)
    loaders = small_image_loaders(settings, data, torch.device("cpu"))
    seen = [next(iter(part))[0].unique().tolist() for part in loaders[:3]]
    assert seen == [[7.0], [0.0], [0.0]]

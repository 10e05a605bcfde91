from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch

pytest.importorskip("torchvision", reason="needs the examples extra")
pytest.importorskip("timm", reason="needs the examples extra")

from paper.datasets.clip_art import FOLDERS
from paper.datasets.small_image_loaders import Batches, small_image_loaders
from paper.datasets.small_images import read_small_images
from paper.settings import Settings
from paper.weights import IMAGENET_MEAN, IMAGENET_STD
from PIL import Image

CPU = torch.device("cpu")
RED = torch.tensor([200, 0, 0]).view(3, 1, 1)


def write(root: Path, each: int = 4) -> Path:
    for label, folder in enumerate(FOLDERS):
        (root / folder / "deeper").mkdir(parents=True)
        for index in range(each):  # no two alike: twins are left out
            picture = Image.new("RGBA", (20 + label, 80 + index), (0, 0, 0, 0))
            picture.paste((200, 0, 0, 255), (2, 2, 10 + label, 60 + index))
            picture.save(root / folder / ("deeper" if index else ".") / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def clip_art(tmp_path_factory):
    root, work = write(tmp_path_factory.mktemp("png")), tmp_path_factory.mktemp("work")
    return read_small_images("openclipart", root, work=work)


def test_pictures_lie_whole_and_on_white_in_a_square(clip_art):
    assert clip_art.train.pixels.shape == (3 * 21, 3, 64, 64)
    assert clip_art.test.pixels.shape == (21, 3, 64, 64)
    assert torch.equal(clip_art.train.labels.bincount(), torch.full((21,), 3))
    pixels = clip_art.train.pixels
    assert (pixels[:, :, :, [0, -1]] == 255).all()  # beside the picture, which is high
    assert (pixels[:, :, -1] >= 250).all()  # transparent
    assert ((pixels.int() - RED).abs().amax(1) < 5).flatten(1).any(1).all()


def test_workers_that_start_together_read_the_same(tmp_path, clip_art):
    root = write(tmp_path / "png")
    start = Barrier(4)

    def read(_):
        start.wait()
        return read_small_images("openclipart", root, work=tmp_path / "work")

    with ThreadPoolExecutor(4) as pool:
        for data in pool.map(read, range(4)):
            assert torch.equal(data.train.pixels, clip_art.train.pixels)


def test_a_folder_of_work_follows_the_pictures(tmp_path):
    for name, each in (("one", 4), ("two", 5)):
        data = read_small_images("openclipart", write(tmp_path / name, each), work=tmp_path / "w")
        assert len(data.train.labels) + len(data.test.labels) == 21 * each


def test_images_are_normalized_as_the_published_weights_want_it(clip_art):
    batch, _ = Batches(clip_art.test, clip_art, augmented=False, device=CPU).__getitems__([0])
    white = (1 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    torch.testing.assert_close(batch[0, :, 0, 0], white)
    settings = Settings("finetuned", student="tf_efficientnet_lite0", images_per_class=3)
    images, _ = next(iter(small_image_loaders(settings, clip_art, CPU).test))
    torch.testing.assert_close(images[0, :, 0, 0], torch.ones(3))  # -1 to 1, as timm says


def test_shifted_pictures_have_white_beside_them(clip_art):
    torch.manual_seed(0)
    batches = Batches(clip_art.test, clip_art, augmented=True, device=CPU)
    images, _ = batches.__getitems__([0] * 50)
    white = ((1 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)).view(3, 1)
    torch.testing.assert_close(images[:, :, :, 0], white.expand(50, 3, 64))
    tops = (images[:, 1] < 0).flatten(2).any(2).int().argmax(1)  # the first row with red
    assert tops.min() + 8 < tops.max() <= tops.min() + 16


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"animals/birds: .*Fetch .* openclipart-png"):
        read_small_images("openclipart", tmp_path)

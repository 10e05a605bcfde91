import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate", reason="needs the examples extra")
pytest.importorskip("torchvision", reason="needs the examples extra")
pytest.importorskip("sklearn", reason="needs the examples extra")

import cifar
from _idx import FILES, write_idx, write_miniature
from accelerate.state import AcceleratorState
from paper.datasets.small_image_loaders import Batches, small_image_loaders
from paper.datasets.small_images import FORMATS, Images, SmallImages, read_small_images
from paper.methods import Layers, matching_layers, pairs_of
from paper.models import build_model
from paper.settings import Settings

from vid_loss import Distiller
from vid_loss.subsets import labeled_cross_entropy

CPU = torch.device("cpu")


@pytest.fixture
def fashion(tmp_path):
    write_miniature(tmp_path)
    return read_small_images("fashion-mnist", tmp_path)


@pytest.mark.parametrize("place", [".", "FashionMNIST/raw"])
@pytest.mark.parametrize("suffix", [".gz", ""])
def test_idx_files_are_read_where_they_lie(tmp_path, place, suffix):
    pixels, labels = write_miniature(tmp_path / place, suffix=suffix)
    data = read_small_images("fashion-mnist", tmp_path)
    assert torch.equal(data.train.pixels, pixels.byte().unsqueeze(1))
    assert torch.equal(data.train.labels, labels)
    torch.testing.assert_close(data.mean, pixels.float().mean().reshape(1))
    assert not torch.equal(data.test.pixels, data.train.pixels)


@pytest.mark.parametrize("name", [name for name, x in FORMATS.items() if x.archive])
def test_without_the_data_it_says_what_to_fetch_and_where_it_goes(tmp_path, name):
    source = re.sub(r"-\d+$", "", name)  # clip art has several sizes
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}.*expected {source}.*Fetch .*--data"):
        read_small_images(name, tmp_path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize("suffix", [".gz", ""])
@pytest.mark.parametrize("name", FILES)
def test_a_truncated_idx_file_is_named(tmp_path, name, suffix):
    write_miniature(tmp_path, suffix=suffix)
    cut(tmp_path / f"{name}{suffix}")
    with pytest.raises(ValueError, match=rf"{name}.*Fetch the file"):
        read_small_images("fashion-mnist", tmp_path)


def test_other_damage_of_idx_files_is_named(tmp_path):
    write_miniature(tmp_path)
    labels = tmp_path / "train-labels-idx1-ubyte.gz"
    write_idx(labels, torch.arange(100) % 11)
    with pytest.raises(ValueError, match=r"train-labels.*below 10; got 100 up to 10"):
        read_small_images("fashion-mnist", tmp_path)
    write_idx(labels, torch.zeros(99, dtype=torch.long))
    with pytest.raises(ValueError, match=r"train-labels.*expected 100 labels.*got 99"):
        read_small_images("fashion-mnist", tmp_path)
    labels.unlink()
    with pytest.raises(FileNotFoundError, match=r"train-labels-idx1-ubyte: .* got neither"):
        read_small_images("fashion-mnist", tmp_path)


def test_damaged_cifar_files_are_named(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(ValueError, match=r"cifar-10-batches-py: .* damaged ones"):
        read_small_images("cifar10", tmp_path)


def test_crops_are_windows_of_the_padded_image_and_flips_mirror_it():
    torch.manual_seed(0)
    image = torch.arange(1, 65, dtype=torch.uint8).reshape(1, 1, 8, 8)
    images = Images(image.expand(200, 1, 8, 8).contiguous(), torch.zeros(200, dtype=torch.long))
    seen = {}
    for name in ("fashion-mnist", "mnist"):
        data = SmallImages(images, images, FORMATS[name], torch.zeros(1), torch.ones(1))
        batch, _ = Batches(images, data, augmented=True, device=CPU).__getitems__(range(200))
        seen[name] = {tuple(x[0].flatten().int().tolist()) for x in batch}
    windows = [
        {
            tuple(padded[top : top + 8, left : left + 8].flatten().tolist())
            for top in range(9)
            for left in range(9)
        }
        for padded in (
            torch.nn.functional.pad(x[0, 0].int(), [4] * 4) for x in (image, image.flip(3))
        )
    ]
    assert seen["mnist"] <= windows[0]
    assert len(seen["mnist"]) > 50  # of 81
    assert seen["fashion-mnist"] <= windows[0] | windows[1]
    assert seen["fashion-mnist"] & windows[0]
    assert seen["fashion-mnist"] & windows[1]


def test_images_that_are_not_augmented_are_normalized_in_three_equal_channels(fashion):
    batches = Batches(fashion.train, fashion, augmented=False, device=CPU)
    images, labels = batches.__getitems__(range(len(batches)))
    assert images.shape == (100, 3, 28, 28)
    assert torch.equal(images[:, 0], images[:, 2])
    assert torch.equal(labels, fashion.train.labels)
    std, mean = torch.std_mean(images[:, 0])
    torch.testing.assert_close(torch.stack([mean, std]), torch.tensor([0.0, 1.0]))


def test_an_epoch_has_the_steps_asked_for_and_sees_each_image_equally_often(fashion):
    settings = Settings("student", images_per_class=5, steps_per_epoch=6, batch_size=20)
    batches = list(small_image_loaders(settings, fashion, CPU).train)  # 40 images, thrice
    assert [len(labels) for _, labels in batches] == [20] * 6
    labels = torch.cat([labels for _, labels in batches])
    assert torch.equal(labels.bincount(), torch.full((10,), 12))


def test_labels_per_class_hides_labels_from_the_task_and_not_from_the_transfer(fashion):
    settings = Settings("mi", images_per_class=8, labels_per_class=5, batch_size=100)
    loaders = small_image_loaders(settings, fashion, CPU)
    images, labels = next(iter(loaders.train))
    assert len(images) == 10 * (8 - 1)  # one of the five labeled images validates
    assert torch.equal(labels[labels >= 0].bincount(), torch.full((10,), 4))
    student, teacher = build_model("wrn-10-1", 10), build_model("wrn-10-1", 10)
    pairs = pairs_of("mi", matching_layers("wrn-10-1", "wrn-10-1"))
    distiller = Distiller(student, teacher, pairs, example=images[:2])
    unlabeled = images[labels < 0]
    logits = student(unlabeled)
    assert labeled_cross_entropy(logits, labels[labels < 0]) == 0
    distiller(unlabeled).backward()
    assert student.stem.weight.grad.abs().sum() > 0


def test_half_of_what_is_drawn_has_a_label_and_every_labeled_image_as_often(fashion):
    settings = Settings("mi", images_per_class=10, labels_per_class=3, batch_size=200)
    _, labels = next(iter(small_image_loaders(settings, fashion, CPU).train))
    labeled = labels[labels >= 0]
    assert len(labels) - len(labeled) == 10 * (10 - 3)
    assert torch.equal(labeled.bincount(), torch.full((10,), 2 * 4))  # 20 of them, 70 without


def test_validation_images_are_the_same_with_and_without_unlabeled_ones(fashion):
    few = small_image_loaders(Settings("mi", images_per_class=5), fashion, CPU)
    many = small_image_loaders(Settings("mi", labels_per_class=5), fashion, CPU)
    held_out = many.validation.dataset.pixels
    assert torch.equal(few.validation.dataset.pixels, held_out)
    trained = {tuple(x.flatten().tolist()) for x in many.train.dataset.pixels}
    assert len(trained) == 100 - len(held_out)
    assert not trained & {tuple(x.flatten().tolist()) for x in held_out}


def test_more_images_validate_and_those_for_training_stay_as_they_are(fashion):
    few = Settings("mi", images_per_class=5)
    many = replace(few, held_out_images=50)
    loaders = [small_image_loaders(settings, fashion, CPU) for settings in (few, many)]
    trained = [x.train.dataset.pixels for x in loaders]
    assert torch.equal(*trained)
    assert [len(x.validation.dataset) for x in loaders] == [10, 50]
    held_out = {tuple(x.flatten().tolist()) for x in loaders[1].validation.dataset.pixels}
    assert not held_out & {tuple(x.flatten().tolist()) for x in trained[1]}


def test_no_unlabeled_image_validates(fashion):
    settings = Settings("mi", images_per_class=8, labels_per_class=5, held_out_images=1000)
    loaders = small_image_loaders(settings, fashion, CPU)
    used = {tuple(x.flatten().tolist()) for x in loaders.train.dataset.pixels}
    held_out = {tuple(x.flatten().tolist()) for x in loaders.validation.dataset.pixels}
    assert not used & held_out
    assert len(held_out) == 100 - len(used) == 30


def test_temperature_and_hint_reach_their_terms():
    layers = Layers((("a", "b"), ("c", "d"), ("e", "f")), ("fc", "head"))
    kd, fitnet = pairs_of("kd+fitnet", layers, temperature=10.0, hint=2)
    assert kd.loss.temperature == 10.0
    assert (fitnet.student, fitnet.teacher) == ("e", "f")
    with pytest.raises(ValueError, match=r"hint: expected one of 3 stages.* got 3"):
        pairs_of("fitnet", layers, hint=3)


def test_a_stem_of_stride_2_halves_the_maps():
    images = torch.zeros(2, 3, 28, 28)
    assert build_model("wrn-10-1-s2", 10).stem(images).shape == (2, 16, 14, 14)
    assert build_model("wrn-10-1", 10).stem(images).shape == (2, 16, 28, 28)


def run(monkeypatch, *arguments: str) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    small = ("--teacher", "wrn-10-1-s2", "--student", "wrn-10-1-s2", "--epochs", "1")
    small += ("--batch-size", "20", "--dataset", "fashion-mnist")
    monkeypatch.setattr(sys, "argv", ["cifar.py", *small, *arguments])
    AcceleratorState._reset_state(reset_partial_state=True)
    cifar.main()


def test_the_program_trains_a_teacher_and_a_student_of_it(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"data: expected fashion-mnist.*Fetch"):
        run(monkeypatch)
    write_miniature(tmp_path / "data")
    with pytest.raises(SystemExit, match=r"teacher/best.safetensors.*expected a file; got none"):
        run(monkeypatch)
    run(monkeypatch, "--train-teacher")
    run(monkeypatch, "--method", "kd+mi", "--labels-per-class", "5", "--weights-of", "mi=3")
    printed = capsys.readouterr().out
    assert "student, wrn-10-1-s2, seed 0" in printed
    assert "kd+mi, wrn-10-1-s2, seed 0" in printed
    assert printed.count("of 100 test images") == 2
    assert Path("runs/fashion-mnist/wrn-10-1-s2-kd+mi-all-5-labels-seed0").is_dir()

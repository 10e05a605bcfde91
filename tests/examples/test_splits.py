import pytest
import torch

pytest.importorskip("torchvision", reason="needs the examples extra")

from paper.datasets.splits import train_and_validation


def test_a_fifth_of_each_class_is_held_out():
    labels = [i % 4 for i in range(100)]
    train, validation = train_and_validation(labels, 10, seed=0)
    assert not set(train) & set(validation)
    assert torch.bincount(torch.tensor([labels[i] for i in train])).tolist() == [8] * 4
    assert torch.bincount(torch.tensor([labels[i] for i in validation])).tolist() == [2] * 4
    everything = train_and_validation(labels, None, seed=0)
    assert sorted(everything[0] + everything[1]) == list(range(100))


def test_the_split_is_the_seed_s():
    labels = [i % 4 for i in range(100)]
    assert train_and_validation(labels, 5, seed=1) == train_and_validation(labels, 5, seed=1)
    assert train_and_validation(labels, 5, seed=1) != train_and_validation(labels, 5, seed=2)


def test_one_image_per_class_cannot_be_split():
    with pytest.raises(ValueError, match="expected two images of class 0"):
        train_and_validation([0, 1], 1, seed=0)

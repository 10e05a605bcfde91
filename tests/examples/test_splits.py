import pytest
import torch

pytest.importorskip("torchvision", reason="needs the examples extra")

from paper.datasets.splits import train_and_validation, with_undrawn


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


def test_images_that_nobody_is_given_validate_too_as_many_of_each_class():
    labels = [i % 4 for i in range(100)]
    train, held_out = train_and_validation(labels, 10, seed=0)
    validation = with_undrawn(labels, held_out, train, 40, seed=0)
    assert set(held_out) < set(validation)
    assert not set(train) & set(validation)
    assert torch.bincount(torch.tensor([labels[i] for i in validation])).tolist() == [10] * 4
    assert validation == sorted(set(validation))
    assert validation == with_undrawn(labels, held_out, train, 40, seed=0)
    assert validation != with_undrawn(labels, held_out, train, 40, seed=1)


def test_no_more_validate_than_there_are_and_no_fewer_than_are_held_out():
    labels = [i % 4 for i in range(100)]
    train, held_out = train_and_validation(labels, 10, seed=0)
    assert len(with_undrawn(labels, held_out, train, 1000, seed=0)) == 100 - len(train)
    assert with_undrawn(labels, held_out, train, 4, seed=0) == held_out

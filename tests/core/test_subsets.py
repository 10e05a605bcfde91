import pytest
import torch
import torch.nn.functional as F

from vid_loss.subsets import (
    IGNORE_INDEX,
    images_per_class,
    labeled_cross_entropy,
    labels_per_class,
)

LABELS = torch.tensor([3, 0, 1] * 20 + [0] * 30)


@pytest.mark.parametrize("labels", [LABELS, LABELS.tolist()], ids=["tensor", "list"])
def test_draws_n_of_every_class_once_each(labels):
    drawn = images_per_class(labels, 7, seed=0)
    assert drawn == sorted(set(drawn))
    assert torch.bincount(LABELS[drawn]).tolist() == [7, 7, 0, 7]


def test_a_number_may_be_a_tensor_s_or_numpys():
    for n in (torch.tensor(7), torch.tensor(7).numpy()[()]):
        assert images_per_class(LABELS, n, seed=0) == images_per_class(LABELS, 7, seed=0)


def test_the_seed_decides_and_nothing_else_is_touched():
    state = torch.get_rng_state()
    first = images_per_class(LABELS, 7, seed=0)
    assert first == images_per_class(LABELS, 7, seed=0)
    assert first != images_per_class(LABELS, 7, seed=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_smaller_draw_is_part_of_a_larger_one():
    assert set(images_per_class(LABELS, 3, seed=0)) < set(images_per_class(LABELS, 9, seed=0))


def test_unlabeled_samples_are_never_drawn():
    labels = LABELS.clone()
    labels[:30] = IGNORE_INDEX
    assert min(images_per_class(labels, 5, seed=0)) >= 30


def test_hides_all_labels_but_n_of_each_class():
    hidden = labels_per_class(LABELS, 4, seed=0)
    kept = hidden != IGNORE_INDEX
    assert torch.equal(hidden[kept], LABELS[kept])
    assert torch.bincount(hidden[kept]).tolist() == [4, 4, 0, 4]
    assert kept.nonzero().flatten().tolist() == images_per_class(LABELS, 4, seed=0)


@pytest.mark.parametrize(
    ("labels", "n", "message"),
    [
        (LABELS, 21, "expected 21 samples of class 1; got 20"),
        (LABELS, 0, "n: expected 1 or more a class; got 0"),
        (LABELS, 1.5, "n: expected 1 or more a class; got 1.5"),
        (torch.zeros(2, 2).long(), 1, r"one class a sample; got shape \(2, 2\)"),
    ],
)
def test_too_few_is_refused(labels, n, message):
    for draw in (images_per_class, labels_per_class):
        with pytest.raises(ValueError, match=message):
            draw(labels, n, seed=0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.bool])
def test_labels_of_any_whole_type_are_hidden_as_what_cross_entropy_leaves_out(dtype):
    labels = torch.tensor([1, 0, 1, 1, 0]).to(dtype)
    hidden = labels_per_class(labels, 1, seed=0)
    assert sorted(hidden.tolist()) == [-100, -100, -100, 0, 1]
    logits = torch.randn(5, 2)
    kept = hidden >= 0
    torch.testing.assert_close(
        F.cross_entropy(logits, hidden), F.cross_entropy(logits[kept], labels[kept].long())
    )
    assert labels.tolist() == [1, 0, 1, 1, 0]  # a copy


@pytest.mark.parametrize("ignore_index", [0, 255, None, -100.0])
def test_a_hidden_label_is_no_class(ignore_index):
    with pytest.raises(ValueError, match="ignore_index: expected a negative whole number"):
        labels_per_class(LABELS, 1, seed=0, ignore_index=ignore_index)


@pytest.mark.parametrize("labels", [LABELS.float(), [0.0, 1.0], ["cat", "dog"]])
def test_labels_that_are_no_numbers_of_classes_are_refused(labels):
    for draw in (images_per_class, labels_per_class):
        with pytest.raises(TypeError, match=f"^{draw.__name__}, labels: expected the number of"):
            draw(labels, 1, seed=0)


def test_no_labels_are_none_of_each_class():
    assert images_per_class([], 3, seed=0) == []


def test_the_task_loss_is_cross_entropy_over_the_labeled():
    logits, labels = torch.randn(6, 3), torch.tensor([0, IGNORE_INDEX, 2, 1, IGNORE_INDEX, 0])
    kept = labels >= 0
    torch.testing.assert_close(
        labeled_cross_entropy(logits, labels), F.cross_entropy(logits[kept], labels[kept])
    )


def test_the_task_loss_of_a_batch_without_labels_is_zero_with_a_gradient():
    logits = torch.randn(4, 3, requires_grad=True)
    loss = labeled_cross_entropy(logits, torch.full((4,), IGNORE_INDEX))
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()

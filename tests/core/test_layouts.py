import pytest
import torch

from vid_loss.losses.layouts import align, channels_of, kind_of, to_layout


@pytest.mark.parametrize(
    ("shape", "kind", "channels"),
    [
        ((2, 5), "vector", 5),
        ((2, 7, 5), "tokens", 5),
        ((2, 5, 3, 4), "map", 5),
        ((2, 5, 2, 3, 4), "map", 5),
    ],
)
def test_kind_and_channels_follow_from_the_shape(shape, kind, channels):
    assert kind_of(shape) == kind
    assert channels_of(shape) == channels


@pytest.mark.parametrize(
    ("shape", "channel_dim", "expected"),
    [
        ((2, 5), None, (2, 5)),
        ((2, 7, 5), None, (2, 7, 5)),
        ((2, 7, 5), -1, (2, 7, 5)),
        ((2, 7, 5), 2, (2, 7, 5)),
        ((2, 5, 7), 1, (2, 5, 1, 7)),
        ((2, 5, 3, 4), None, (2, 5, 3, 4)),
        ((2, 3, 4, 5), -1, (2, 5, 3, 4)),
        ((2, 3, 4, 5), 3, (2, 5, 3, 4)),
        ((2, 3, 3, 5), 1, (2, 3, 3, 5)),
        ((2, 9, 3, 4, 5), -1, (2, 5, 9, 3, 4)),
    ],
)
def test_layout_moves_the_channels_without_a_copy(shape, channel_dim, expected):
    feature = torch.randn(shape)
    moved = to_layout(feature, channel_dim)
    assert moved.shape == expected
    assert moved.data_ptr() == feature.data_ptr()


@pytest.mark.parametrize(
    ("shape", "channel_dim", "message"),
    [
        ((5,), None, r"expected a feature .* got shape \(5,\)"),
        ((2, 5, 3, 4), 0, "expected channel_dim to name a dimension after the batch; got 0"),
        ((2, 5, 3, 4), 4, "got 4 for shape"),
        ((2, 5, 3, 4), -4, "got -4 for shape"),
    ],
)
def test_layout_refuses_what_it_cannot_place(shape, channel_dim, message):
    with pytest.raises(ValueError, match=message):
        to_layout(torch.randn(shape), channel_dim)


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        ((2, 3, 8, 8), (2, 4, 4, 4), (4, 4)),
        ((2, 3, 4, 4), (2, 4, 8, 8), (4, 4)),
        ((2, 3, 4, 9), (2, 4, 8, 6), (4, 6)),  # height and width each on its own
        ((2, 3, 4, 4), (2, 4, 4, 8), (4, 4)),  # equal heights do not hide unequal widths
    ],
)
def test_maps_are_pooled_to_the_smaller_side_each_on_its_own(student, teacher, expected):
    student, teacher = torch.randn(student), torch.randn(teacher)
    aligned = align(student, teacher)
    for pooled, original in zip(aligned, (student, teacher), strict=True):
        assert pooled.shape[2:] == expected
        torch.testing.assert_close(
            pooled, torch.nn.functional.adaptive_avg_pool2d(original, expected)
        )


def test_maps_of_one_size_are_passed_through():
    student, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4)
    aligned = align(student, teacher)
    assert [x.data_ptr() for x in aligned] == [student.data_ptr(), teacher.data_ptr()]


def test_volumes_are_pooled_and_become_maps():
    student, teacher = align(torch.randn(2, 3, 4, 6, 6), torch.randn(2, 5, 2, 6, 3))
    assert student.shape == (2, 3, 2 * 6, 3)
    assert teacher.shape == (2, 5, 2 * 6, 3)


@pytest.mark.parametrize(
    ("student", "teacher", "mask", "error", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(3, 3), None, ValueError, "one batch size"),
        (
            torch.zeros(2, 3).long(),
            torch.zeros(2, 3),
            None,
            TypeError,
            "student feature; got torch.int64",
        ),
        (
            torch.zeros(2, 3),
            torch.zeros(2, 3).bool(),
            None,
            TypeError,
            "teacher feature; got torch.bool",
        ),
        (
            torch.zeros(2, 3, 4, 4),
            torch.zeros(2, 3),
            None,
            ValueError,
            r"one kind.*mean\(\(2, 3\)\)",
        ),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 16, 3), None, ValueError, r"flatten\(2\)\.mT"),
        (torch.zeros(2, 16, 3), torch.zeros(2, 3, 4, 4), None, ValueError, "unflatten"),
        (torch.zeros(2, 16, 3), torch.zeros(2, 3), None, ValueError, r"x\[:, 0\]"),
        (torch.zeros(2, 3), torch.zeros(2, 3, 4, 4), None, ValueError, "teacher_transform"),
        (torch.zeros(2, 3), torch.zeros(2, 4, 3), None, ValueError, "keeps its tokens"),
        (torch.zeros(2, 17, 3), torch.zeros(2, 16, 3), None, ValueError, "Drop a class token"),
        (
            torch.zeros(2, 4, 3),
            torch.zeros(2, 4, 3),
            torch.ones(2, 5),
            ValueError,
            r"\(2, 4\).*\(2, 5\)",
        ),
        (
            torch.zeros(2, 3),
            torch.zeros(2, 3),
            torch.ones(2, 3),
            ValueError,
            "no mask for a vector",
        ),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 2, 4, 4), None, ValueError, "maps of one rank"),
    ],
)
def test_features_that_do_not_fit_are_named(student, teacher, mask, error, message):
    with pytest.raises(error, match=message):
        align(student, teacher, mask)

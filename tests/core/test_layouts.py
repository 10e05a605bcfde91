import pytest
import torch

from vid_loss import ATLoss, FitNetLoss, Pair, VIDLoss
from vid_loss.losses.layouts import channels_of, kind_of, to_common_size, to_layout


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
    aligned = to_common_size(student, teacher)
    for pooled, original in zip(aligned, (student, teacher), strict=True):
        assert pooled.shape[2:] == expected
        torch.testing.assert_close(
            pooled, torch.nn.functional.adaptive_avg_pool2d(original, expected)
        )


def test_maps_of_one_size_are_passed_through():
    student, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4)
    aligned = to_common_size(student, teacher)
    assert [x.data_ptr() for x in aligned] == [student.data_ptr(), teacher.data_ptr()]


def test_volumes_are_pooled_and_become_maps():
    student, teacher = to_common_size(torch.randn(2, 3, 4, 6, 6), torch.randn(2, 5, 2, 6, 3))
    assert student.shape == (2, 3, 2 * 6, 3)
    assert teacher.shape == (2, 5, 2 * 6, 3)


def zeros(*shapes, dtype=torch.float32):
    return tuple(torch.zeros(shape, dtype=dtype) for shape in shapes)


# Two features, a mask, and what a loss of any kind says of them.
MISFITS = [
    (zeros((2, 3), (3, 3)), None, ValueError, r"one batch size; got \(2, 3\) from the student and"),
    (
        (torch.zeros(2, 3).long(), torch.zeros(2, 3)),
        None,
        TypeError,
        "floating-point tensor as the student's feature; got torch.int64",
    ),
    (
        (torch.zeros(2, 3), torch.zeros(2, 3).bool()),
        None,
        TypeError,
        "floating-point tensor as the teacher's feature; got torch.bool",
    ),
    ((None, torch.zeros(2, 3)), None, TypeError, "as the student's feature; got NoneType"),
    (
        zeros((2, 3, 4, 4), (2, 3)),
        None,
        ValueError,
        r"one layout; .*a map .* and a vector \(N, C\)",
    ),
    (zeros((2, 3), (2, 4, 3)), None, ValueError, r"one layout; .*a vector .* and tokens"),
    (zeros((2, 17, 3), (2, 16, 3)), None, ValueError, r"as many tokens of each; got \(2, 17, 3\)"),
    (
        zeros((2, 4, 3), (2, 4, 3)),
        torch.ones(2, 5),
        ValueError,
        r"mask: expected a mask of shape \(2, 4\); got shape \(2, 5\)",
    ),
    (
        zeros((2, 3), (2, 3)),
        torch.ones(2, 3),
        ValueError,
        "mask: expected none for a vector",
    ),
    (zeros((2, 3, 4, 4), (2, 3, 2, 4, 4)), None, ValueError, "maps with as many dimensions"),
]


@pytest.mark.parametrize(("features", "mask", "error", "message"), MISFITS)
def test_features_that_do_not_fit_are_named_by_every_loss(features, mask, error, message):
    shape = (2, 3) if features[0] is None else features[0].shape
    for build in (VIDLoss, FitNetLoss):
        with pytest.raises(error, match=f"{build.__name__}(: |, ).*{message}"):
            build(shape, shape).matched(*features, mask)


def test_a_loss_for_maps_refuses_others_whatever_the_mask():
    with pytest.raises(ValueError, match=r"ATLoss: expected a map \(N, C, H, W\); got tokens"):
        ATLoss().matched(*zeros((2, 4, 3), (2, 4, 3)), torch.ones(2, 4))


@pytest.mark.parametrize(
    ("student", "teacher", "advice"),
    [
        ((2, 3, 4, 4), (2, 3), r"student_transform=lambda x: x.mean\(\(2, 3\)\)"),
        ((2, 3, 4, 4), (2, 16, 3), r"flatten\(2\)\.mT"),
        ((2, 16, 3), (2, 3, 4, 4), "unflatten"),
        ((2, 16, 3), (2, 3), r"x\[:, 0\]"),
        ((2, 3), (2, 3, 4, 4), r"teacher_transform=lambda x: x.mean\(\(2, 3\)\)"),
        ((2, 3), (2, 4, 3), "keeps its tokens"),
        ((2, 17, 3), (2, 16, 3), "Drop a class token: student_transform"),
        ((2, 3, 4, 4), (2, 3, 2, 4, 4), "Pool the depth: teacher_transform"),
        ((2, 3), (3, 3), "the batch that the student has just seen"),
    ],
)
def test_a_pair_says_what_to_do_about_features_that_do_not_fit(student, teacher, advice):
    student, teacher = zeros(student, teacher)
    pair, loss = Pair("a", "b"), VIDLoss(student.shape, student.shape)
    with pytest.raises(ValueError, match=rf"Pair 'a' -> 'b', VIDLoss: expected .*{advice}"):
        pair.term(loss, student, teacher, None)

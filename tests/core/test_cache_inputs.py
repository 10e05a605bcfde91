import pytest
import torch
from _cache import Plain, ask, ask_often, build, loss, tokens
from _models import images

from vid_loss.cache import FeatureCache


@pytest.mark.parametrize("change", [lambda x: x.flip(-1), lambda x: x.roll(1, -1), lambda x: -x])
def test_augmented_inputs_are_noticed(tmp_path, change):
    student, _, distiller = build(FeatureCache(tmp_path))
    loss(student, distiller, images(), range(8))
    changed = images()
    changed[5] = change(changed[5])
    student(changed)
    with pytest.raises(ValueError, match=r"sample 5: expected the inputs .* random augmentation"):
        distiller(changed, sample_index=torch.arange(8))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"temperature": 1.0}, {"temperature": 1.001}),
        ({"temperature": torch.tensor(1.0)}, {"temperature": torch.tensor(2.0)}),
        ({"positions": torch.arange(5.0)}, {"positions": torch.arange(5.0) + 1e-3}),
        ({}, {"temperature": 1.0}),
    ],
    ids=["number", "tensor without dimensions", "shared tensor", "another argument"],
)
def test_any_argument_that_changes_is_noticed_at_once(tmp_path, before, after):
    cache, teacher = FeatureCache(tmp_path), Plain()
    for _ in range(3):
        ask(cache, teacher, tokens(), range(4), **before)
    with pytest.raises(ValueError, match=r"sample 0: expected the inputs .* the same values besid"):
        ask(cache, teacher, tokens(), range(4), **after)


@pytest.mark.parametrize("first", [3, 5], ids=["seen by its length", "asked of the teacher"])
@pytest.mark.parametrize("batch", [range(5), [5, 1, 6, 3, 0]], ids=["new", "old and new"])
def test_a_shared_argument_of_as_many_rows_is_not_taken_for_samples(tmp_path, first, batch):
    """Five samples of five tokens each, and the positions of five tokens."""
    cache, teacher = FeatureCache(tmp_path, dtype=torch.float32), Plain()
    x, positions = tokens(8), torch.arange(5.0)
    ask(cache, teacher, x[:first], range(first), positions=positions)
    for rows in (batch, [7, *batch[1:]], [2, 4, 6, 1, 7]):
        got = ask(cache, teacher, x[list(rows)], rows, positions=positions)
        torch.testing.assert_close(got, teacher(x[list(rows)], positions))
    got = ask(
        FeatureCache(tmp_path, dtype=torch.float32), teacher, x[:5], range(5), positions=positions
    )
    torch.testing.assert_close(got, teacher(x[:5], positions))


def test_an_argument_of_samples_beside_a_shared_one_of_the_same_length(tmp_path):
    cache, teacher = FeatureCache(tmp_path, dtype=torch.float32), Plain()
    x, weights, positions = tokens(8), torch.rand(8), torch.arange(5.0)
    for rows in (range(5), [5, 1, 6, 3, 0], [7, 2, 4, 6, 1]):
        rows = list(rows)
        arguments = {"positions": positions, "weights": weights[rows]}
        got = ask(cache, teacher, x[rows], rows, **arguments)
        torch.testing.assert_close(got, teacher(x[rows], **arguments))


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 0.0])
def test_a_nan_in_an_input_hides_nothing(tmp_path, value):
    cache, teacher = FeatureCache(tmp_path), Plain()
    teacher.act = lambda x: x.nan_to_num(0, 0, 0)
    x = tokens()
    x[:, 0, 0] = value
    for _ in range(3):
        ask(cache, teacher, x, range(4))
    with pytest.raises(ValueError, match="expected the inputs that its features were computed"):
        ask(cache, teacher, x.flip(1), range(4))


@pytest.mark.parametrize("epochs", [1, 5, 40])
def test_inputs_that_change_late_are_noticed_as_soon(tmp_path, epochs):
    cache, teacher = FeatureCache(tmp_path), Plain()
    x = tokens(32)
    for _ in range(epochs):
        for start in (0, 16):
            ask(cache, teacher, x[start : start + 16], range(start, start + 16))
    with pytest.raises(ValueError, match="expected the inputs that its features were computed"):
        ask(cache, teacher, x[:16] + 1e-6, range(16))


def test_one_sample_of_many_that_changes_is_noticed_in_some_epochs(tmp_path):
    cache, teacher = FeatureCache(tmp_path), Plain()
    x = tokens(32)
    ask(cache, teacher, x, range(32))
    ask(cache, teacher, x, range(32))
    x[9] += 1e-6
    with pytest.raises(ValueError, match="sample 9: expected the inputs"):
        ask_often(100, cache, teacher, x, range(32))


def test_a_teacher_that_changes_its_inputs_is_named(tmp_path):
    teacher = Plain()
    embed = teacher.embed.forward
    teacher.embed.forward = lambda x: embed(x.mul_(2))
    with pytest.raises(RuntimeError, match=r"Distiller, teacher: expected its inputs as they were"):
        ask(FeatureCache(tmp_path), teacher, tokens(), range(4))

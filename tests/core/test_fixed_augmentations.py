import pickle
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from _cache import Counted
from _models import cnn_pair, images
from torch.utils.data import DataLoader, Dataset, IterableDataset

from vid_loss import Distiller
from vid_loss.cache import FeatureCache, FixedAugmentations

DRAWS = {
    "torch": lambda: torch.rand(3),
    "python": lambda: torch.tensor([random.random(), random.gauss(0, 1)]),
    "numpy": lambda: torch.from_numpy(np.random.rand(3)),
    "all": lambda: torch.tensor([torch.rand(()), random.random(), np.random.rand()]),
}


def of_torchvision():
    v2 = pytest.importorskip("torchvision.transforms.v2")
    pixels = torch.arange(3 * 12 * 12, dtype=torch.uint8).reshape(3, 12, 12)
    crop = v2.Compose([v2.RandomCrop(8), v2.RandomHorizontalFlip(), v2.ColorJitter(0.5)])
    return crop(pixels).float()


class Rows(Dataset):
    """Rows that are drawn by one of the generators."""

    def __init__(self, draw="all", count=6):
        self.draw, self.count = draw, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        draw = of_torchvision if self.draw == "torchvision" else DRAWS[self.draw]
        return draw(), index


def states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


@pytest.mark.parametrize("draw", [*DRAWS, "torchvision"])
def test_a_view_is_always_the_same_and_no_other(draw):
    samples = FixedAugmentations(Rows(draw), views=4)
    found = {(i, view): samples.view(i, view) for i in range(6) for view in range(4)}
    random.random(), np.random.rand(), torch.rand(1)
    for (i, view), ((values, index), place) in reversed(found.items()):
        assert (index, place) == (i, 4 * i + view)
        (again, _), _ = FixedAugmentations(Rows(draw), views=4).view(i, view)
        assert torch.equal(values, again)
    assert len({tuple(values.flatten().tolist()) for (values, _), _ in found.values()}) == 24
    (other, _), _ = FixedAugmentations(Rows(draw), views=4, seed=1).view(0, 0)
    assert not torch.equal(other, found[0, 0][0][0])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_workers": 2, "persistent_workers": True},
        {"num_workers": 1, "multiprocessing_context": "spawn"},
    ],
    ids=["no worker", "persistent workers", "a spawned worker"],
)
def test_views_are_the_same_in_any_worker_and_all_come(options):
    samples = FixedAugmentations(Rows(), views=3)
    expected = {3 * i + view: samples.view(i, view) for i in range(6) for view in range(3)}
    loader = DataLoader(samples, batch_size=4, shuffle=True, **options)
    epochs = [
        {
            int(place): x
            for (values, _), places in loader
            for x, place in zip(values, places, strict=True)
        }
        for _ in range(2 if "multiprocessing_context" in options else 20)
    ]
    for epoch in epochs:
        assert sorted(place // 3 for place in epoch) == [*range(6)]
        assert all(torch.equal(x, expected[place][0][0]) for place, x in epoch.items())
    if len(epochs) > 2:
        assert set().union(*epochs) == set(range(18))


def test_generators_are_what_they_were_but_for_the_draw_of_a_view():
    samples = FixedAugmentations(Rows(), views=4)
    before = states()
    samples.view(3, 2)
    assert states() == before
    torch.manual_seed(0)
    torch.randint(4, ())
    after_one_draw = states()
    torch.manual_seed(0)
    _ = samples[3]
    assert states() == after_one_draw


def test_generators_are_what_they_were_when_a_row_raises():
    class Broken(Rows):
        def __getitem__(self, index):
            super().__getitem__(index)
            raise OSError("no such picture")

    before = states()
    with pytest.raises(OSError, match="no such picture"):
        FixedAugmentations(Broken(), views=4).view(0, 0)
    assert states() == before


def test_which_views_come_follows_from_the_seed_of_the_program():
    samples = FixedAugmentations(Rows(), views=8)

    def places(seed):
        torch.manual_seed(seed)
        return [place for _, place in samples]

    assert places(0) == places(0)
    assert places(0) != places(1)


def test_a_row_that_is_the_first_to_import_numpy_draws_from_its_seed():
    """numpy.random is imported when it is first named."""
    code = (
        "from vid_loss.cache import FixedAugmentations\n"
        "class Rows(list):\n"
        "    def __getitem__(self, index):\n"
        "        import numpy\n"
        "        return numpy.random.rand()\n"
        "samples = FixedAugmentations(Rows([0, 0]), views=2)\n"
        "assert samples.view(0, 0) == samples.view(0, 0)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_row_that_is_a_dict_gets_the_place_as_a_column():
    rows = [{"x": i} for i in range(3)]
    samples = FixedAugmentations(rows, views=4)
    assert samples.view(2, 3) == {"x": 2, "sample_index": 11}
    assert rows[2] == {"x": 2}


def test_it_is_indexed_like_a_list():
    samples = FixedAugmentations([10, 11, 12], views=1)
    assert [samples[-1], samples[torch.tensor(1)], samples[np.int64(0)]] == [
        (12, 2),
        (11, 1),
        (10, 0),
    ]
    assert [*samples] == [(10, 0), (11, 1), (12, 2)]
    assert len(samples) == 3
    assert pickle.loads(pickle.dumps(samples)).view(1, 0) == (11, 1)
    for index, view in ((3, 0), (-4, 0), (0, 1)):
        with pytest.raises(IndexError, match="out of range"):
            samples.view(index, view)


class Noisy(Dataset):
    """Pictures with noise, as augmentation that no index determines."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return images()[index] + torch.randn(())


def test_a_cache_serves_views_and_the_teacher_runs_once_for_each(tmp_path):
    student, teacher = cnn_pair()
    teacher = Counted(teacher.eval())
    pairs = {"stage1": "body.stage1"}
    cache = FeatureCache(tmp_path, dtype=torch.float32)
    cached = Distiller(student, teacher, pairs, example=images(), cache=cache)
    samples = FixedAugmentations(Noisy(), views=2)
    teacher.samples = 0
    for _ in range(20):
        for x, place in DataLoader(samples, batch_size=4, shuffle=True):
            kept = cached.teacher_features(x, sample_index=place)
            torch.testing.assert_close(kept["body.stage1"], teacher.body.stage1(x))
    assert teacher.samples <= 2 * 8 + 5  # and a few that are looked at again
    loader = DataLoader(FixedAugmentations(Noisy(), views=2, seed=1), batch_size=8)
    ((x, place),) = loader
    with pytest.raises(ValueError, match=r"expected the inputs .* in FixedAugmentations"):
        cached.teacher_features(x, sample_index=place)


class Stream(IterableDataset):
    def __len__(self):
        return 3

    def __iter__(self):
        return iter(range(3))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"dataset": iter([1])}, TypeError, "dataset: expected rows by index .* got list_iterator"),
        ({"dataset": Stream()}, TypeError, "dataset: expected rows by index .* got Stream"),
        ({"dataset": {"a": 1}}, TypeError, "dataset: expected rows by index .* got dict"),
        ({"dataset": DataLoader([1])}, TypeError, "dataset: expected rows .* got DataLoader"),
        ({"dataset": []}, ValueError, "dataset: expected samples; got none"),
        ({"views": 0}, ValueError, "views: expected at least 1; got 0"),
        ({"views": 2.0}, TypeError, "views: expected an integer; got 2.0. Write views=4"),
        ({"views": True}, TypeError, "views: expected an integer; got True"),
        ({"seed": None}, TypeError, "seed: expected an integer; got None. Write seed=0"),
    ],
)
def test_what_is_no_data_set_or_no_number_is_refused(arguments, error, words):
    given = {"dataset": [1], "views": 2} | arguments
    with pytest.raises(error, match=f"FixedAugmentations, {words}"):
        FixedAugmentations(given.pop("dataset"), **given)

"""Distillers that are built anew while training goes on."""

import copy
import warnings

import pytest
import torch
from _distillers import images, make, train

from vid_loss import Distiller, Pair, VIDLoss

ONE, OTHER = {"stage1": "stage1"}, {"stage2": "stage2"}


def added(distiller, optimizer):
    distiller.add_to(optimizer)


def by_hand(distiller, optimizer):
    optimizer.add_param_group({"params": distiller.parameters()})


def epochs(build, add, n=3, kind=torch.optim.Adam):
    """Trains a student for some epochs, with a distiller built in each; returns what was said."""
    student, teacher, _ = make()
    optimizer = kind(student.parameters(), lr=0.01)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        distiller = None
        for epoch in range(n):
            distiller = build(student, teacher, distiller, epoch)
            add(distiller, optimizer)
            train(student, distiller, optimizer, 3)
    return [str(x.message) for x in caught]


def anew(student, teacher, earlier, epoch):
    return Distiller(student, teacher, ONE | OTHER, example=images())


def closed_before(student, teacher, earlier, epoch):
    if earlier is not None:
        earlier.close()
    return anew(student, teacher, earlier, epoch)


def with_a_pair_more(student, teacher, earlier, epoch):
    return Distiller(student, teacher, ONE | OTHER if epoch else ONE, example=images())


@pytest.mark.parametrize("build", [anew, closed_before, with_a_pair_more])
@pytest.mark.parametrize("add", [added, by_hand])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD])
def test_heads_that_begin_anew_in_one_optimizer_are_noticed(build, add, kind):
    said = epochs(build, add, kind=kind)
    assert len(said) == 2  # in the second epoch and in the third
    assert all("expected to be built once, before the training loop" in x for x in said)


def kept(student, teacher, earlier, epoch):
    distiller = anew(student, teacher, earlier, epoch)
    if earlier is not None:
        distiller.load_state_dict(earlier.state_dict())
    return distiller


def other_pairs(student, teacher, earlier, epoch):
    return Distiller(student, teacher, [ONE, OTHER][epoch], example=images())


def test_heads_that_were_loaded_and_those_of_another_pair_are_not_spoken_of():
    assert epochs(kept, added) == []
    assert epochs(other_pairs, added, n=2) == []


def test_another_student_and_another_optimizer_are_not_spoken_of(recwarn):
    for _ in range(2):
        student, _, distiller = make()
        optimizer = torch.optim.Adam(student.parameters(), lr=0.01)
        distiller.add_to(optimizer)
        train(student, distiller, optimizer, 3)
    twin = copy.deepcopy(distiller)
    optimizer = torch.optim.Adam(twin.student.parameters(), lr=0.01)
    twin.add_to(optimizer)
    train(twin.student, twin, optimizer, 3)
    again = Distiller(student, twin.student, ONE, example=images())
    optimizer = torch.optim.Adam(student.parameters(), lr=0.01)
    again.add_to(optimizer)
    train(student, again, optimizer, 3)
    assert [str(x.message) for x in recwarn] == []


def test_two_students_in_one_optimizer_are_not_spoken_of(recwarn):
    first, second, _ = make()
    optimizer = torch.optim.Adam([*first.parameters(), *second.parameters()], lr=0.01)
    for student, teacher in ((first, second), (second, first)):
        distiller = Distiller(student, copy.deepcopy(teacher), ONE, example=images())
        distiller.add_to(optimizer)
        train(student, distiller, optimizer, 3)
    assert [str(x.message) for x in recwarn] == []


@pytest.mark.parametrize("turns", [True, False], ids=["together", "one after the other"])
def test_two_teachers_with_a_distiller_each_are_not_spoken_of(recwarn, turns):
    student, first, _ = make()
    optimizer = torch.optim.Adam(student.parameters(), lr=0.01)
    taught = [Distiller(student, x, ONE, example=images()) for x in (first, copy.deepcopy(first))]
    for distiller in taught:
        if turns:
            distiller.add_to(optimizer)
    for distiller in taught:
        if not turns:
            distiller.add_to(optimizer)
        train(student, distiller, optimizer, 3)
    assert [str(x.message) for x in recwarn] == []


def test_losses_that_are_the_users_and_stay_are_not_spoken_of(recwarn):
    student, teacher, _ = make()
    loss = VIDLoss((8, 8, 4, 4), (8, 16, 4, 4))
    optimizer = torch.optim.Adam([*student.parameters(), *loss.parameters()], lr=0.01)
    for _ in range(2):
        pairs = [Pair("stage2", "stage2", loss=loss)]
        train(student, Distiller(student, teacher, pairs, example=images()), optimizer, 3)
    assert [str(x.message) for x in recwarn] == []


def test_an_optimizer_is_not_kept_alive():
    import weakref

    student, _, distiller = make()
    optimizer = torch.optim.Adam(student.parameters(), lr=0.01)
    distiller.add_to(optimizer)
    train(student, distiller, optimizer, 3)
    alive = weakref.ref(optimizer)
    del optimizer
    assert alive() is None

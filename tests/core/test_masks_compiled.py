"""Masks of a pair's own in a compiled DistillationModel: eager values, compiled at most twice."""

import copy
from functools import partial

import pytest
import torch
from _masks import Frames, Towers, batch_of, build, mask_of
from _models import cnn_pair, images
from _versions import needs_messages_of_compiled_code
from torch._dynamo.testing import CompileCounterWithBackend

from vid_loss import DistillationModel, Distiller, FitNetLoss, Pair, VIDLoss


def towers(step):
    batch = batch_of(Towers)
    batch["attention_mask"] = mask_of(8, 1 + step, most=8)
    batch["pixel_mask"] = mask_of(8 - step, 3, most=8)
    return batch


def frames(step):
    batch = batch_of(Frames, 32)
    batch["attention_mask"] = mask_of(32, 8 + 4 * step, most=32)
    return batch


def of_frames(attention_mask, **_):
    return attention_mask[:, ::4]


NAMED = [Pair("text", "text"), Pair("image", "image", mask="pixel_mask", loss=FitNetLoss)]
CASES = {
    "by name": (Towers, NAMED, towers),
    "by a function": (Frames, [Pair("layer", "layer", mask=of_frames)], frames),
}


def both(model):
    """The model, and a compiled one with estimates of its own, that counts what it compiles."""
    counter = CompileCounterWithBackend("eager")
    torch.compiler.reset()
    twin = copy.deepcopy(model)
    return model, torch.compile(twin, backend=counter, fullgraph=True), twin, counter


def assert_the_same_step(eager, fast, twin, batch):
    results = []
    for model, called in ((eager, eager), (twin, fast)):
        model.zero_grad()
        value = called(**batch)[1]
        value.backward()
        results.append([value, *(p.grad for p in model.distiller.parameters())])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(("kind", "pairs", "batch"), CASES.values(), ids=CASES)
def test_a_mask_of_other_values_in_each_step_is_not_compiled_again(kind, pairs, batch):
    student, distiller = build(kind, pairs, **batch(0))
    eager, fast, twin, counter = both(DistillationModel(student, distiller))
    counts = []
    for step in range(5):
        assert_the_same_step(eager, fast, twin, batch(step))
        counts.append(counter.frame_count)
    assert counts == [1, *[counts[1]] * 4]  # the second may be another: estimates are there
    assert counts[-1] <= 2


def test_a_mask_of_a_map_that_the_call_is_given():
    student, teacher = cnn_pair()
    pair = Pair("stage2", "stage2", loss=partial(VIDLoss, norm="group"))
    distiller = Distiller(student, teacher, [pair], example=images())
    eager, fast, twin, counter = both(DistillationModel(student, distiller))
    for step in range(4):
        mask = torch.ones(8, 8, 8)
        mask[..., : 2 * step] = 0
        assert_the_same_step(eager, fast, twin, {"images": images(), "token_mask": mask})
    assert counter.frame_count <= 2


@needs_messages_of_compiled_code
def test_a_name_that_a_call_does_not_have_is_an_error_there_too():
    student, distiller = build(Towers, NAMED, **towers(0))
    _, fast, _, _ = both(DistillationModel(student, distiller))
    batch = towers(1)
    del batch["pixel_mask"]
    with pytest.raises(Exception, match="expected 'pixel_mask' among the keyword arguments"):
        fast(**batch)

"""What is recorded belongs to the call that records it, whoever runs the model meanwhile."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from _asserts import assert_same_state, state_of
from _models import TinyCNN, cnn_pair, images
from torch import nn

from vid_loss import Distiller, FeatureTap


@pytest.mark.parametrize("layer", ["stage2", "stage2:input", ""])
@pytest.mark.parametrize("moment", ["before", "amidst"])
def test_another_thread_on_the_same_model_is_not_read(layer, moment):
    _, teacher = cnn_pair()
    teacher.eval()
    reading, other = FeatureTap(teacher, [layer], record="read"), images() + 1
    expected = dict(reading.read(images()))
    done = threading.Event()
    start = threading.Event()

    def wait(*_):
        if threading.current_thread() is threading.main_thread():
            start.set()
            assert done.wait(10)

    def run():
        start.wait(10)
        teacher(other)
        done.set()

    module = teacher.stage1[0] if moment == "before" else teacher.fc
    module.register_forward_hook(wait)
    thread = threading.Thread(target=run)
    thread.start()
    found = reading.read(images())
    thread.join()
    assert torch.equal(found[layer], expected[layer])


def test_an_error_in_another_thread_loses_nothing():
    _, teacher = cnn_pair()
    teacher.eval()
    tap = FeatureTap(teacher, ["stage1"], record="read")
    expected = tap.read(images())["stage1"]

    def fail(*_):
        if threading.current_thread() is threading.main_thread():
            with ThreadPoolExecutor(1) as pool:
                assert pool.submit(teacher, torch.zeros(1)).exception() is not None

    teacher.fc.register_forward_hook(fail)
    assert torch.equal(tap.read(images())["stage1"], expected)


class Slow(TinyCNN):
    """Lets other threads in, and tells in its features whether it is in eval mode."""

    def __init__(self):
        super().__init__(8)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        time.sleep(1e-3)
        x = self.drop(self.stage1(x))
        time.sleep(1e-3)
        return self.fc(self.pool(self.stage2(x)).flatten(1))


@pytest.mark.parametrize("stop", [False, True])
def test_two_distillers_on_one_teacher_in_two_threads(stop):
    torch.manual_seed(0)
    teacher = Slow()  # in train mode, as it comes
    before, modes = state_of(teacher), [x.training for x in teacher.modules()]

    def study(seed):
        student = TinyCNN(4)
        distiller = Distiller(
            student, teacher, {"stage2": "stage2"}, example=images(), stop_teacher=stop
        )
        generator = torch.Generator().manual_seed(seed)
        batches = [torch.randn(4, 1, 8, 8, generator=generator) for _ in range(25)]
        return [(x, distiller.teacher_features(x)["stage2"]) for x in batches]

    with ThreadPoolExecutor(3) as pool:
        studies = list(pool.map(study, range(3)))
    assert_same_state(teacher, before)
    assert [x.training for x in teacher.modules()] == modes
    teacher.eval()
    for x, feature in (pair for found in studies for pair in found):
        assert torch.equal(teacher.stage2(teacher.stage1(x)), feature)

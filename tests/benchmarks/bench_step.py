"""A whole step against the student's own step and the teacher's forward."""

from functools import partial

import pytest
import torch
from _tasks import NETWORKS, TOKENS, Task, pairs
from torch.distributed._tools.mem_tracker import MemTracker

from vid_loss.cache import FeatureCache

WHICH = ("mi-l", "last-stage", "all-stages", "quarter", "ninth", "heads-alone")
ROUNDS = {"wrn": 100, "resnet": 20, "vit": 40, "bert": 20}


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("network", NETWORKS)
def bench_step_over_floor(compare, network, which):
    task = Task(network, pairs(network, which))
    compare(task.step, task.floor, rounds=ROUNDS[network])


@pytest.mark.parametrize("which", ["last-stage", "all-stages", "quarter", "heads-alone"])
@pytest.mark.parametrize("network", TOKENS)
def bench_step_of_tokens_over_floor(compare, network, which):
    task = Task(network, pairs(network, which))
    compare(task.step, task.floor, rounds=ROUNDS[network])


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("network", NETWORKS)
def bench_three_lines_over_floor(compare, network, which):
    task = Task(network, pairs(network, which))
    compare(task.three_lines, task.floor, rounds=ROUNDS[network])


@pytest.mark.parametrize("which", ["all-stages", "quarter"])
@pytest.mark.parametrize("network", [*NETWORKS, *TOKENS])
def bench_step_in_bfloat16_over_its_floor(compare, network, which):
    task = Task(network, pairs(network, which))
    precision = partial(torch.autocast, task.images.device.type, dtype=torch.bfloat16)
    step, floor = (precision()(run) for run in (task.step, task.floor))
    compare(step, floor, rounds=ROUNDS[network])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="counts kernels of a GPU")
@pytest.mark.parametrize("which", ["mi-l", "last-stage", "all-stages", "quarter"])
@pytest.mark.parametrize("network", NETWORKS)
def bench_launches_over_the_floor_s(count, network, which):
    """Heads and their backward and optimizer included, per pair."""
    task = Task(network, pairs(network, which))
    step, floor = _launches(task.step), _launches(task.floor)
    added = (step - floor) / len(task.distiller.pairs)
    count(floor=floor, step=step, per_pair=added)


def _launches(run, steps: int = 3) -> int:
    for _ in range(3):
        run()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        for _ in range(steps):
            run()
    launches = [x.count for x in profile.key_averages() if x.key.startswith("cudaLaunchKernel")]
    return sum(launches) // steps


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("network", NETWORKS)
def bench_peak_memory_over_floor(count, network, which):
    """Counted by torch: what tensors hold at once, parameters and optimizer included."""
    task = Task(network, pairs(network, which))
    task.step()
    momentum = [task.optimizer.state[p]["momentum_buffer"] for p in task.student.parameters()]
    floor = _peak(task.floor, task.images, task.teacher, task.student, *momentum)
    step, three_lines = (
        _peak(run, task.images, task.teacher, task.model, task.optimizer)
        for run in (task.step, task.three_lines)
    )
    count(megabytes=floor / 2**20, step=step / floor, three_lines=three_lines / floor)


def _peak(run, *held) -> int:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated()
    tracker = MemTracker()
    tracker.track_external(*held)
    with tracker:
        run()
    devices = tracker.get_tracker_snapshot("peak").values()
    return sum(snapshot["Total"] for snapshot in devices)


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("network", NETWORKS)
def bench_cached_step_over_the_students_own(compare, network, which, tmp_path):
    """From 256 samples in random order; the files are in the system's own cache of them."""
    task = Task(network, pairs(network, which), cache=FeatureCache(tmp_path))
    batch, device = len(task.images), task.images.device
    samples = torch.randn(256, *task.images.shape[1:])

    def draw(index):
        task.index = index
        task.images = samples[index].to(device)

    for start in range(0, 256, batch):
        draw(torch.arange(start, start + batch))
        task.distiller.teacher_features(task.images, sample_index=task.index)
    task.distiller.cache.flush()

    def drawn(step):
        draw(torch.randperm(256)[:batch])
        step()

    compare(lambda: drawn(task.step), lambda: drawn(task.student_step), rounds=ROUNDS[network])


@pytest.mark.parametrize("network", NETWORKS)
def bench_floor_over_the_students_own_step(compare, network):
    task = Task(network, pairs(network, "mi-l"))
    compare(task.floor, task.student_step, rounds=ROUNDS[network])


@pytest.mark.parametrize("variant", ["channels-last", "bfloat16", "compiled", "stopped"])
@pytest.mark.parametrize("network", NETWORKS)
def bench_teacher_forward_over_eager(compare, network, variant):
    """``stopped`` ends after the last stage but one."""
    chosen = pairs(network, "all-stages")[:-1]
    eager = Task(network, chosen)
    options = {
        "bfloat16": {"teacher_dtype": torch.bfloat16},
        "stopped": {"stop_teacher": True},
        "channels-last": {"channels_last": True},
    }
    task = Task(network, chosen, **options.get(variant, {}))
    if variant == "compiled":
        task.distiller._teacher.tap._given = torch.compile(task.teacher)

    compare(
        lambda: task.distiller.teacher_features(task.images),
        lambda: eager.distiller.teacher_features(eager.images),
        rounds=ROUNDS[network],
    )


@pytest.mark.parametrize("network", NETWORKS)
def bench_compiled_step_over_eager(compare, network):
    task = Task(network, pairs(network, "all-stages"))
    compare(task.compiled_step, task.step, rounds=ROUNDS[network])


@pytest.mark.parametrize("network", NETWORKS)
def bench_compiled_step_over_a_compiled_floor(compare, network):
    task = Task(network, pairs(network, "all-stages"))
    compare(task.compiled_step, task.compiled_floor, rounds=ROUNDS[network])


@pytest.mark.parametrize("network", NETWORKS)
def bench_channels_last_step_over_its_floor(compare, network):
    task = Task(network, pairs(network, "all-stages"), channels_last=True)
    compare(task.step, task.floor, rounds=ROUNDS[network])

"""A task that is compiled, and one that two processes share."""

from functools import partial

import pytest
import torch
from torch.testing import assert_close

from vid_loss import Pair, VIDLoss

pytest.importorskip("timm")
pytest.importorskip("timm.task", reason="needs timm >= 1.0.27")

from _timm import _batch, _heads, _model, _state, _task
from vid_loss.integrations.timm import VIDTask  # after the skip


def test_compiled_task_computes_the_same_in_one_graph():
    expected, task = _task(), _task()
    compiled = task.compile(backend="eager", fullgraph=True)
    assert task.get_eval_model() is compiled
    reference, result = (t(*_batch()) for t in (expected, task))
    assert_close(dict(result), dict(reference))
    for t, r in ((expected, reference), (task, result)):
        r["loss"].backward()
        assert all(p.grad is not None for p in t.get_clip_parameters())
    for ours, theirs in zip(
        task.get_clip_parameters(), expected.get_clip_parameters(), strict=True
    ):
        assert_close(ours.grad, theirs.grad)
    assert_close(task.get_task_state(), expected.get_task_state())


def test_compiled_ema_follows_and_compiled_task_loads():
    task = _task()
    task.setup_ema(decay=0.0)
    task.compile(backend="eager")
    task.compile_ema(backend="eager")
    task.load_checkpoint_state(**_state(_task(seed=5)))
    task.update_ema()
    model, averaged = task.get_eval_model().eval(), task.get_eval_model(ema=True)
    with torch.no_grad():
        expected = _model(seed=5).eval()(_batch()[0])
        assert_close(model(_batch()[0]), expected)
        assert_close(averaged(_batch()[0]), expected)
    assert_close(_heads(task, ema=True), _heads(_task(seed=5)))


def _ddp_task():
    # Without batch norm and running means, so that two halves of a batch are the whole.
    loss = partial(VIDLoss, norm="group", variance="trained", standardize=False, init_var=5.0)
    pairs = [Pair("stages.2", "stages.2", loss=loss)]
    student = _model("test_convnext")
    return VIDTask(student, _model("test_convnext", seed=1), pairs=pairs, verbose=False)


def _ddp_worker(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    task = _ddp_task()
    task.prepare_distributed(device_ids=[torch.device("cpu")], broadcast_buffers=True)
    images, target = _batch(8)
    images, target = images[rank::2], target[rank::2]
    with task.no_sync():
        task(images[:2], target[:2])["loss"].backward()
    task(images[2:], target[2:])["loss"].backward()
    state = task.get_checkpoint_state()
    gradients = [p.grad for p in task.get_clip_parameters()]
    torch.save((gradients, list(state["state_dict"]), list(state)), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_match_one_with_the_joined_batch(tmp_path):
    torch.multiprocessing.spawn(_ddp_worker, args=(str(tmp_path),), nprocs=2)
    (first, keys, entries), (second, _, _) = (torch.load(tmp_path / f"{r}.pt") for r in (0, 1))
    assert_close(first, second, rtol=0, atol=0)
    assert keys == list(_model("test_convnext").state_dict())
    assert entries == ["state_dict", "task_state"]
    task = _ddp_task()
    task(*_batch(8))["loss"].backward()
    for gradient, parameter in zip(first, task.get_clip_parameters(), strict=True):
        # Two accumulated halves add up to twice the mean.
        assert_close(gradient / 2, parameter.grad, rtol=1e-4, atol=1e-6)

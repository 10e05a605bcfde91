"""Two processes on CPU against one with the joined batch."""

import multiprocessing
import socket

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import _hf_ranks
from _hf import llama
from _versions import needs_gloo_that_averages
from transformers import LlamaForCausalLM
from vid_loss.integrations.hf import export_student

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["_hf_ranks"])
SHARDED = {"reshard_after_forward": True, "state_dict_type": "SHARDED_STATE_DICT"}


def run(folder, processes, **options):
    """Trains in that many processes and returns what each rank has seen."""
    output = folder / f"out{len(list(folder.iterdir()))}"
    output.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = [
        CONTEXT.Process(
            target=_hf_ranks.main, args=(rank, processes, port, folder / "run", output, options)
        )
        for rank in range(processes)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=600)  # where much else runs, it takes its time
        worker.kill()
    errors = "".join(path.read_text() for path in output.glob("*.txt"))
    assert [worker.exitcode for worker in workers] == [0] * processes, errors
    return [torch.load(output / f"rank{rank}.pt") for rank in range(processes)]


def assert_same(ranks, joined):
    assert ranks[0]["state"].keys() == joined["state"].keys()
    for name, value in joined["state"].items():
        assert torch.equal(ranks[0]["state"][name], ranks[1]["state"][name]), name
        torch.testing.assert_close(ranks[0]["state"][name], value, rtol=1e-5, atol=1e-6)
    for key, values in joined["logs"].items():
        assert ranks[0]["logs"][key] == pytest.approx(values, rel=1e-5), key


@pytest.fixture(scope="module")
def joined(tmp_path_factory):
    """One process, eight rows per step."""
    folder = tmp_path_factory.mktemp("joined")
    return run(folder, 1, per_device_train_batch_size=8, max_steps=3)[0]


@pytest.fixture(scope="module")
def joined_without_estimates(tmp_path_factory):
    """The same with a loss that keeps no running means, which would depend on micro-batches."""
    folder = tmp_path_factory.mktemp("joined")
    return run(folder, 1, per_device_train_batch_size=8, max_steps=3, estimates=False)[0]


def run_ddp(folder, accumulation=1, find_unused=False, **options):
    return run(
        folder,
        2,
        per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation,
        ddp_find_unused_parameters=find_unused,
        max_steps=3,
        **options,
    )


@pytest.mark.parametrize("find_unused", [False, True])
def test_ddp_is_one_process_with_the_joined_batch(tmp_path, joined, find_unused):
    assert_same(run_ddp(tmp_path, find_unused=find_unused), joined)


@pytest.mark.parametrize(
    ("find_unused", "average_tokens"), [(False, True), (True, True), (False, False)]
)
def test_ddp_with_accumulation_is_one_process_with_the_joined_batch(
    tmp_path, joined_without_estimates, find_unused, average_tokens
):
    ranks = run_ddp(
        tmp_path, 2, find_unused, average_tokens_across_devices=average_tokens, estimates=False
    )
    assert_same(ranks, joined_without_estimates)


@pytest.mark.parametrize("fsdp", [None, pytest.param(SHARDED, marks=needs_gloo_that_averages)])
@pytest.mark.parametrize("stop", [False, True])
def test_a_sharded_teacher_teaches_as_the_whole_one(tmp_path, joined, fsdp, stop):
    options = {"max_steps": 3, "fsdp": fsdp, "shards": True, "own": {"stop_teacher": stop}}
    assert_same(run(tmp_path, 2, per_device_train_batch_size=4, **options), joined)


@needs_gloo_that_averages
def test_fsdp2_trains_saves_shards_resumes_and_exports(tmp_path, joined):
    options = {"per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 2}
    whole = run(tmp_path, 2, fsdp=SHARDED, max_steps=3, **options)
    assert_same(whole, joined)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    resumed = run(tmp_path, 2, fsdp=SHARDED, max_steps=3, resume=str(checkpoint), **options)
    for name, value in whole[0]["state"].items():
        assert torch.equal(resumed[0]["state"][name], value), name

    export_student(tmp_path / "run" / "checkpoint-3", llama(seed=9), tmp_path / "plain")
    model, info = LlamaForCausalLM.from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, whole[0]["state"][name], rtol=0, atol=0)

"""DeepSpeed's ZeRO in two processes on CPU, where DeepSpeed is installed."""

import json
import multiprocessing
import socket

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("deepspeed")

import _hf_zero
from _hf import llama
from safetensors.torch import load_file

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["_hf_zero"])


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, tmp_path_factory):
    """What each of two processes has seen of the runs of one stage."""
    folder = tmp_path_factory.mktemp("zero")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = [(rank, 2, port, folder, request.param) for rank in range(2)]
    workers = [CONTEXT.Process(target=_hf_zero.main, args=x) for x in given]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=600)  # the first run on a machine compiles
        worker.kill()
    errors = "".join(path.read_text() for path in folder.glob("*.txt"))
    assert [worker.exitcode for worker in workers] == [0, 0], errors
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)], folder


def test_at_weight_zero_it_is_the_plain_trainer(ranks):
    for seen in ranks[0]:
        assert seen["weight 0"]["loss"] == seen["plain"]["loss"]
        assert seen["weight 0"]["grad_norm"] == seen["plain"]["grad_norm"]
        assert seen["weight 0"]["transfer_loss"] == [0.0] * 4


def test_it_distils_with_the_same_heads_on_both_ranks(ranks):
    first, second = (seen["weight 1"] for seen in ranks[0])
    assert first["transfer_loss"][-1] < first["transfer_loss"][0]
    for name, (before, after) in first["heads"].items():
        assert not torch.equal(before, after), name
        assert torch.equal(after, second["heads"][name][1]), name


def test_a_resumed_run_is_the_whole_run(ranks):
    for seen in ranks[0]:
        whole, resumed = seen["weight 1"], seen["resumed"]
        assert resumed["began_at"] == 2
        assert resumed["loss"] == whole["loss"]
        for name, (_, after) in whole["heads"].items():
            assert torch.equal(resumed["heads"][name][1], after), name


def test_a_student_that_zero_3_has_partitioned_learns_the_same(ranks):
    for seen in ranks[0]:
        assert seen["loaded"]["loss"] == pytest.approx(seen["weight 1"]["loss"], rel=1e-6)


def test_a_teacher_that_zero_3_has_partitioned_is_refused_with_the_remedy(ranks):
    for seen in ranks[0]:
        if seen["loaded teacher"]:
            assert "Load the teacher before TrainingArguments(...)" in seen["loaded teacher"]


def test_a_checkpoint_s_model_is_the_plain_student(ranks):
    checkpoint = ranks[1] / "one" / "checkpoint-4"
    plain = llama().state_dict()
    files = list(checkpoint.glob("model*.safetensors"))
    saved = {name: x for file in files for name, x in load_file(file).items()}
    assert saved.keys() == plain.keys()
    assert {name: x.shape for name, x in saved.items()} == {n: x.shape for n, x in plain.items()}
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert state["global_step"] == 4

import importlib
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from _versions import needs_gloo_that_averages
from torch import nn
from torch.utils.data import DataLoader, StackDataset, TensorDataset

from vid_loss import Distiller, Pair, VIDLoss
from vid_loss.cache import FeatureCache
from vid_loss.diagnostics import METRICS

pytest.importorskip("accelerate", reason="needs the accelerate extra")
pytest.importorskip("safetensors", reason="needs the accelerate extra")

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration, set_seed
from safetensors.torch import load_file
from vid_loss.integrations.accelerate import (
    Accuracy,
    Progress,
    _checkpoints,
    _manifest,
    evaluate,
    train,
)

CHILD = Path(__file__).with_name("loop_child.py")
KILLED = -9


@pytest.fixture(autouse=True)
def fresh_state():
    """Accelerate's state outlives an Accelerator, and its settings with it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def make_accelerator(**options) -> Accelerator:
    config = DataLoaderConfiguration(use_seedable_sampler=True)
    return Accelerator(cpu=True, dataloader_config=config, **options)


@pytest.fixture
def accelerator():
    return make_accelerator()


def net(width: int, classes: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, classes))


def loader(count: int, *, unlabeled: int = 0, **options) -> DataLoader:
    generator = torch.Generator().manual_seed(count)
    inputs = torch.randn(count, 6, generator=generator)
    labels = (inputs[:, 0] > 0).long()
    labels[:unlabeled] = -100
    return DataLoader(TensorDataset(inputs, labels), batch_size=8, **options)


def run(
    accelerator, output, *, transfer=True, epochs=2, heads=True, loss=VIDLoss, **options
) -> tuple:
    set_seed(0)
    student, teacher = net(8, 2), net(16, 5)
    distiller = None
    if transfer:
        pairs, example = [Pair("2:input", "2", loss=loss)], torch.zeros(1, 6)
        distiller = Distiller(student, teacher, pairs, example=example)
    parameters = list(student.parameters())
    if distiller is not None and heads:
        parameters += distiller.parameters()
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    settings = {
        "optimizer": optimizer,
        "schedule": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs),
        "train_loader": loader(32, shuffle=True),
        "validation_loader": loader(13),
        "epochs": epochs,
        "output": output,
    }
    return train(accelerator, student, distiller, **{**settings, **options}), student, distiller


def launch(output: Path, *options: str, processes: int = 1) -> subprocess.CompletedProcess:
    command = [sys.executable]
    if processes > 1:  # accelerate launch starts one process on CPU, unless there is MPI
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(processes)]
    return subprocess.run(
        [*command, str(CHILD), str(output), *options],
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def means_of(end: dict) -> dict:
    """What a run came to, but for the diagnostics: they describe each process's last batch."""
    history = [
        {name: value for name, value in epoch.items() if not name.startswith(METRICS)}
        for epoch in end["history"]
    ]
    return {**end, "history": history}


def finish(output: Path, *options: str, processes: int = 1) -> dict:
    """Runs the child to its end and returns what it came to, the same in every process."""
    done = launch(output, *options, processes=processes)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "of 21" in done.stdout
    ends = [torch.load(output / f"end-{i}.pt", weights_only=True) for i in range(processes)]
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=0, atol=0)
    return ends[0]


def test_training_moves_student_and_heads_and_records_every_epoch(accelerator, tmp_path):
    before = net_parameters_at_start()
    progress, student, _ = run(accelerator, tmp_path)
    assert progress.epoch == 2
    transferred = {f"{metric}/2:input->2" for metric in METRICS}
    names = {"task", "2:input->2", *transferred, "validation"}
    assert [set(epoch) for epoch in progress.history] == [names] * 2
    assert progress.history[1]["2:input->2"] < progress.history[0]["2:input->2"]
    assert not torch.equal(student[0].weight, before)
    assert progress.best_percent == max(epoch["validation"] for epoch in progress.history)


def net_parameters_at_start() -> torch.Tensor:
    set_seed(0)
    return net(8, 2)[0].weight.detach().clone()


def test_a_student_alone_trains_without_a_distiller(accelerator, tmp_path):
    progress, student, _ = run(accelerator, tmp_path, transfer=False)
    assert set(progress.history[0]) == {"task", "validation"}
    assert not torch.equal(student[0].weight, net_parameters_at_start())


def test_exports_are_plain_students(accelerator, tmp_path):
    _, student, _ = run(accelerator, tmp_path)
    last = load_file(tmp_path / "last.safetensors")
    torch.testing.assert_close(last, dict(student.state_dict()), rtol=0, atol=0)
    assert load_file(tmp_path / "best.safetensors").keys() == student.state_dict().keys()


def test_best_is_the_last_of_equally_good_epochs():
    progress = Progress()
    for percent in (50.0, 70.0, 70.0, 60.0):
        progress.record({"validation": percent})
    assert (progress.epoch, progress.best_epoch, progress.best_percent) == (4, 3, 70.0)


def test_best_is_exported_from_its_own_epoch(accelerator, tmp_path, monkeypatch):
    from vid_loss.integrations.accelerate import _loop

    percents = iter([60, 80, 70])
    states = []

    def scripted(_, model, __):
        states.append({k: v.clone() for k, v in model.student.state_dict().items()})
        return Accuracy(next(percents), 100)

    monkeypatch.setattr(_loop, "evaluate", scripted)
    run(accelerator, tmp_path, epochs=3)
    torch.testing.assert_close(load_file(tmp_path / "best.safetensors"), states[1])
    torch.testing.assert_close(load_file(tmp_path / "last.safetensors"), states[2])


def test_the_last_two_checkpoints_are_kept(accelerator, tmp_path):
    run(accelerator, tmp_path, epochs=4)
    kept = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert kept == {"epoch-00003", "epoch-00004"}


def test_a_finished_run_is_not_trained_again(accelerator, tmp_path):
    first, student, _ = run(accelerator, tmp_path)
    again, resumed, _ = run(accelerator, tmp_path)
    assert again == first
    torch.testing.assert_close(dict(resumed.state_dict()), dict(student.state_dict()))


def test_a_partial_checkpoint_is_ignored_and_removed(accelerator, tmp_path):
    expected, student, _ = run(accelerator, tmp_path / "whole")
    partial = tmp_path / "damaged" / "checkpoints" / "partial"
    partial.mkdir(parents=True)
    (partial / "model.safetensors").write_bytes(b"half a file")
    progress, other, _ = run(accelerator, tmp_path / "damaged")
    assert progress == expected
    torch.testing.assert_close(dict(other.state_dict()), dict(student.state_dict()))
    assert not partial.exists()


def test_unlabeled_batches_train_the_transfer_terms(accelerator, tmp_path):
    data = loader(32, unlabeled=32, shuffle=True)
    progress, student, _ = run(accelerator, tmp_path, train_loader=data)
    assert progress.history[0]["task"] == 0
    assert not torch.equal(student[0].weight, net_parameters_at_start())


def test_clipping_counts_the_gradients_of_heads(accelerator, tmp_path, monkeypatch):
    clipped = []
    original = accelerator.clip_grad_norm_

    def noted(parameters, norm):
        clipped.append((len(list(parameters := list(parameters))), norm))
        return original(parameters, norm)

    monkeypatch.setattr(accelerator, "clip_grad_norm_", noted)
    _, student, distiller = run(accelerator, tmp_path, max_grad_norm=0.5)
    count = len(list(student.parameters())) + len(list(distiller.parameters()))
    assert set(clipped) == {(count, 0.5)}


def test_a_cache_serves_the_teachers_features_and_changes_nothing(accelerator, tmp_path):
    ends, runs = [], []
    for cache in (None, FeatureCache(tmp_path / "features", dtype=torch.float32)):
        set_seed(0)
        student, teacher = net(8, 2), net(16, 5)
        teacher.register_forward_pre_hook(
            lambda _, args, cached=bool(cache): runs.append((cached, len(args[0])))
        )
        pairs, example = [Pair("2:input", "2")], torch.zeros(1, 6)
        distiller = Distiller(student, teacher, pairs, example=example, cache=cache)
        optimizer = torch.optim.SGD([*student.parameters(), *distiller.parameters()], lr=0.1)
        samples = loader(32).dataset
        if cache:
            samples = StackDataset(samples, range(32))
        train(
            accelerator,
            student,
            distiller,
            optimizer=optimizer,
            schedule=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3),
            train_loader=DataLoader(samples, batch_size=8, shuffle=True),
            validation_loader=loader(13),
            epochs=3,
            output=tmp_path / str(bool(cache)),
        )
        ends.append(list(student.parameters()))
    torch.testing.assert_close(ends[0], ends[1])
    assert runs.count((False, 8)) == 3 * 4
    assert runs.count((True, 8)) == 4


def test_heads_outside_the_optimizer_are_refused(accelerator, tmp_path):
    with pytest.raises(ValueError, match="add_param_group"):
        run(accelerator, tmp_path, heads=False)


def test_a_sampler_that_cannot_resume_is_refused(tmp_path):
    with pytest.raises(ValueError, match="use_seedable_sampler=True"):
        run(Accelerator(cpu=True), tmp_path)


def test_a_missing_extra_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    monkeypatch.delitem(sys.modules, "vid_loss.integrations.accelerate")
    with pytest.raises(ImportError, match=re.escape('pip install "vid-loss[accelerate]"')):
        importlib.import_module("vid_loss.integrations.accelerate")


def test_mixed_precision_trains_heads_in_float32(tmp_path):
    bf16 = make_accelerator(mixed_precision="bf16")
    progress, _, distiller = run(bf16, tmp_path)
    assert progress.history[1]["2:input->2"] < progress.history[0]["2:input->2"]
    assert {p.dtype for p in distiller.parameters()} == {torch.float32}


# Dynamo looks at the .grad of the features, which are no leaves, and hides that where it can.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_a_compiled_run_exports_the_plain_student(tmp_path):
    plain, student, _ = run(make_accelerator(), tmp_path / "plain")
    AcceleratorState._reset_state(reset_partial_state=True)
    progress, compiled, _ = run(make_accelerator(dynamo_backend="aot_eager"), tmp_path / "compiled")
    exported = load_file(tmp_path / "compiled" / "last.safetensors")
    torch.testing.assert_close(exported, dict(compiled.state_dict()), rtol=0, atol=0)
    torch.testing.assert_close(exported, dict(student.state_dict()))
    torch.testing.assert_close(progress.history, plain.history)


def test_losses_reach_a_tracker(tmp_path):
    pytest.importorskip("tensorboard")
    accelerator = make_accelerator(log_with="tensorboard", project_dir=tmp_path)
    accelerator.init_trackers("run")
    run(accelerator, tmp_path)
    accelerator.end_training()
    (events,) = (tmp_path / "run").glob("events*")
    assert b"2:input->2" in events.read_bytes()


def test_accumulated_batches_equal_one_batch(tmp_path):
    # With the paper's loss, which is the same function of any batch: it keeps no running means.
    loss = partial(VIDLoss, variance="trained", standardize=False, init_var=5.0)
    ends = []
    for batch_size, steps in ((16, 1), (8, 2)):
        accelerator = make_accelerator(gradient_accumulation_steps=steps)
        data = DataLoader(loader(32).dataset, batch_size, shuffle=True)
        _, student, distiller = run(
            accelerator, tmp_path / str(steps), train_loader=data, loss=loss
        )
        ends.append({**student.state_dict(), **distiller.state_dict()})
    torch.testing.assert_close(ends[1], ends[0])


def test_evaluation_counts_labeled_samples_only(accelerator):
    model = nn.Linear(6, 2)
    data = accelerator.prepare(loader(21, unlabeled=5))
    accuracy = evaluate(accelerator, model, data)
    inputs, labels = data.dataset.tensors
    expected = int((model(inputs).argmax(1) == labels)[5:].sum())
    assert (accuracy.correct, accuracy.total) == (expected, 16)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    return finish(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def whole_run_without_dropout(tmp_path_factory):
    return finish(tmp_path_factory.mktemp("without_dropout"), "--no-dropout")


@pytest.mark.parametrize(
    ("kill", "left"),
    [
        (("--kill-at-step", "6"), {"epoch-00001"}),
        (("--kill-in-save", "2"), {"epoch-00001", "partial"}),
        (("--kill-in-save", "3"), {"epoch-00001", "epoch-00002", "partial"}),
    ],
    ids=["mid-epoch", "in a save", "in the last save"],
)
def test_a_killed_run_ends_where_the_whole_run_ends(tmp_path, whole_run, kill, left):
    assert launch(tmp_path, *kill).returncode == KILLED
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == left
    torch.testing.assert_close(finish(tmp_path), whole_run, rtol=0, atol=0)


def remove(path):
    path.unlink()


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def zero(path):
    path.write_bytes(bytes(path.stat().st_size))


FILES = (
    "model.safetensors",
    "optimizer.bin",
    "random_states_0.pkl",
    "loop.pt",
    "manifest.json",
)


@pytest.fixture(scope="module")
def killed_run(tmp_path_factory):
    """Two checkpoints, and a third epoch that was not finished."""
    folder = tmp_path_factory.mktemp("killed")
    assert launch(folder, "--kill-at-step", "11").returncode == KILLED
    files = {path.name for path in (folder / "checkpoints/epoch-00002").iterdir()}
    assert set(FILES) <= files, files
    return folder


@pytest.mark.parametrize("damage", [remove, truncate, flip, zero])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_named_and_passed_over(killed_run, tmp_path, name, damage):
    shutil.copytree(killed_run / "checkpoints", tmp_path / "checkpoints")
    damage(tmp_path / "checkpoints/epoch-00002" / name)
    with pytest.warns(UserWarning, match=r"epoch-00002; got .* passed over for the one before it"):
        chosen = _checkpoints._last_whole(tmp_path / "checkpoints")
    assert chosen == tmp_path / "checkpoints/epoch-00001"


def test_a_run_whose_last_checkpoint_is_damaged_ends_where_the_whole_run_ends(
    killed_run, tmp_path, whole_run
):
    shutil.copytree(killed_run, tmp_path / "run")
    checkpoints = tmp_path / "run/checkpoints"
    remove(checkpoints / "epoch-00002/random_states_0.pkl")
    (checkpoints / "epoch-00099").mkdir()
    (checkpoints / "epoch-00098").write_text("")
    torch.testing.assert_close(finish(tmp_path / "run"), whole_run, rtol=0, atol=0)
    assert {path.name for path in checkpoints.iterdir()} == {"epoch-00002", "epoch-00003"}


def test_without_a_whole_checkpoint_a_run_starts_anew(accelerator, tmp_path):
    expected, student, _ = run(accelerator, tmp_path / "whole")
    (tmp_path / "damaged/checkpoints/epoch-00099").mkdir(parents=True)
    with pytest.warns(UserWarning, match=r"epoch-00099; got no manifest.json.* a new start if"):
        progress, other, _ = run(accelerator, tmp_path / "damaged")
    assert progress == expected
    torch.testing.assert_close(dict(other.state_dict()), dict(student.state_dict()))


def test_a_checkpoint_of_more_processes_is_refused(accelerator, tmp_path):
    run(accelerator, tmp_path)
    state = tmp_path / "checkpoints/epoch-00002/loop.pt"
    torch.save({**torch.load(state, weights_only=True), "processes": 2}, state)
    _manifest.write_manifest(state.parent)
    with pytest.raises(ValueError, match=r"as many processes as wrote .*00002, 2; got 1, which ha"):
        run(accelerator, tmp_path)


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(accelerator, tmp_path, monkeypatch):
    synced = set()
    fsync, rename = os.fsync, os.rename

    def renamed(partial, path):
        missing = {str(x) for x in (partial, *partial.rglob("*"))} - synced
        assert not missing
        rename(partial, path)

    monkeypatch.setattr(
        "os.fsync", lambda fd: (synced.add(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd))
    )
    monkeypatch.setattr("os.rename", renamed)
    run(accelerator, tmp_path, epochs=1)
    assert str(tmp_path / "checkpoints") in synced


def test_two_processes_equal_one_and_resume_after_a_kill(tmp_path, whole_run_without_dropout):
    two = finish(tmp_path / "two", "--no-dropout", processes=2)
    torch.testing.assert_close(means_of(two), means_of(whole_run_without_dropout))
    killed = launch(tmp_path / "killed", "--no-dropout", "--kill-at-step", "6", processes=2)
    assert killed.returncode != 0
    resumed = finish(tmp_path / "killed", "--no-dropout", processes=2)
    torch.testing.assert_close(resumed, two, rtol=0, atol=0)


@needs_gloo_that_averages
def test_fsdp2_equals_one_process_and_exports_the_plain_student(
    tmp_path, whole_run_without_dropout
):
    done = launch(tmp_path, "--no-dropout", "--fsdp", processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    exported = load_file(tmp_path / "last.safetensors")
    torch.testing.assert_close(exported, whole_run_without_dropout["student"])
    assert "of 21" in done.stdout

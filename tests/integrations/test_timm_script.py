import argparse
import sys

import pytest
import torch
from torch.testing import assert_close

timm = pytest.importorskip("timm")
pytest.importorskip("timm.task", reason="needs timm >= 1.0.27")

from timm.optim import create_optimizer_v2  # noqa: E402  # after the skip
from vid_loss.integrations.timm._arguments import (  # noqa: E402  # after the skip
    add_vid_arguments,
    vid_task,
)
from vid_loss.integrations.timm._script import patch, run  # noqa: E402  # after the skip

VID = ["--kd-distill-type", "vid", "--kd-model-name", "resnet10t"]


@pytest.fixture
def teacher(tmp_path):
    torch.manual_seed(9)
    path = tmp_path / "teacher.pth"
    torch.save(timm.create_model("resnet10t", num_classes=5).state_dict(), path)
    return path


@pytest.fixture
def run_here(monkeypatch):
    """Runs a script in this process, which is then what it was."""

    def run_script(path, *arguments):
        with monkeypatch.context() as patched:
            patched.setattr(sys, "argv", sys.argv)
            patched.setattr(sys, "path", list(sys.path))
            patched.setitem(sys.modules, "__main__", sys.modules["__main__"])
            run(path, ["--", *map(str, arguments)])

    return run_script


def _checkpoint(folder):
    """What is trained: the rest of a checkpoint says where the run was."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        checkpoint = torch.load(folder / "last.pth.tar", weights_only=True)
    trained = ("epoch", "optimizer", "state_dict", "task_state", "state_dict_ema", "task_state_ema")
    return {key: value for key, value in checkpoint.items() if key in trained}


def test_script_trains_stops_resumes_and_exports(script, teacher, tmp_path, run_here):
    before = script.read_bytes()
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = [*VID, "--vid-teacher-checkpoint", teacher, "--vid-pair", "layer3=layer3"]
    options += ["--vid-pair", "layer4=layer4", "--vid-weight", "2"]
    for folder, arguments in (
        (whole, ["--epochs", 2]),
        (parts, ["--epochs", 1]),
        (parts, ["--epochs", 2, "--resume", parts / "last.pth.tar"]),
    ):
        folder.mkdir(exist_ok=True)
        run_here(script, *options, "--output", folder, *arguments)
    expected, resumed = _checkpoint(whole), _checkpoint(parts)
    assert resumed["epoch"] == 1
    assert len(resumed) == 6
    assert_close(resumed, expected, rtol=0, atol=0)
    variance = resumed["task_state"]["vid"]["layer4->layer4.running_var.var"]
    assert variance.unique().numel() > 1  # it has moved
    plain = timm.create_model(
        "test_resnet", num_classes=3, checkpoint_path=str(parts / "model_best.pth.tar")
    )
    assert_close(dict(plain.state_dict()), dict(_checkpoint(parts)["state_dict_ema"]))
    assert script.read_bytes() == before


def test_patched_script_runs_as_well_and_pairs_may_be_left_out(script, teacher, tmp_path, run_here):
    options = [*VID, "--vid-teacher-checkpoint", teacher, "--output", tmp_path]
    run_here(script, *options)
    in_memory = _checkpoint(tmp_path)
    patch(script)
    run_here(script, *options)
    assert_close(_checkpoint(tmp_path), in_memory, rtol=0, atol=0)
    assert {key.split(".")[0] for key in in_memory["task_state"]["vid"]} == {
        f"layer{i}->layer{i}" for i in range(1, 5)
    }


def test_script_without_vid_is_what_it_was(script, tmp_path, run_here):
    run_here(script, "--output", tmp_path)
    assert "task_state" not in _checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kd-distill-type", "vid"], "expected a teacher; got none. Add --kd-model-name"),
        ([*VID, "--vid-pair", "layer4"], "--vid-pair: expected student_layer=teacher_layer"),
        ([*VID, "--vid-teacher-checkpoint", "missing.pth"], "there is no file 'missing.pth'"),
    ],
)
def test_wrong_arguments_are_named(script, tmp_path, run_here, arguments, message):
    with pytest.raises(ValueError, match=message):
        run_here(script, *arguments, "--output", tmp_path)


@pytest.mark.parametrize("kind", [[], ["--kd-model-name", "resnet10t"]])
@pytest.mark.parametrize(
    "argument", [["--vid-pair", "layer4=layer4"], ["--vid-weight", "2"], ["--vid-stop-teacher"]]
)
def test_arguments_of_vid_without_vid_are_refused_before_anything_is_built(
    script, tmp_path, run_here, capsys, kind, argument
):
    with pytest.raises(SystemExit, match="2"):
        run_here(script, *kind, *argument, "--output", tmp_path)
    message = f"{argument[0]}: expected --kd-distill-type vid; got logit. Add it, or drop"
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*.pth.tar"))


def test_what_a_configuration_file_sets_is_refused_too(capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--kd-distill-type", default="logit", choices=["logit"])
    add_vid_arguments(parser)
    parser.set_defaults(vid_head_lr=0.1)  # as timm does with what --config says
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args([])
    assert "--vid-head-lr: expected --kd-distill-type vid" in capsys.readouterr().err
    assert parser.parse_args(["--kd-distill-type", "vid"]).vid_head_lr == 0.1


@pytest.mark.parametrize("pairs", [[], ["--vid-pair", "layer4=blocks.5"]])
def test_a_vit_teaches_a_cnn_from_the_command_line(script, tmp_path, run_here, pairs):
    path = tmp_path / "vit.pth"
    torch.save(timm.create_model("test_vit", num_classes=3).state_dict(), path)
    options = ["--kd-distill-type", "vid", "--kd-model-name", "test_vit"]
    options += ["--vid-teacher-checkpoint", path, "--img-size", 160, *pairs]
    run_here(script, *options, "--output", tmp_path)
    names = {key.split(".")[0] for key in _checkpoint(tmp_path)["task_state"]["vid"]}
    assert "layer4->blocks/5" in names
    assert len(names) == (1 if pairs else 4)


def test_task_evaluates_as_the_plain_one_would(teacher):
    student, criterion = timm.create_model("test_resnet"), torch.nn.CrossEntropyLoss()
    plain = timm.task.ClassificationTask(student, criterion, verbose=False)
    plain.create_evaluator = object()  # newer ones have it; multi-label has its own
    parser = argparse.ArgumentParser()
    for name in ("--kd-distill-type", "--kd-model-name", "--distill-loss-weight"):
        parser.add_argument(name)
    parser.add_argument("--task-loss-weight", type=float)
    for name, default in (
        ("opt", "adamw"),
        ("lr", 0.01),
        ("weight_decay", 0.1),
        ("layer_decay", None),
    ):
        parser.set_defaults(**{name: default})
    parser.set_defaults(opt_kwargs={"nesterov": False})
    add_vid_arguments(parser)
    options = ["--vid-teacher-checkpoint", str(teacher), "--vid-stop-teacher"]
    for given, rate in (("0", 0.0), (None, 0.01), ("0.5", 0.5)):
        of_heads = [] if given is None else ["--vid-head-lr", given]
        args = parser.parse_args([*VID, *options, *of_heads])
        args.opt_kwargs = {"nesterov": False}
        task = vid_task(args, plain)
        module = task.get_trainable_module()
        optimizer = create_optimizer_v2(module, "sgd", lr=args.lr, **args.opt_kwargs)
        head = next(module.distiller.parameters())
        scales = {p: x.get("lr_scale", 1) for x in optimizer.param_groups for p in x["params"]}
        assert scales[head] * args.lr == pytest.approx(rate)
    assert not optimizer.defaults["nesterov"]
    ends = []
    module.distiller._teacher.tap.model.register_forward_hook(lambda *_: ends.append(True))
    module.distiller.teacher_features(torch.rand(2, 3, 160, 160))
    assert not ends  # it is stopped at its last tapped layer
    assert task.create_evaluator is plain.create_evaluator
    assert task.criterion is plain.criterion

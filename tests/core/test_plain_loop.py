"""What people do in their own loops: precision, compile, EMA, DDP."""

import copy

import pytest
import torch
import torch.nn.functional as F
from _asserts import assert_same_state, state_of
from _models import cnn_pair, images
from _versions import warns_that_nothing_is_compiled
from torch import nn
from torch.optim.swa_utils import AveragedModel

from vid_loss import DistillationModel, Distiller

PAIRS = {"stage1": "stage1", "stage2": "stage2"}
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])


def make(**options):
    student, teacher = cnn_pair()
    return student, teacher, Distiller(student, teacher, PAIRS, example=images(), **options)


def assert_only_student_and_heads_have_gradients(student, teacher, distiller):
    for module in (student, distiller):
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("distiller_inside", [True, False], ids=["inside", "outside"])
def test_autocast(dtype, distiller_inside):
    student, teacher, distiller = make()
    student(images())
    expected = distiller(images())
    with torch.autocast("cpu", dtype=dtype):
        output = student(images())
        transfer = distiller(images()) if distiller_inside else None
    if transfer is None:
        transfer = distiller(images())
    assert transfer.dtype == torch.float32
    torch.testing.assert_close(transfer, expected, rtol=1e-2, atol=1e-2)
    (F.cross_entropy(output.float(), LABELS) + transfer).backward()
    assert_only_student_and_heads_have_gradients(student, teacher, distiller)


def test_a_float16_gradient_scaler_steps_heads_and_student():
    student, _, distiller = make()
    parameters = [*student.parameters(), *distiller.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    scaler = torch.amp.GradScaler("cpu")
    before = state_of(distiller)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = F.cross_entropy(student(images()), LABELS) + distiller(images())
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    for name, parameter in distiller.named_parameters():
        assert not torch.equal(parameter, before[name]), name


def test_a_pure_bfloat16_student_trains_float32_heads():
    student, teacher = cnn_pair()
    student, teacher = student.bfloat16(), teacher.bfloat16()
    distiller = Distiller(student, teacher, PAIRS, example=images().bfloat16())
    student(images().bfloat16())
    distiller(images().bfloat16()).backward()
    assert {p.dtype for p in distiller.parameters()} == {torch.float32}
    grads = [p.grad for name, p in student.named_parameters() if not name.startswith("fc")]
    assert all(torch.isfinite(grad).all() for grad in grads)


def compiled(module):
    torch.compiler.reset()
    return torch.compile(module, backend="aot_eager", fullgraph=True)


@warns_that_nothing_is_compiled
@pytest.mark.parametrize("order", ["distiller first", "compile first"])
def test_compiled_student(order):
    eager, _, distiller = make()
    eager(images())
    expected = distiller(images())
    student, teacher = cnn_pair()
    if order == "compile first":
        fast = compiled(student)
        distiller = Distiller(fast, teacher, PAIRS, example=images())
    else:
        distiller = Distiller(student, teacher, PAIRS, example=images())
        fast = compiled(student)
    for _ in range(2):
        output = fast(images())
        transfer = distiller(images())
    torch.testing.assert_close(transfer, expected)
    (F.cross_entropy(output, LABELS) + transfer).backward()
    assert_only_student_and_heads_have_gradients(student, teacher, distiller)


@warns_that_nothing_is_compiled
def test_a_student_compiled_and_run_before_it_is_tapped_is_noticed():
    student, teacher = cnn_pair()
    fast = compiled(student)
    fast(images())
    distiller = Distiller(fast, teacher, PAIRS, example=images())
    fast(images())
    with pytest.raises(RuntimeError, match=r"Compile the model after the Distiller is built"):
        distiller(images())


def test_several_students_of_one_class_compiled_in_one_process():
    """Dynamo shares code between them and looks at no hooks: what the error message advises."""

    def last_step(distil):
        student, teacher = cnn_pair()
        distiller = Distiller(student, teacher, PAIRS, example=images()) if distil else None
        fast = torch.compile(student, backend="eager")
        for _ in range(2):
            fast(images())
        return distiller(images()) if distiller else None

    torch.compiler.reset()
    last_step(distil=False)
    with pytest.raises(RuntimeError, match="skip_nnmodule_hook_guards = False"):
        last_step(distil=True)
    torch.compiler.reset()
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
        for distil in (True, False, True):
            assert (last_step(distil) is not None) == distil


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_an_in_place_neighbour_is_noticed_in_a_compiled_model(whose):
    torch.compiler.reset()
    models = dict(zip(("student", "teacher"), cnn_pair(), strict=True))
    models[whose].stage1[2] = nn.ReLU(inplace=True)
    if whose == "teacher":
        models[whose] = torch.compile(models[whose], backend="aot_eager")
    else:
        models[whose].compile(backend="aot_eager")
    with pytest.raises(RuntimeError, match=f"'stage1.1' of the {whose} was changed in place"):
        Distiller(**models, pairs={"stage1.1": "stage1.1"}, example=images())


def test_compiled_distillation_model_is_one_graph_and_equals_eager():
    student, teacher, distiller = make()
    twin = copy.deepcopy(DistillationModel(student, distiller))  # with estimates of its own
    fast = compiled(DistillationModel(student, distiller))
    for scale in (1.0, 0.5):
        output, transfer = twin(images() * scale)
        fast_output, fast_transfer = fast(images() * scale)
        torch.testing.assert_close(fast_output, output)
        torch.testing.assert_close(fast_transfer, transfer)
        torch.testing.assert_close(distiller.state_dict(), twin.distiller.state_dict())
        torch.testing.assert_close(
            sum(w * distiller.terms[n] for n, w in distiller.weights.items()), transfer.detach()
        )
    (F.cross_entropy(fast_output, LABELS) + fast_transfer).backward()
    assert_only_student_and_heads_have_gradients(student, teacher, distiller)


def test_a_weight_schedule_does_not_recompile_at_every_step():
    student, _, distiller = make()
    fast = compiled(DistillationModel(student, distiller))
    compilations = torch._dynamo.testing.CompileCounterWithBackend("eager")
    torch.compiler.reset()
    fast = torch.compile(DistillationModel(student, distiller), backend=compilations)
    values = []
    for weight in torch.linspace(1, 2, 6).tolist():
        distiller.set_weight("stage1->stage1", weight)
        values.append(fast(images())[1].item())
    assert compilations.frame_count <= 2
    steps = torch.tensor(values).diff()
    torch.testing.assert_close(steps, steps[:1].expand(5), rtol=1e-3, atol=1e-3)


def test_an_ema_of_the_student_neither_disturbs_nor_records():
    student, _, distiller = make()
    ema = AveragedModel(student)
    output = student(images())
    ema(images(2))
    assert torch.isfinite(distiller(images()))
    ema.update_parameters(student)
    ema(images(2))
    with pytest.raises(RuntimeError, match="has not run forward"):
        distiller(images())
    assert output.shape == (8, 3)


def test_an_ema_of_the_distillation_model_evaluates():
    student, _, distiller = make()
    model = DistillationModel(student, distiller)
    ema = AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(images())[1].backward()
    optimizer.step()
    state = state_of(model)
    ema.update_parameters(model)
    torch.testing.assert_close(ema.eval()(images()), ema.module.student(images()))
    assert_same_state(model, state)


def test_distributed_data_parallel_in_one_process(tmp_path):
    """Student and heads in one wrapper, or in one each, built in either order."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        student, teacher = cnn_pair()
        distiller = Distiller(student, teacher, PAIRS, example=images())
        parallel = nn.parallel.DistributedDataParallel(student)
        for given in (distiller, Distiller(parallel, teacher, PAIRS, example=images())):
            assert given.student is student
            heads = nn.parallel.DistributedDataParallel(given)
            (F.cross_entropy(parallel(images()), LABELS) + heads(images())).backward()
            assert_only_student_and_heads_have_gradients(student, teacher, given)
            student.zero_grad()
        model = nn.parallel.DistributedDataParallel(DistillationModel(student, distiller))
        output, transfer = model(images())
        (F.cross_entropy(output, LABELS) + transfer).backward()
    finally:
        torch.distributed.destroy_process_group()


def test_channels_last_is_preserved_end_to_end():
    student, teacher = cnn_pair()
    student, teacher = (m.to(memory_format=torch.channels_last) for m in (student, teacher))
    distiller = Distiller(student, teacher, PAIRS, example=images())
    distiller.to(memory_format=torch.channels_last)
    layouts = []
    for loss in distiller.losses.values():
        loss.head.register_forward_hook(
            lambda _, args, out: layouts.extend(
                x.is_contiguous(memory_format=torch.channels_last) for x in (*args, out)
            )
        )
    student(images().to(memory_format=torch.channels_last))
    distiller(images().to(memory_format=torch.channels_last))
    assert layouts == [True] * 4

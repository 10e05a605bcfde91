"""On a GPU, where there is one: the host waits for nothing, and a step can be a CUDA graph."""

import copy
import warnings
from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import torch
from _masks import Towers, batch_of, mask_of
from _models import TokenNet, cnn_pair, images

from vid_loss import (
    ATLoss,
    DistillationModel,
    Distiller,
    FitNetLoss,
    KDLoss,
    LwFLoss,
    Pair,
    VIDLoss,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

QUARTER = partial(VIDLoss, positions=0.25)
PAPER = partial(VIDLoss, variance="trained", standardize=False, init_var=5.0)
METHODS = [
    Pair("stage1", "stage1"),
    Pair("stage2", "stage2", loss=QUARTER),
    Pair("stage2", "stage2", loss=PAPER, name="paper"),
    Pair("stage2", "stage2", loss=FitNetLoss),
    Pair("stage2", "stage2", loss=ATLoss()),
    Pair("fc", "fc", loss=KDLoss()),
    Pair("fc:input", "fc", loss=LwFLoss),
]


def maps(loss=None, device="cuda"):
    student, teacher = (model.to(device) for model in cnn_pair())
    layers = ("stage1", "stage2", "fc:input")
    pairs = METHODS if loss is None else [Pair(layer, layer, loss=loss) for layer in layers]
    batch = {"images": images().to(device)}
    return student, Distiller(student, teacher, pairs, example=batch), batch


def masked(device="cuda"):
    torch.manual_seed(0)
    batch = {**batch_of(Towers), "pixel_mask": mask_of(8, 3, most=8)}
    pairs = [Pair("text", "text", loss=QUARTER), Pair("image", "image", mask="pixel_mask")]
    return built(Towers, pairs, batch, device)


def tokens(device="cuda"):
    torch.manual_seed(0)
    return built(TokenNet, {"layer": "layer"}, batch_of(TokenNet), device)


def built(model, pairs, batch, device):
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    student, teacher = model(6).to(device), model(9).to(device)
    return student, Distiller(student, teacher, pairs, example=batch), batch


@pytest.fixture(params=["float32", "bfloat16"])
def precision(request):
    if request.param == "float32":
        return nullcontext
    return partial(torch.autocast, "cuda", dtype=torch.bfloat16)


def trained(student, distiller, batch, precision, lr=0.01):
    """A function that makes a step and returns its transfer terms."""
    optimizer = torch.optim.SGD([*student.parameters(), *distiller.parameters()], lr=lr)

    def step():
        optimizer.zero_grad(set_to_none=False)
        with precision():
            student(**batch)
            transfer = distiller(**batch)
        transfer.backward()
        optimizer.step()
        return transfer.detach()

    return step


@contextmanager
def waiting_is_an_error():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("script", [maps, masked, tokens, partial(maps, QUARTER)])
def test_no_step_after_the_second_waits_for_the_gpu(script, precision):
    step = trained(*script(), precision)
    step()
    step()
    with waiting_is_an_error():
        for _ in range(6):  # the flags of the first ones have arrived by now
            step()


def all_positions(distiller):
    for loss in distiller.vid_losses().values():
        loss.positions = 1.0


@pytest.mark.parametrize("script", [maps, masked, tokens])
def test_values_gradients_and_estimates_are_the_cpu_s(script):
    found, heads = [], {}
    for device in ("cpu", "cuda"):
        student, distiller, batch = script(device=device)
        all_positions(distiller)  # one generator gives other positions than another
        heads = heads or copy.deepcopy(distiller.state_dict())
        distiller.load_state_dict(heads)
        model = DistillationModel(student, distiller)
        with torch.backends.cudnn.flags(allow_tf32=False):
            for _ in range(3):
                model(**batch)[1].backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        nats = {name: x.nats_per_element for name, x in distiller.diagnostics().items()}
        found.append((gradients, distiller.terms, dict(distiller.named_buffers()), nats))
    torch.testing.assert_close(found[1], found[0], check_device=False, rtol=1e-3, atol=1e-4)


def captured(step):
    """A step as a CUDA graph, after three on another stream, as torch's documentation says."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        transfer = step()
    return graph, transfer


@pytest.mark.parametrize("script", [maps, masked, tokens])
def test_a_captured_step_trains_as_the_plain_one(script):
    student, distiller, batch = script()
    all_positions(distiller)
    twin = copy.deepcopy(DistillationModel(student, distiller))
    plain = trained(twin.student, twin.distiller, batch, nullcontext)
    for _ in range(3 + 5):
        expected = plain()
    graph, transfer = captured(trained(student, distiller, batch, nullcontext))
    for _ in range(5):
        graph.replay()
    torch.testing.assert_close(transfer, expected)
    torch.testing.assert_close(distiller.state_dict(), twin.distiller.state_dict())


@pytest.mark.parametrize("script", [partial(maps, QUARTER), masked])
def test_a_captured_step_takes_other_positions_each_time(script):
    student, distiller, batch = script()
    graph, _ = captured(trained(student, distiller, batch, nullcontext, lr=0.0))
    names = [name for name, loss in distiller.vid_losses().items() if loss.positions < 1]
    seen = set()
    for _ in range(40):
        graph.replay()
        seen.add(tuple(distiller.terms[name].item() for name in names))
    assert len(seen) > 10


def test_a_captured_step_keeps_what_the_teacher_overflowed_to_out():
    student, distiller, batch = maps(VIDLoss)
    graph, transfer = captured(trained(student, distiller, batch, nullcontext))
    estimates = [
        x
        for loss in distiller.losses.values()
        for x in (*loss.scale.buffers(), loss.running_var.var)
    ]
    before = [x.clone() for x in estimates]
    distiller._teacher.tap.model.stage1[1].bias.data.fill_(torch.inf)
    graph.replay()
    assert transfer == 0
    torch.testing.assert_close(estimates, before)
    assert all(p.isfinite().all() for p in distiller.parameters())
    with pytest.raises(RuntimeError, match="expected finite features of the teacher"):
        distiller.diagnostics()


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
@pytest.mark.parametrize("script", [partial(maps, VIDLoss), tokens, partial(maps, QUARTER)])
def test_reduce_overhead_compiles_a_step_into_cuda_graphs(script):
    student, distiller, batch = script()
    model = DistillationModel(student, distiller)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    torch._dynamo.utils.counters.clear()
    for _ in range(4):
        model.zero_grad()  # what a graph has returned is overwritten by the next
        twin.zero_grad()
        torch.compiler.cudagraph_mark_step_begin()
        found, expected = compiled(**batch)[1], twin(**batch)[1]
        found.backward()
        expected.backward()
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
    assert model.distiller.diagnostics().keys() == distiller.vid_losses().keys()
    if all(loss.positions == 1 for loss in distiller.vid_losses().values()):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
        gradients = [[p.grad for p in x.distiller.parameters()] for x in (model, twin)]
        torch.testing.assert_close(*gradients, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("moved", [("student",), ("student", "distiller"), ("model",)])
def test_heads_teacher_and_optimizer_follow_to_the_gpu(moved):
    student, teacher = cnn_pair()
    distiller = Distiller(student, teacher, METHODS, example=images())
    model = DistillationModel(student, distiller)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for name in moved:
        {"student": student, "distiller": distiller, "model": model}[name].cuda()
    batch = images().cuda()
    for _ in range(2):
        model(batch)[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert {p.device.type for p in (*distiller.parameters(), *teacher.parameters())} == {"cuda"}
    assert all(x.is_cuda for x in distiller.buffers())


def test_a_state_of_the_gpu_loads_on_the_cpu(tmp_path):
    student, distiller, batch = maps()
    trained(student, distiller, batch, nullcontext)()
    torch.save(distiller.state_dict(), tmp_path / "heads.pt")
    student, teacher = cnn_pair()
    other = Distiller(student, teacher, METHODS, example=images())
    other.load_state_dict(torch.load(tmp_path / "heads.pt", map_location="cpu"))
    torch.testing.assert_close(
        other.state_dict(), {name: x.cpu() for name, x in distiller.state_dict().items()}
    )

"""Exporters, with the distiller's hooks on the student and without."""

import copy
import io

import pytest
import torch
from _versions import needs_onnx_by_dynamo, needs_strict_export_with_hooks
from torch.testing import assert_close

from vid_loss import Distiller


def net(width):
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, width, 3, padding=1),
        torch.nn.BatchNorm2d(width),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(width, 5),
    )


@pytest.fixture
def trained():
    """A student after a step, in eval mode with its hooks on, and what it returns."""
    torch.manual_seed(0)
    student, images = net(4), torch.randn(2, 3, 8, 8)
    distiller = Distiller(student, net(8), {"2": "2", "5:input": "5"}, example=images)
    (student(images).sum() + distiller(images)).backward()
    student.eval()
    assert any(module._forward_hooks for module in student.modules())
    plain = copy.deepcopy(student)  # in a copy, hooks do nothing
    return student, distiller, images, plain(images)


def on_trace(student, images):
    return torch.jit.trace(student, images)


def on_export(student, images):
    return torch.export.export(student, (images,)).module()


def on_strict_export(student, images):
    return torch.export.export(student, (images,), strict=True).module()


def _evaluator(model):
    reference = pytest.importorskip("onnx.reference").ReferenceEvaluator(model)
    (name,) = reference.input_names
    return lambda images: torch.from_numpy(reference.run(None, {name: images.numpy()})[0])


def on_onnx(student, images):
    pytest.importorskip("onnxscript")
    program = torch.onnx.export(student, (images,), dynamo=True, verbose=False)
    return _evaluator(program.model_proto)


def on_old_onnx(student, images):
    onnx, file = pytest.importorskip("onnx"), io.BytesIO()
    torch.onnx.export(student, (images,), file, dynamo=False)
    return _evaluator(onnx.load_from_string(file.getvalue()))


EXPORTERS = [
    on_trace,
    on_export,
    pytest.param(on_strict_export, marks=needs_strict_export_with_hooks),
    pytest.param(on_onnx, marks=needs_onnx_by_dynamo),
    on_old_onnx,
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's, of its older exporters
@pytest.mark.filterwarnings("ignore::FutureWarning")  # likewise
@pytest.mark.filterwarnings(
    "ignore:While compiling, we found certain side effects"
)  # as the page says
@pytest.mark.parametrize("export", EXPORTERS, ids=lambda export: export.__name__)
def test_a_student_with_its_hooks_on_is_exported_as_the_plain_one(trained, export):
    student, distiller, images, expected = trained
    exported = export(student, images)
    other = torch.randn_like(images)
    assert_close(exported(images), expected, rtol=1e-4, atol=1e-5)
    assert_close(exported(other), student(other), rtol=1e-4, atol=1e-5)
    student.train()  # and training goes on
    student(other)
    assert torch.isfinite(distiller(other))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_student_is_scripted_after_close(trained):
    student, distiller, images, expected = trained
    distiller.close()
    assert_close(torch.jit.script(student)(images), expected)

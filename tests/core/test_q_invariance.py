"""What multiplies or shifts the teacher's channels changes nothing in the student's training."""

import pytest
import torch
from torch import nn

from vid_loss import DistillationModel, Distiller, Pair
from vid_loss.cache import FeatureCache

CHANNELS = 6


class Units(nn.Module):
    """A teacher's layer in other units: each channel times a factor, plus a shift."""

    def __init__(self, layer, factor, shift, ndim):
        super().__init__()
        self.layer = layer
        shape = (-1, 1, 1) if ndim == 4 else (-1,)
        self.register_buffer("factor", factor.view(shape))
        self.register_buffer("shift", shift.view(shape))

    def forward(self, x):
        return self.layer(x) * self.factor + self.shift


def layer(kind, width):
    if kind == "map":
        return nn.Sequential(nn.Conv2d(2, width, 3, padding=1), nn.Tanh())
    return nn.Sequential(nn.Linear(5, width), nn.Tanh())


class Student(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.h = layer(kind, 4)

    def forward(self, x, attention_mask=None):
        return self.h(x)


class Teacher(nn.Module):
    def __init__(self, kind, factor, shift):
        super().__init__()
        self.h = Units(layer(kind, CHANNELS), factor, shift, 4 if kind == "map" else 2)

    def forward(self, x, attention_mask=None):
        return self.h(x)


def generator():
    return torch.Generator().manual_seed(0)


UNITS = {
    "times 100": (torch.full((CHANNELS,), 100.0), torch.zeros(CHANNELS)),
    "times 0.01": (torch.full((CHANNELS,), 0.01), torch.zeros(CHANNELS)),
    "per channel": (
        torch.logspace(-2, 2, CHANNELS),
        torch.logspace(-2, 2, CHANNELS) * torch.linspace(-5, 5, CHANNELS),
    ),
    "shifted by 1000": (torch.ones(CHANNELS), torch.full((CHANNELS,), 1000.0)),
}
AS_IT_IS = torch.ones(CHANNELS), torch.zeros(CHANNELS)
SHAPES = {"vector": (40, 5), "tokens": (40, 7, 5), "map": (40, 2, 5, 3)}
OPTIMIZERS = {
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=1e-2),
}


def build(kind, units, dtype=torch.float64, **options):
    torch.manual_seed(0)
    student, teacher = Student(kind).to(dtype), Teacher(kind, *units).to(dtype)
    x = torch.randn(SHAPES[kind], generator=generator()).to(dtype)
    distiller = Distiller(student, teacher, [Pair("h", "h")], example=x[:1], **options)
    return student, distiller, x


def trajectory(kind, units, optimizer, *, masked=False, steps=30, compiled=False, cache=None):
    """The student's parameters after each step, and the losses."""
    student, distiller, x = build(kind, units, cache=cache)
    model = DistillationModel(student, distiller)
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    draw, seen = generator(), []
    for _ in range(steps):
        index = torch.randperm(len(x), generator=draw)[:8]
        inputs = {"x": x[index]}
        if masked:
            inputs["attention_mask"] = torch.rand(8, 7, generator=draw) < 0.6
        if cache is not None:
            inputs["sample_index"] = index
        output, loss = run(**inputs)
        optimizer.zero_grad()
        (output.mean() + loss).backward()
        optimizer.step()
        seen.append(
            torch.cat(
                [loss.detach().view(1), *(p.detach().flatten() for p in student.parameters())]
            )
        )
    return torch.stack(seen), distiller


def assert_same_course(first, second, rtol=1e-6):
    """Up to rounding, in float64; and it is a course that leads somewhere."""
    assert (first[0] - first[-1]).abs().max() > 1e-2
    torch.testing.assert_close(first, second, rtol=rtol, atol=rtol / 100)


@pytest.mark.parametrize("units", UNITS.values(), ids=UNITS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", ["vector", "tokens", "masked tokens", "map"])
def test_the_students_course_does_not_depend_on_the_teachers_units(kind, optimizer, units):
    masked, kind = "masked" in kind, kind.split()[-1]
    plain, _ = trajectory(kind, AS_IT_IS, optimizer, masked=masked)
    other, _ = trajectory(kind, units, optimizer, masked=masked)
    assert_same_course(plain, other)


def test_nor_with_a_cache(tmp_path):
    caches = [FeatureCache(tmp_path / name, dtype=torch.float32) for name in ("a", "b")]
    plain, _ = trajectory("tokens", AS_IT_IS, "SGD", cache=caches[0])
    other, _ = trajectory("tokens", UNITS["per channel"], "SGD", cache=caches[1])
    assert_same_course(plain, other, rtol=1e-4)  # what it keeps is rounded to float32


def test_nor_when_compiled():
    courses = []
    for units in (AS_IT_IS, UNITS["per channel"]):
        torch.compiler.reset()
        courses.append(trajectory("map", units, "SGD", compiled=True, steps=10)[0])
    assert_same_course(*courses)
    assert_same_course(courses[0], trajectory("map", AS_IT_IS, "SGD", steps=10)[0])


def test_nor_does_what_is_transferred_in_bfloat16():
    """Where the features themselves are rounded: only the figures can be compared."""
    explained = []
    for name in ("times 1", "times 100", "times 0.01", "per channel"):
        student, distiller, x = build("tokens", UNITS.get(name, AS_IT_IS), torch.bfloat16)
        assert {p.dtype for p in distiller.parameters()} == {torch.float32}
        optimizer = torch.optim.AdamW(distiller.parameters(), lr=1e-2)
        for start in range(60):
            batch = x.roll(start, 0)[:16]
            student(batch)
            loss = distiller(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        explained.append(distiller.diagnostics()["h->h"].explained_variance)
    assert min(explained) > 0.3
    assert max(explained) - min(explained) < 0.02

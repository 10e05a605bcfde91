"""A teacher whose forward draws random numbers sees other inputs than the student."""

import warnings

import pytest
import torch
from torch import nn

from vid_loss import Distiller
from vid_loss.teachers import Teachers


class Denoiser(nn.Module):
    """Draws its noise in forward, as a diffusion's loss does, unless it is given."""

    def __init__(self, width):
        super().__init__()
        self.body, self.last = nn.Linear(4, width), nn.Linear(width, 4)

    def forward(self, x, noise=None):
        noise = torch.randn_like(x) if noise is None else noise
        return self.last(self.body(x + noise))


class Masked(Denoiser):
    """Drops a random number of samples: its features differ in shape."""

    def forward(self, x):
        return super().forward(x[: 1 + int(torch.rand(()) * len(x))], 0)


class LayerDrop(Denoiser):
    """Draws what it uses in train mode alone, as the speech models of transformers do."""

    def forward(self, x):
        drop = torch.rand(()) < 0.5
        return super().forward(x * 0 if self.training and drop else x, 0)


def warned(student, teacher, example, pairs=None, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Distiller(student, teacher, pairs or {"body": "body"}, example=example, **options).close()
    return [str(x.message) for x in caught]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("options", [{}, {"teacher_inputs": lambda x: x}, {"stop_teacher": True}])
def test_noise_that_the_teacher_draws_is_told_of_by_its_layer(seed, options):
    torch.manual_seed(seed)
    (message,) = warned(Denoiser(8), Denoiser(16), torch.randn(6, 4), **options)
    assert "others of 'body' in a second run" in message
    assert "distiller(noisy_images, times)" in message


def test_so_is_a_random_mask_that_changes_the_shape():
    torch.manual_seed(0)
    noted = pytest.warns(UserWarning, match="'body' in a second run")
    with noted, pytest.raises(ValueError, match="expected one batch size"):
        Distiller(Masked(8), Masked(16), {"body": "body"}, example=torch.randn(64, 4))


def test_so_is_a_random_view_for_the_teacher_alone():
    torch.manual_seed(0)
    student, teacher = nn.Sequential(nn.Linear(4, 8)), nn.Sequential(nn.Linear(4, 16))
    view = {"teacher_inputs": lambda x: x + torch.randn_like(x)}
    (message,) = warned(student, teacher, torch.randn(6, 4), {"0": "0"}, **view)
    assert "others of '0' in a second run" in message
    assert "or teacher_inputs, draws" in message


def test_one_of_several_teachers_is_told_of():
    torch.manual_seed(0)
    teachers = Teachers({"plain": nn.Linear(4, 8), "noisy": Denoiser(8)})
    pairs = {"body": "noisy.body", "last": "plain"}
    (message,) = warned(LayerDrop(8), teachers, torch.randn(6, 4), pairs)
    assert "others of 'noisy.body' in" in message


@pytest.mark.parametrize("teacher", [LayerDrop(16), nn.Sequential(nn.Linear(4, 16), nn.Dropout())])
def test_nothing_is_said_of_what_is_drawn_and_not_used(teacher):
    layer = "body" if isinstance(teacher, LayerDrop) else "1"
    assert warned(LayerDrop(8), teacher, torch.randn(6, 4), {"body": layer}) == []


def test_nothing_is_said_where_both_are_given_the_noise():
    assert warned(Denoiser(8), Denoiser(16), (torch.randn(6, 4), torch.randn(6, 4))) == []


def test_the_random_state_stays_as_it_was():
    student, teacher, example = Denoiser(8), Denoiser(16), torch.ones(6, 4)
    before = torch.get_rng_state()
    assert warned(student, teacher, example)
    assert torch.equal(torch.get_rng_state(), before)

"""The losses, compared with reference values and their definitions."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.model import perceptual_loss, pixel_loss, relativistic_losses

Reference = dict[str, np.ndarray]


def logits(reference: Reference) -> tuple[Tensor, Tensor]:
    real, fake = (torch.from_numpy(reference[f"ragan_{kind}"]).requires_grad_() for kind in ("real", "fake"))
    return real, fake


def test_relativistic_losses_equal_the_reference(reference: Reference) -> None:
    generator_loss, discriminator_loss = relativistic_losses(*logits(reference))
    assert generator_loss.item() == pytest.approx(reference["ragan_g_loss"], abs=1e-12)
    assert discriminator_loss.item() == pytest.approx(reference["ragan_d_loss"], abs=1e-12)


def test_relativistic_gradients_equal_the_reference(reference: Reference) -> None:
    real, fake = logits(reference)
    generator_loss, discriminator_loss = relativistic_losses(real, fake)
    generator_loss.backward(retain_graph=True)
    assert real.grad is None  # The real logits are constants in the generator's loss.
    np.testing.assert_allclose(fake.grad, reference["ragan_g_grad_fake"], rtol=0, atol=1e-12)
    fake.grad = None
    discriminator_loss.backward()
    np.testing.assert_allclose(real.grad, reference["ragan_d_grad_real"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(fake.grad, reference["ragan_d_grad_fake"], rtol=0, atol=1e-12)


def test_relativistic_losses_stay_finite_for_extreme_logits() -> None:
    real = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    losses = relativistic_losses(real, torch.tensor([[-3e4], [3e4]], requires_grad=True))
    sum(losses).backward()
    assert all(loss.isfinite() for loss in losses)
    assert real.grad is not None
    assert real.grad.isfinite().all()


def test_a_mean_over_two_halves_gives_the_losses_of_the_whole(reference: Reference) -> None:
    """Training on several workers relies on it: every reduction uses `mean`."""
    real, fake = (tensor.detach() for tensor in logits(reference))
    whole = relativistic_losses(real, fake)
    reduced: list[Tensor] = []

    def mean(tensor: Tensor) -> Tensor:
        reduced.append(tensor)
        return (tensor[:3].sum() + tensor[3:].sum()) / tensor.numel()

    halves = relativistic_losses(real, fake, mean)
    assert len(reduced) > 0
    torch.testing.assert_close(halves, whole, rtol=0, atol=1e-15)
    constant = relativistic_losses(real, fake, lambda tensor: tensor.sum() * 0)
    assert [loss.item() for loss in constant] == [0, 0]


def test_pixel_loss_is_the_mean_absolute_difference() -> None:
    sr, hr = torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.25)
    assert pixel_loss(sr, hr).item() == 0.25
    assert pixel_loss(sr, hr, lambda tensor: tensor.sum()).item() == 0.25 * sr.numel()


def test_perceptual_loss_weighs_the_layers() -> None:
    sr = {"conv1_2": torch.zeros(1, 2, 4, 4), "conv2_2": torch.zeros(1, 3, 2, 2)}
    hr = {"conv1_2": torch.ones(1, 2, 4, 4), "conv2_2": torch.full((1, 3, 2, 2), -2.0)}
    assert perceptual_loss(sr, hr, {"conv1_2": 0.5, "conv2_2": 0.25}).item() == 1.0
    assert perceptual_loss(sr, hr, {"conv2_2": 1.0}).item() == 2.0


@pytest.mark.parametrize(
    ("given", "used"), [("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")]
)
def test_losses_are_computed_in_single_precision_or_better(given: str, used: str) -> None:
    a, b = torch.rand(4, 1).to(getattr(torch, given)), torch.rand(4, 1).to(getattr(torch, given))
    losses = [pixel_loss(a, b), perceptual_loss({"x": a}, {"x": b}, {"x": 1.0}), *relativistic_losses(a, b)]
    assert {loss.dtype for loss in losses} == {getattr(torch, used)}


def test_relativistic_losses_equal_binary_cross_entropy() -> None:
    real, fake = torch.randn(2, 1, 5, 5).double(), torch.randn(2, 1, 5, 5).double()
    ones, zeros = torch.ones_like(real), torch.zeros_like(real)
    entropy = functional.binary_cross_entropy_with_logits
    expected = (entropy(real - fake.mean(), ones) + entropy(fake - real.mean(), zeros)) / 2
    torch.testing.assert_close(relativistic_losses(real, fake)[1], expected, rtol=0, atol=1e-14)

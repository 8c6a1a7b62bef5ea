"""The losses, compared with reference values and their definitions."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torchmetrics.functional.image import structural_similarity_index_measure as ssim

from pipeline.model.losses import (
    SCALE_WEIGHTS,
    ms_ssim_loss,
    perceptual_loss,
    pixel_loss,
    relativistic_losses,
    vanilla_losses,
)

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


def test_charbonnier_loss_is_l1_with_a_smooth_minimum() -> None:
    hr = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    assert pixel_loss(hr, hr, kind="charbonnier").item() == pytest.approx(1e-3)
    assert pixel_loss(hr + 0.25, hr, kind="charbonnier").item() == pytest.approx((0.25**2 + 1e-6) ** 0.5)
    sr = hr.clone().requires_grad_()
    pixel_loss(sr, hr, kind="charbonnier").backward()
    assert sr.grad is not None
    assert sr.grad.abs().max() == 0


def ms_ssim(sr: Tensor, hr: Tensor, scales: int) -> Tensor:
    """MS-SSIM of each image from torchmetrics' SSIM, whose own MS-SSIM also counts windows beyond the edges."""
    values = []
    options = {"sigma": 1.5, "reduction": "none", "data_range": 1.0}
    for scale in range(scales):
        if scale:
            sr, hr = functional.avg_pool2d(sr, 2), functional.avg_pool2d(hr, 2)
        if scale < scales - 1:
            values.append(ssim(sr, hr, return_contrast_sensitivity=True, **options)[1])
        else:
            values.append(ssim(sr, hr, return_full_image=True, **options)[1][..., 5:-5, 5:-5].mean((1, 2, 3)))
    weights = torch.tensor(SCALE_WEIGHTS[:scales], dtype=sr.dtype)
    return (torch.stack(values).relu() ** (weights / weights.sum())[:, None]).prod(0)


@pytest.mark.parametrize(
    ("size", "scales"),
    [
        pytest.param((176, 183), 5, marks=pytest.mark.slow),
        ((128, 128), 4),
        ((96, 90), 4),
        ((64, 64), 3),
        ((32, 40), 2),
        ((16, 11), 1),
    ],
)
def test_ms_ssim_loss_equals_torchmetrics(size: tuple[int, int], scales: int) -> None:
    generator = torch.Generator().manual_seed(0)
    hr = torch.rand(3, 3, *size, generator=generator, dtype=torch.float64)
    noise = torch.randn(hr.shape, generator=generator, dtype=torch.float64)
    # Each image has another amount of noise.
    sr = (hr + noise * torch.tensor([0.02, 0.1, 0.5])[:, None, None, None]).requires_grad_()
    reference = 1 - ms_ssim(sr, hr, scales).mean()
    loss = ms_ssim_loss(sr, hr)
    torch.testing.assert_close(loss, reference, rtol=0, atol=1e-12)
    (expected,) = torch.autograd.grad(reference, sr)
    (found,) = torch.autograd.grad(loss, sr)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_ms_ssim_loss_has_finite_gradients_for_any_images() -> None:
    hr = torch.rand(1, 3, 64, 64)
    for image in (hr, 1 - hr, torch.zeros_like(hr), torch.full_like(hr, 0.5)):
        sr = image.clone().requires_grad_()
        loss = ms_ssim_loss(sr, hr)
        loss.backward()
        assert sr.grad is not None
        assert sr.grad.isfinite().all()
        assert (loss.item() < 1e-5) == (image is hr)


def test_ms_ssim_loss_reduces_one_value_for_each_image() -> None:
    """A mean over workers' images is then exact, although the loss is a product of means."""
    sr, hr = torch.rand(4, 3, 32, 32).double(), torch.rand(4, 3, 32, 32).double()
    single = torch.stack([ms_ssim_loss(sr[i : i + 1], hr[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(ms_ssim_loss(sr, hr), single.mean(), rtol=0, atol=1e-14)
    shapes = []
    ms_ssim_loss(sr, hr, lambda values: shapes.append(values.shape) or values.mean())  # type: ignore[func-returns-value]
    assert shapes == [(4,)]


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
    images = torch.rand(1, 3, 16, 16).to(getattr(torch, given))
    losses = [
        pixel_loss(a, b),
        pixel_loss(a, b, kind="charbonnier"),
        ms_ssim_loss(images, images),
        perceptual_loss({"x": a}, {"x": b}, {"x": 1.0}),
        *relativistic_losses(a, b),
        *vanilla_losses(a, b),
    ]
    assert {loss.dtype for loss in losses} == {getattr(torch, used)}


def test_relativistic_losses_equal_binary_cross_entropy() -> None:
    real, fake = torch.randn(2, 1, 5, 5).double(), torch.randn(2, 1, 5, 5).double()
    ones, zeros = torch.ones_like(real), torch.zeros_like(real)
    entropy = functional.binary_cross_entropy_with_logits
    expected = (entropy(real - fake.mean(), ones) + entropy(fake - real.mean(), zeros)) / 2
    torch.testing.assert_close(relativistic_losses(real, fake)[1], expected, rtol=0, atol=1e-14)


def test_vanilla_losses_equal_binary_cross_entropy() -> None:
    real, fake = torch.randn(2, 1, 5, 5).double(), torch.randn(2, 1, 5, 5).double()
    ones, zeros = torch.ones_like(real), torch.zeros_like(real)
    entropy = functional.binary_cross_entropy_with_logits
    generator_loss, discriminator_loss = vanilla_losses(real, fake)
    torch.testing.assert_close(generator_loss, entropy(fake, ones), rtol=0, atol=1e-14)
    expected = entropy(real, ones) + entropy(fake, zeros)
    torch.testing.assert_close(discriminator_loss, expected, rtol=0, atol=1e-14)
    far = torch.tensor([[1e4], [-1e4]])
    assert all(loss.isfinite() for loss in vanilla_losses(far, -far))

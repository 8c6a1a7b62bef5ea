"""Upscaling and metrics on a GPU: the CPU's pixels and scikit-image's values."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from gpu import DEVICES

from pipeline.imaging import psnr, ssim, upscale
from pipeline.imaging.metrics import batch_psnr, batch_ssim, planes
from pipeline.model import RRDBNet, seeded, set_precision


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    set_precision("tf32")  # torch's default


def generator() -> RRDBNet:
    return seeded(0, lambda: RRDBNet(num_feat=16, num_block=3, num_grow_ch=8)).eval()


def photo(height: int, width: int) -> np.ndarray:
    """A smooth image with some noise: its result covers all gray levels."""
    y, x = np.mgrid[0:height, 0:width] / 20
    waves = 128 + 100 * np.stack([np.sin(x + y), np.cos(x - y), np.sin(2 * x)], axis=-1)
    noise = np.random.default_rng(0).normal(0, 10, waves.shape)
    return (waves + noise).clip(0, 255).astype(np.uint8)


def levels(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.abs(one.astype(int) - other.astype(int))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tile_px", [None, 40])
@pytest.mark.parametrize("size", [(90, 101), (1, 1), (64, 48)])
def test_fp32_gives_the_cpus_pixels(device: str, tile_px: int | None, size: tuple[int, int]) -> None:
    set_precision("fp32")
    expected = upscale(generator(), photo(*size), device="cpu")
    found = upscale(generator(), photo(*size), tile_px=tile_px, device=device)
    assert levels(found, expected).max() <= 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("precision", "mean_level"), [("tf32", 0.1), ("bf16", 1.0)])
def test_lower_precisions_are_near_fp32(device: str, precision: str, mean_level: float) -> None:
    set_precision("fp32")
    expected = upscale(generator(), photo(64, 48), device="cpu")
    set_precision(precision)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    found = upscale(generator(), photo(64, 48), device=device, dtype=dtype)
    assert levels(found, expected).mean() <= mean_level


@pytest.mark.parametrize("device", DEVICES)
def test_psnr_and_ssim_on_the_device_equal_those_on_the_cpu(device: str) -> None:
    hr = photo(61, 83)
    sr = (hr.astype(int) + np.random.default_rng(1).integers(-9, 10, hr.shape)).clip(0, 255).astype(np.uint8)
    pair = [torch.from_numpy(image[None, 4:-4, 4:-4]).to(device) for image in (sr, hr)]
    for channel in ("y", "rgb"):
        a, b = (planes(images, channel) for images in pair)
        assert float(batch_psnr(a, b)) == pytest.approx(psnr(sr, hr, 4, channel), abs=1e-9)  # type: ignore[arg-type]
        assert float(batch_ssim(a, b)) == pytest.approx(ssim(sr, hr, 4, channel), abs=1e-9)  # type: ignore[arg-type]


@pytest.mark.parametrize("device", DEVICES)
def test_16_bit_images_are_upscaled_on_the_device(device: str) -> None:
    set_precision("fp32")
    lr = photo(30, 41).astype(np.uint16) * 257
    expected = upscale(generator(), lr, device="cpu")
    found = upscale(generator(), lr, tile_px=20, device=device)
    assert found.dtype == np.uint16
    assert levels(found, expected).max() <= 257  # a level of 8 bits
